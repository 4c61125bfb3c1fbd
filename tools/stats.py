"""What studies and experiments say of several seeds, and how they write it down."""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of the exact paired permutation test: all 2^n signs."""
    d = np.array(differences)
    signs = np.array([*itertools.product((-1, 1), repeat=len(d))])  # (2^n, n)
    return float((np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean())


def fisher(a: int, n: int, b: int, m: int) -> float:
    """Two-sided p-value of Fisher's exact test: a of n against b of m."""

    def ways(of_n: int) -> int:
        return math.comb(n, of_n) * math.comb(m, a + b - of_n)

    possible = range(max(0, a + b - m), min(n, a + b) + 1)
    as_rare = sum(ways(of_n) for of_n in possible if ways(of_n) <= ways(a))
    return as_rare / math.comb(n + m, a + b)


def holm(p: list[float]) -> list[float]:
    """p-values, corrected for being several (Holm 1979)."""
    corrected = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def sign_flips(differences: dict[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """{name: (p-value of `sign_flip`, the same after Holm's correction over all names)}."""
    p = [sign_flip(values) for values in differences.values()]
    return dict(zip(differences, zip(p, holm(p), strict=True), strict=True))


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; of a single value the value."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown. header: its first line, "| a | b |"."""
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
