"""The sign rule: does an aggregation reward keeping a constraint? It depends on how many keep it.

    python study/sign.py          # writes docs/sign.png, prints the figures of docs/sign.md

A constraint is kept (1) or broken (0) by rollouts of one prompt, at a rate p. The K - 1 other
channels are graded: r = logistic(x), x normal with variance 1 and a mean that is lower by `pull`
where the constraint is kept; given that, they are independent. The credit of keeping it is
E[score | kept] - E[score | broken], before whitening, which divides by a positive number. `credit`
has it in closed form or by quadrature, exact for large groups except for eps. docs/sign.md derives
it.
"""

import argparse
import math
import sys
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import numpy as np
import text
import torch

import rvpo
from tools import stats, style

ROOT = Path(__file__).parent.parent
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


# In closed form, or by quadrature


def credit(method: str, beta: float, p: float, pull: float, k: int, group: int = 0) -> float:
    """E[score | kept] - E[score | broken] where a share p of a group keeps the constraint.

    group: G, for the unbiased std; 0: very large."""
    kept, broken = others(pull)
    value_kept, value_broken = 1.0, 0.0
    if method not in ("grpo", "softmin", "geometric"):  # z-scores, within the group
        unit = math.sqrt((group - 1) / group) if group else 1.0
        mean = p * (kept @ WEIGHTS) + (1 - p) * (broken @ WEIGHTS)
        square_kept, square_broken = (kept - mean) ** 2 @ WEIGHTS, (broken - mean) ** 2 @ WEIGHTS
        std = math.sqrt(p * square_kept + (1 - p) * square_broken) / unit
        kept, broken = (kept - mean) / std, (broken - mean) / std
        value_kept = unit * math.sqrt((1 - p) / p)
        value_broken = -unit * math.sqrt(p / (1 - p))
    return score(method, beta, value_kept, kept, k) - score(method, beta, value_broken, broken, k)


def others(pull: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of another channel at NODES: where the constraint is kept, and where it is broken."""
    return tuple(1 / (1 + np.exp(-(NODES + side * pull / 2))) for side in (-1, 1))


def score(method: str, beta: float, constraint: float, values: np.ndarray, k: int) -> float:
    """E[score] of a rollout with this value of the constraint, the others' being `values` at NODES.

    They are z-scores for the methods that aggregate these, else raw rewards."""
    n = k - 1
    total = constraint + n * (values @ WEIGHTS)
    if method in ("gdpo", "grpo"):
        return total / k
    if method == "explicit":  # E[population variance] of K numbers, from first and second moments
        square = values**2 @ WEIGHTS
        variance = square - (values @ WEIGHTS) ** 2
        mean_square = (constraint**2 + n * square) / k
        return total / k - beta * (mean_square - (total**2 + n * variance) / k**2)
    if method == "geometric":
        return (constraint + FLOOR) ** (1 / k) * ((values + FLOOR) ** (1 / k) @ WEIGHTS) ** n
    if method == "hardmin":
        return mean_min(constraint, values, n)
    log_sum = mean_log(math.exp(-beta * constraint), np.exp(-beta * values), n)
    return -(log_sum - math.log(k)) / beta


def mean_log(constant: float, terms: np.ndarray, n: int) -> float:
    """E log(constant + X_1 + ... + X_n), X independent, each `terms` at NODES.

    By log y = int_0^inf (exp(-t) - exp(-t y)) / t dt, whose expectation is a product of Laplace
    transforms; t on a logarithmic grid."""
    log_t = np.linspace(-60, 60, 12_001)
    t = np.exp(log_t)
    blocks = [np.exp(-np.outer(block, terms)) @ WEIGHTS for block in np.array_split(t, 20)]
    laplace = np.concatenate(blocks)
    return float(np.trapezoid(np.exp(-t) - np.exp(-t * constant) * laplace**n, log_t))


def mean_min(constant: float, values: np.ndarray, n: int) -> float:
    """E min(constant, X_1, ..., X_n), X independent, each `values` at NODES, which increase."""
    grid = np.linspace(-12, 12, 20_001)
    x = np.interp(grid, NODES, values)
    above = (0.5 * np.array([math.erfc(g / math.sqrt(2)) for g in grid])) ** n  # P(all of them > x)
    below = np.minimum(x, constant)
    return float(below[0] + np.sum(np.diff(below) * (above[1:] + above[:-1]) / 2))


def covariance(method: str, beta: float, p: float, pull: float, k: int, group: int) -> float:
    """Of score and constraint in groups whose rollouts each keep it with probability p."""
    total = 0.0
    for n in range(1, group):
        probability = math.comb(group, n) * p**n * (1 - p) ** (group - n)
        variance = (n / group) * (1 - n / group)
        total += probability * variance * credit(method, beta, n / group, pull, k, group)
    return total


def turn(method: str, beta: float, pull: float, k: int) -> float:
    """The share of a large group above which keeping the constraint is always rewarded.

    0: from the first one on, 1: never."""

    def opposed(p: float) -> bool:
        return credit(method, beta, p, pull, k) <= 0

    low = next((p / 40 for p in range(39, 0, -1) if opposed(p / 40)), 0.0)
    if low in (0.0, 39 / 40):
        return round(low)
    high = low + 1 / 40
    for _ in range(6):
        middle = (low + high) / 2
        if opposed(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def explicit_turn(beta: float, k: int, correlation: float) -> float:
    """`turn` of mean - beta * variance, from the correlation of the others with the constraint.

    In closed form, for any distribution of the others whose spread does not depend on the
    constraint. To second order it is rvpo's with twice this beta."""
    x = (1 + (k - 1) * correlation) * k / (beta * (k - 1) * (1 - correlation) ** 2)
    return (1 - x / math.sqrt(4 + x * x)) / 2


# By sampling, with rvpo.py's own functions


def scores(method: str, beta: float, constraint: torch.Tensor, pull: float, k: int) -> torch.Tensor:
    """The constraint's values (n, G), 1 or 0 -> scores (n, G), the other channels drawn."""
    generator = torch.Generator().manual_seed(0)
    constraint = constraint[..., None]
    x = torch.randn(*constraint.shape[:2], k - 1, generator=generator).double()
    x = x - pull * (constraint - 0.5)
    rewards = torch.cat([constraint, x.sigmoid()], -1)  # (n, G, K)
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
    score = scores(method, beta, constraint, pull, k)
    return ((score - score.mean(1, keepdim=True)) * constraint).mean().item()


# The figure and the table

PULLS, K, G = (0.0, 0.5, 1.0, 1.5, 2.0), 6, 8
# {name: (aggregation, beta)}
Z_SCORES = {
    "rvpo": ("rvpo", 2.0),
    "rvpo 10": ("rvpo", 10.0),
    "gdpo": ("gdpo", 0.0),
    "explicit": ("explicit", 1.0),
    "hardmin": ("hardmin", math.inf),
}
LEVELS = {"grpo": ("grpo", 0.0), "softmin": ("softmin", 1.0)}  # they aggregate raw rewards
RUNS = "rvpo", "gdpo", "grpo", "hardmin", "softmin"  # of the study on text


def label(method: str, beta: float) -> str:
    return f"{method} {beta:g}" if 0 < beta < math.inf else method


def table() -> str:
    lines = ["| | " + " | ".join(f"pull {pull:g}" for pull in PULLS) + " |"]
    lines.append("|---" * (len(PULLS) + 1) + "|")
    for method, betas in METHODS.items():
        for beta in betas:
            shares = [turn(method, beta, pull, K) for pull in PULLS]
            cells = [{0: "always", 1: "never"}.get(share, f"{share:.2f}") for share in shares]
            lines.append(f"| {label(method, beta)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def runs_table() -> str:
    """The same of real runs: where their credit turns, and its means where few or most keep the
    limit. It turns where a line through the steps of which .3 to .9 keep it is 0."""
    rows = []
    for method, steps in [*[(method, None) for method in text.METHODS], ("grpo", text.STEPS)]:
        shares, credits = batches(method, steps)
        middle = (shares > 0.3) & (shares < 0.9)
        slope, height = np.polyfit(shares[middle], credits[middle], 1)
        turns = -height / slope
        row = [f"{method}, runs of {steps} steps" if steps else method, str(len(shares))]
        row.append(f"{turns:.2f}" if 0 < turns < 1 else "")
        for part in (shares < 0.2, shares < 0.4, shares >= 0.8):
            row.append(f"{credits[part].mean():+.2f} ({part.sum()})")
        rows.append(row)
    return stats.table("| | steps | turns at | fewer than .2 | fewer than .4 | .8 or more |", rows)


def figure(out: Path) -> None:
    drawn, axes = style.panels(1, 3, 3.4)
    first, second, third = axes
    ends = [
        (first, draw_credit(first)),
        (second, draw_turns(second)),
        (third, draw_runs(third)),
    ]
    for axis in axes:
        axis.axhline(0, color="gray", linewidth=0.6)
    style.save(drawn, out, ends)


def draw_credit(axis) -> style.Ends:
    """In groups of G at pull 1: lines by quadrature, dots by Monte Carlo."""
    dense, rates, ends = np.linspace(0.04, 0.96, 47), np.linspace(0.1, 0.9, 9), {}
    for name, (method, beta) in Z_SCORES.items():
        line = [covariance(method, beta, p, 1.0, K, G) for p in dense]
        dots = [sampled(method, beta, p, 1.0, K, G) for p in rates]
        style.draw_line(axis, dense, line, name)
        axis.plot(rates, dots, ".", color=style.color(name))
        ends[name] = line[-1]
    style.describe(
        axis,
        "Theory: what few keep,\nz-scores punish",
        "share that keeps the constraint",
        "credit of keeping it",
    )
    return dense[-1], ends


def draw_turns(axis) -> style.Ends:
    """Shares above which keeping the constraint is rewarded, by the pull of the others."""
    pulls, ends = np.linspace(0.1, 3, 15), {}
    for name, (method, beta) in (Z_SCORES | LEVELS).items():
        shares = [turn(method, beta, pull, K) for pull in pulls]
        style.draw_line(axis, pulls, shares, name)
        ends[name] = shares[-1]
    style.describe(
        axis,
        "Above its line a method\nrewards keeping it",
        "pull of the other channels",
        "share that keeps the constraint",
    )
    return pulls[-1], ends


def draw_runs(axis) -> style.Ends:
    """What real runs logged as `credit`: means of their steps, with standard errors."""
    ends = {}
    for method in RUNS:
        shares, credits = batches(method)
        points = []
        for middle in np.linspace(0.1, 0.9, 5):
            near = np.abs(shares - middle) <= 0.1
            if near.sum() >= 5:
                error = credits[near].std() / math.sqrt(near.sum())
                points.append((shares[near].mean(), credits[near].mean(), error))
        x, y, errors = zip(*points, strict=True)
        axis.errorbar(x, y, errors, color=style.color(method), marker="o", markersize=3, capsize=2)
        ends[method] = y[-1]
    style.describe(
        axis,
        "Real runs: z-scores do so, too;\nthe raw sum does not",
        "share of a step's replies that keep it",
        "credit of the word limit",
    )
    return 0.9, ends


def batches(method: str, steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of the steps of the text study's runs: the share that keeps the limit, and its `credit`.

    Without those on reply-capped, where little pulls against it. steps: only runs of so many."""
    pairs = []
    for run in text.STUDY.read().values():
        counts = run["method"] == method and steps in (None, run["steps"])
        if counts and run["task"] != "reply-capped":
            logged = zip(run["train"]["short"], run["credit"]["short"], strict=True)
            pairs += [pair for pair in logged if None not in pair]  # kept by all, or by none
    shares, credits = np.transpose(pairs)
    return shares, credits


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{table()}\n\n{runs_table()}")
    path = ROOT / "docs" / "sign.png"
    figure(path)
    print(path)
