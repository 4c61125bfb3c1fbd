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
    lines = [
        header,
        "|" + "---|" * (header.count("|") - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return (
        f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
        if len(values) > 1
        else f"{values[0]:.3f}"
    )


def holm(p: list[float]) -> list[float]:
    """p-values, corrected for being several (Holm 1979)."""
    order, out, largest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        out[i] = largest
    return out
