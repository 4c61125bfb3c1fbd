"""What studies and experiments say of several seeds, and how they write it down."""

import itertools
from collections.abc import Iterable

import numpy as np


def sign_flip(differences: list[float]) -> float:
    """Two-sided p-value of the exact paired permutation test: all 2^n signs."""
    d = np.array(differences)
    signs = np.array([*itertools.product((-1, 1), repeat=len(d))])
    return float((np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean())


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
