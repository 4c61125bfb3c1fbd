"""The sign rule: does an aggregation reward keeping a constraint, or breaking it? It depends on how many keep it.

    python study/sign.py          # writes docs/sign.png, prints the table of docs/sign.md

A constraint is kept (1) or broken (0) by rollouts of one prompt, at a rate p. K - 1 other channels are graded:
r = logistic(x), x normal with variance 1 and a mean that is lower by `pull` where the constraint is kept; given that,
they are independent. The credit of keeping it is E[score | kept] - E[score | broken], before whitening, which divides
by a positive number. `credit` has it in closed form or by quadrature, exact for large groups but for eps; docs/sign.md
derives it.
"""

import argparse
import math
import sys
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # the code that is studied; a script sees its own folder only

import json

import matplotlib
import numpy as np
import torch

import rvpo

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "rvpo": (1.0, 2.0, 5.0, 10.0),
    "gdpo": (0.0,),
    "hardmin": (math.inf,),
    "explicit": (1.0,),
    "grpo": (0.0,),
    "softmin": (1.0,),
    "geometric": (0.0,),
}  # name: betas
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(200)
WEIGHTS = WEIGHTS / WEIGHTS.sum()  # of the normal distribution
FLOOR = 0.05  # of the geometric mean, which would not see a channel beside one that is 0


def others(pull: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of another channel at NODES: where the constraint is kept, and where it is broken."""
    return tuple(1 / (1 + np.exp(-(NODES + side * pull / 2))) for side in (-1, 1))


def mean_log(constant: float, terms: np.ndarray, n: int) -> float:
    """E log(constant + X_1 + ... + X_n), X independent, each `terms` at NODES. By log y = int_0^inf (exp(-t) -
    exp(-t y)) / t dt, whose expectation is a product of Laplace transforms; t on a logarithmic grid."""
    log_t = np.linspace(-60, 60, 12_001)
    t = np.exp(log_t)
    laplace = np.concatenate(
        [np.exp(-np.outer(part, terms)) @ WEIGHTS for part in np.array_split(t, 20)]
    )
    return float(np.trapezoid(np.exp(-t) - np.exp(-t * constant) * laplace**n, log_t))


def mean_min(constant: float, values: np.ndarray, n: int) -> float:
    """E min(constant, X_1, ..., X_n), X independent with the distribution of `values`, which increase with NODES."""
    grid = np.linspace(-12, 12, 20_001)
    x = np.interp(grid, NODES, values)
    above = (0.5 * np.array([math.erfc(g / math.sqrt(2)) for g in grid])) ** n  # P(all of them > x)
    below = np.minimum(x, constant)
    return float(below[0] + np.sum(np.diff(below) * (above[1:] + above[:-1]) / 2))


def score(method: str, beta: float, constraint: float, values: np.ndarray, k: int) -> float:
    """E[score] of a rollout with this value of the constraint, the others' being `values` at NODES: z-scores for the
    methods that aggregate these, else raw rewards."""
    mean, n = values @ WEIGHTS, k - 1
    if method in ("gdpo", "grpo"):
        return (constraint + n * mean) / k
    if method == "explicit":  # E[population variance] of K numbers, from first and second moments
        square, variance = values**2 @ WEIGHTS, values**2 @ WEIGHTS - mean**2
        total = constraint + n * mean
        return total / k - beta * (
            (constraint**2 + n * square) / k - (total**2 + n * variance) / k**2
        )
    if method == "geometric":
        return (constraint + FLOOR) ** (1 / k) * ((values + FLOOR) ** (1 / k) @ WEIGHTS) ** n
    if method == "hardmin":
        return mean_min(constraint, values, n)
    return -(mean_log(math.exp(-beta * constraint), np.exp(-beta * values), n) - math.log(k)) / beta


def credit(method: str, beta: float, p: float, pull: float, k: int, group: int = 0) -> float:
    """E[score | kept] - E[score | broken] where a share p of a group keeps the constraint. group: G, for the unbiased
    std; 0: very large."""
    kept, broken = others(pull)
    values = 1.0, 0.0
    if method not in ("grpo", "softmin", "geometric"):  # z-scores, within the group
        unit = math.sqrt((group - 1) / group) if group else 1.0
        mean = p * (kept @ WEIGHTS) + (1 - p) * (broken @ WEIGHTS)
        std = (
            math.sqrt(
                p * ((kept - mean) ** 2 @ WEIGHTS) + (1 - p) * ((broken - mean) ** 2 @ WEIGHTS)
            )
            / unit
        )
        kept, broken = (kept - mean) / std, (broken - mean) / std
        values = unit * math.sqrt((1 - p) / p), -unit * math.sqrt(p / (1 - p))
    return score(method, beta, values[0], kept, k) - score(method, beta, values[1], broken, k)


def covariance(method: str, beta: float, p: float, pull: float, k: int, group: int) -> float:
    """Of score and constraint within groups whose rollouts each keep it with probability p."""
    return sum(
        math.comb(group, n)
        * p**n
        * (1 - p) ** (group - n)
        * (n / group)
        * (1 - n / group)
        * credit(method, beta, n / group, pull, k, group)
        for n in range(1, group)
    )


def turn(method: str, beta: float, pull: float, k: int) -> float:
    """The share of a large group above which keeping the constraint is always rewarded; 0: from the first one on, 1:
    never."""

    def opposed(p: float) -> bool:
        return credit(method, beta, p, pull, k) <= 0

    low = next((p / 40 for p in range(39, 0, -1) if opposed(p / 40)), 0.0)
    if low in (0.0, 39 / 40):
        return round(low)
    high = low + 1 / 40
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if opposed(middle) else (low, middle)
    return (low + high) / 2


def explicit_turn(beta: float, k: int, correlation: float) -> float:
    """`turn` of mean - beta * variance, any distribution of the others whose spread does not depend on the constraint:
    in closed form, from their correlation with it. To second order it is rvpo's with twice this beta."""
    x = (1 + (k - 1) * correlation) * k / (beta * (k - 1) * (1 - correlation) ** 2)
    return (1 - x / math.sqrt(4 + x * x)) / 2


def scores(method: str, beta: float, constraint: torch.Tensor, pull: float, k: int) -> torch.Tensor:
    """Groups (n, G) of the constraint's values, 1 or 0 -> scores (n, G), the other channels drawn; by rvpo.py's own
    functions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*constraint.shape, k - 1, generator=generator).double() - pull * (
        constraint[..., None] - 0.5
    )
    rewards = torch.cat([constraint[..., None], x.sigmoid()], -1)
    if method == "grpo":
        return rewards.mean(-1)
    if method == "softmin":
        return rvpo.soft_min(rewards, beta)
    if method == "geometric":
        return (rewards + FLOOR).log().mean(-1).exp()
    return rvpo.AGGREGATIONS[method](rewards, beta)


def sampled(
    method: str, beta: float, p: float, pull: float, k: int, group: int, n: int = 4000
) -> float:
    """`covariance` by Monte Carlo."""
    constraint = (torch.rand(n, group, generator=torch.Generator().manual_seed(1)) < p).double()
    found = scores(method, beta, constraint, pull, k)
    return ((found - found.mean(1, keepdim=True)) * constraint).mean().item()


LINES = ("gdpo", 0.0), ("rvpo", 2.0), ("rvpo", 10.0), ("hardmin", math.inf), ("explicit", 1.0)
PULLS, K, G = (0.0, 0.5, 1.0, 1.5, 2.0), 6, 8


def label(method: str, beta: float) -> str:
    return f"{method} {beta:g}" if 0 < beta < math.inf else method


def batches(file: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Of the steps of the text study's runs, by aggregation: share that keeps the limit, `credit` of it in the log. Not
    of those on reply-capped, where little pulls against it."""
    found, runs = {}, map(json.loads, file.read_text().splitlines() if file.exists() else [])
    for run in [run for run in runs if run["task"] != "reply-capped"]:
        shares, credits = found.setdefault(run["method"], ([], []))
        for share, value in zip(run["train"]["short"], run["credit"]["short"], strict=True):
            if value is not None:  # kept by all, or by none
                shares.append(share)
                credits.append(value)
    return found


def figure(out: Path, file: Path) -> None:
    fig, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rates, dense, pulls = (
        np.linspace(0.1, 0.9, 9),
        np.linspace(0.04, 0.96, 47),
        np.linspace(0.1, 3, 15),
    )
    for i, (method, beta) in enumerate(LINES):
        name, color = label(method, beta), f"C{i}"
        first.plot(
            dense, [covariance(method, beta, p, 1.0, K, G) for p in dense], color=color, label=name
        )
        first.plot(rates, [sampled(method, beta, p, 1.0, K, G) for p in rates], ".", color=color)
        second.plot(pulls, [turn(method, beta, pull, K) for pull in pulls], color=color, label=name)
    for method, beta, style in (
        ("softmin", 1.0, "k--"),
        ("grpo", 0.0, "k-."),
        ("geometric", 0.0, "k:"),
    ):
        second.plot(
            pulls, [turn(method, beta, pull, K) for pull in pulls], style, label=label(method, beta)
        )
    first.set(
        title=f"Credit at pull 1, K = {K}, G = {G}; dots: Monte Carlo",
        xlabel="share that keeps the constraint",
        ylabel="covariance of score and constraint",
    )
    second.set(
        title="Above its line a method rewards keeping it",
        xlabel="pull of the other channels",
        ylabel="share that keeps the constraint",
    )
    for i, (method, found) in enumerate(sorted(batches(file).items())):
        shares, credits = np.array(found)
        cells = [np.abs(shares - middle) <= 0.1 for middle in np.linspace(0.1, 0.9, 5)]
        x, y, error = zip(
            *[
                (shares[c].mean(), credits[c].mean(), credits[c].std() / math.sqrt(c.sum()))
                for c in cells
                if c.sum() >= 5
            ]
            or [(math.nan,) * 3],
            strict=True,
        )
        third.errorbar(
            x, y, error, color=f"C{i}", marker="o", markersize=3, capsize=2, label=method
        )
    third.set(
        title="Real runs: `credit` of the word limit",
        xlabel="share of a step's rollouts that keeps it",
        ylabel="correlation, mean of steps",
    )
    for axis in (first, second, third):
        axis.axhline(0, color="gray", linewidth=0.6)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    fig.savefig(out, dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        "| | "
        + " | ".join(f"pull {pull:g}" for pull in PULLS)
        + " |\n"
        + "|---" * (len(PULLS) + 1)
        + "|"
    )
    for name, betas in METHODS.items():
        for b in betas:
            cells = [
                {0: "always", 1: "never"}.get(x, f"{x:.2f}")
                for x in (turn(name, b, pull, K) for pull in PULLS)
            ]
            print(f"| {label(name, b)} | " + " | ".join(cells) + " |")
    path = Path(__file__).parent.parent / "docs" / "sign.png"
    figure(path, Path(__file__).parent / "text.jsonl")
    print(path)
