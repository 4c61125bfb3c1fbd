"""What study.py makes of its results: tables, and the figure. It trains and chooses nothing.

A result is what study.result returns of one run: its curves, by name.
"""

import math
from pathlib import Path

import numpy as np
import toy

from tools import style
from tools.stats import sign_flips, spread, table

Cells = dict[str, list[dict]]  # method, or another column: results, one a seed
Panel = dict[str, Cells]  # row: cells

# Titles of the panels that have tables of their own, or a place in the figure.
AGGREGATION = "Aggregation"
BETA = "Beta"
NOISE = "Noise: no conflict, `safe` inverted at random"
LONGER = "Three times as long"


# What is read off one result, or off those of all seeds


def last(result: dict, name: str = "joint") -> float:
    """The mean of the last two evaluations."""
    return float(np.mean(result["eval"][name][-2:]))


def best(result: dict) -> float:
    """The best mean of two evaluations in a row, as `last` is one."""
    joint = np.array(result["eval"]["joint"])
    return float(((joint[1:] + joint[:-1]) / 2).max())


def shares(result: dict) -> dict[str, float]:
    """Each channel at the end, as a share of what satisfies it."""
    return {name: min(1.0, last(result, name) / full) for name, full in result["full"].items()}


def mean_reward(result: dict) -> float:
    """Of all channels at the end."""
    return np.mean([last(result, name) for name in result["full"]])


def lasts(results: list[dict]) -> list[float]:
    """Of each seed, the joint rate at the end."""
    return [last(result) for result in results]


def after_a_third(results: list[dict]) -> float:
    """The joint rate when a third of the steps is done, mean over seeds."""
    curves = np.array([result["eval"]["joint"] for result in results])  # (seeds, evaluations)
    return curves[:, (curves.shape[1] - 1) // 3].mean()


def worst_channel(results: list[dict]) -> str:
    """The channel that is the farthest from satisfied at the end, and its share; means of seeds."""
    of_seeds = [shares(result) for result in results]
    means = {}
    for name in of_seeds[0]:
        means[name] = np.mean([seed[name] for seed in of_seeds])
    worst = min(means, key=means.get)
    return f"{worst} {means[worst]:.2f}"


def against_rvpo(rvpo: list[float], others: dict[str, list[float]]) -> dict[str, list[str]]:
    """{method: [rvpo - it, p, Holm's p]}, paired by seed, corrected over these methods."""
    differences = {method: np.subtract(rvpo, values) for method, values in others.items()}
    return {
        method: [f"{np.mean(differences[method]):+.3f}", f"{p:.4f}", f"{corrected:.3f}"]
        for method, (p, corrected) in sign_flips(differences).items()
    }


def closed_credit(beta: float, channels: int, group: int, successes: int) -> tuple[float, float]:
    """Scores of a rollout that succeeds, and of one that fails, in a channel of two values.

    `successes` of the group satisfy it, and the other channels are constant (eps is left out).
    The first score is never above ln(K / (K-1)) / beta."""
    p = successes / group
    unit = math.sqrt((group - 1) / group)  # the std is unbiased

    def score(z: float) -> float:
        if beta == 0:
            return z / channels
        return -math.log1p(math.expm1(-beta * z) / channels) / beta

    return score(unit * math.sqrt((1 - p) / p)), score(-unit * math.sqrt(p / (1 - p)))


# The tables


def report(panels: dict[str, Panel], rates: dict[tuple[str, str], float], every: int) -> str:
    """study.md. rates: {(task, method): learning rate}; every: steps between evaluations."""
    conflict = panels[AGGREGATION]["conflict"]
    tables = {}
    for task, cells in panels[AGGREGATION].items():
        tables[f"{task} (K = {len(toy.SUITE[task][0])})"] = compare(cells, rates, task)
    for title, panel in panels.items():
        if title not in (AGGREGATION, LONGER):
            tables[title] = joint_rates(panel)
    tables |= {
        "Three times as long: conflict (best: of the means of two evaluations in a row)": longer(
            conflict, panels[LONGER]["conflict"]
        ),
        "The same: soft-min weight of `safe` in rvpo (uniform: 0.17)": weights(panels[NOISE]),
        "mean - beta/2 * variance against the soft minimum, on rvpo's own Z (conflict)": (
            taylor_errors(conflict["rvpo"])
        ),
        f"Over training (conflict): first and last {every} steps; mean advantage of one success, "
        "and of one failure, that is all that differs in its group": over_training(conflict),
        "Score of one success, and of one failure, in 8 (closed form, the other channels "
        "constant)": closed_form(),
    }
    return "\n".join(f"## {title}\n\n{text}" for title, text in tables.items())


def compare(cells: Cells, rates: dict[tuple[str, str], float], task: str) -> str:
    """A task's table: every aggregation, and rvpo against each of the others."""
    finals = {method: lasts(results) for method, results in cells.items()}
    others = {method: values for method, values in finals.items() if method != "rvpo"}
    tests = against_rvpo(finals["rvpo"], others)
    rows = []
    for method, results in cells.items():
        final = finals[method]
        peaks = [max(result["eval"]["joint"]) for result in results]
        rewards = [mean_reward(result) for result in results]
        rows.append(
            [
                method,
                f"{rates[task, method]:g}",
                spread(final),
                f"{after_a_third(results):.3f}",
                worst_channel(results),
                f"{np.mean(rewards):.3f}",
                f"{sum(rate >= 0.5 for rate in final)} of {len(results)}",
                f"{np.mean(np.subtract(peaks, final)):.3f}",
                *tests.get(method, ["", "", ""]),
            ]
        )
    return table(
        "| aggregation | lr | joint rate ± sd | after a third | worst channel | mean reward "
        "| joint >= .5 | peak - final | rvpo - it | p | Holm's p |",
        rows,
    )


def joint_rates(panel: Panel) -> str:
    """The table of a panel."""
    rows = []
    for row, cells in panel.items():
        rows.append([row, *(spread(lasts(results)) for results in cells.values())])
    columns = next(iter(panel.values()))
    return table("| joint rate | " + " | ".join(columns) + " |", rows)


def longer(short: Cells, long: Cells) -> str:
    """Runs of 120 steps, and the same ones three times as long."""
    rows = []
    for method, results in long.items():
        finals = lasts(results)
        peaks = [best(result) for result in results]
        rows.append(
            [
                method,
                spread(lasts(short[method])),
                spread(finals),
                " ".join(f"{rate:.2f}" for rate in finals),
                spread(peaks),
                f"{np.mean(np.subtract(peaks, finals)):.3f}",
            ]
        )
    return table(
        "| aggregation | after 120 steps | after 360 | of each seed | best | best - final |", rows
    )


def weights(noise: Panel) -> str:
    """How much of rvpo's soft-min weight the misjudged channel has."""
    rows = []
    for share, cells in noise.items():
        weight = np.mean([result["weight"]["safe"] for result in cells["rvpo"]])
        rows.append([share, f"{weight:.2f}"])
    return table("| share | weight |", rows)


def mean_of_known(values: list[list[float]]) -> np.ndarray:
    """(seeds, N) -> (N,): means over the seeds that have the number; NaN if none has."""
    return np.ma.masked_invalid(values).mean(0).filled(math.nan)


def taylor_errors(results: list[dict]) -> str:
    """study.taylor's numbers, over seeds."""
    rows = []
    for beta in results[0]["taylor"]:
        means = mean_of_known([result["taylor"][beta] for result in results])
        rows.append([beta, *(f"{mean:.3f}" for mean in means)])
    return table(
        "| beta | mean abs. soft-min | mean error | largest error | mean bound "
        "| largest error / bound |",
        rows,
    )


def over_training(cells: Cells) -> str:
    """Norms, what binds, and the credit of one success or failure, by method."""
    rows = []
    for method, results in cells.items():
        changes = []
        for key in ("grad_norm", "advantage_std"):
            means = mean_of_known([result[key] for result in results])
            changes.append(f"{means[0]:.2f} → {means[-1]:.2f}")
        credits = mean_of_known([result["credit"] for result in results])
        rows.append(
            [
                method,
                *changes,
                f"{most_binding(results, 0)} → {most_binding(results, -1)}",
                *("none" if math.isnan(credit) else f"{credit:+.2f}" for credit in credits),
            ]
        )
    return table(
        "| aggregation | gradient norm | advantage std | binds most often, share | lone success "
        "| lone failure |",
        rows,
    )


def most_binding(results: list[dict], place: int) -> str:
    """The channel that is most often the smallest at that place of the curve, and how often."""
    binding = {}
    for name in results[0]["full"]:
        binding[name] = mean_of_known([result["binding"][name] for result in results])[place]
    share, name = max((share, name) for name, share in binding.items())
    return f"{name} {share:.2f}"


def closed_form() -> str:
    rows = []
    for beta in (0.5, 2, 5):
        for channels in (2, 9, 17):
            success, _ = closed_credit(beta, channels, 8, 1)
            _, failure = closed_credit(beta, channels, 8, 7)
            limit = math.log(channels / (channels - 1)) / beta
            scores = [f"{score:+.2f}" for score in (success, limit, failure)]
            rows.append([f"{beta:g}", str(channels), *scores])
    return table("| beta | K | success | its limit | failure |", rows)


# The figure. Titles say what the committed runs show: look again when others are drawn.

FINDINGS = {
    "conflict": "Conflict: gdpo fails,\nsoft minima do not",
    "no conflict": "No conflict: all but\nexplicit learn it",
    "precision": "Precision: z-scores fail,\nlevels do not",
}


def figure(panels: dict[str, Panel], every: int, out: Path) -> None:
    """study.png. every: steps between evaluations."""
    drawn, axes = style.panels(2, 3, 6.2, sharey=True)
    for axis, (task, title) in zip(axes[0], FINDINGS.items(), strict=True):
        draw_task(axis, panels[AGGREGATION][task])
        style.describe(axis, title, y="joint rate, a dot a seed")
    limit, beta, noise = axes[1]
    draw_betas(beta, panels[BETA])
    ends = [
        (limit, draw_limit(limit, panels[AGGREGATION]["conflict"], every)),
        (noise, draw_noise(noise, panels[NOISE])),
    ]
    limit.set_ylim(-0.03, 1.03)
    style.save(drawn, out, ends)


def draw_task(axis, cells: Cells) -> None:
    """The joint rate of each seed, and a bar at their mean, by method."""
    for place, (method, results) in enumerate(cells.items()):
        color, finals = style.color(method), lasts(results)
        axis.plot([place] * len(finals), finals, "o", color=color, markersize=4, alpha=0.6)
        mean = np.mean(finals)
        axis.plot([place - 0.3, place + 0.3], [mean, mean], color=color, linewidth=2)
    axis.set_xticks(range(len(cells)), [*cells], rotation=40, ha="right")


def draw_limit(axis, cells: Cells, every: int) -> style.Ends:
    """How many held-out answers keep the length limit, over training; thin lines are seeds."""
    ends = {}
    for method in ("rvpo", "gdpo", "grpo", "softmin"):
        curves = np.array([result["eval"]["length14"] for result in cells[method]])
        steps = every * np.arange(curves.shape[1])
        style.draw_seeds(axis, steps, curves, method)
        ends[method] = curves[:, -1].mean()
    style.describe(
        axis, "Conflict: gdpo gives the\nlength limit up", "step", "answers that keep the limit"
    )
    return steps[-1], ends


def draw_betas(axis, panel: Panel) -> None:
    """rvpo's joint rate by beta: a dot a seed, a line for the mean."""
    betas = [float(beta) for beta in panel]
    for task, dashes in (("conflict", "-"), ("no conflict", "--")):
        rates = np.array([lasts(cells[task]) for cells in panel.values()])  # (betas, seeds)
        style.draw_line(axis, betas, rates.mean(1), "rvpo", linestyle=dashes)
        axis.plot(betas, rates, "o", color=style.color("rvpo"), markersize=3, alpha=0.5)
        below = betas[1], rates[1].mean()
        axis.annotate(task, below, (4, -11), textcoords="offset points", fontsize=9)
    axis.set_xscale("log")
    style.describe(axis, "rvpo: a beta from 1 to 10\nresolves the conflict", "beta", "joint rate")


def draw_noise(axis, panel: Panel) -> style.Ends:
    """Joint rate by the share of wrong judgements; thin lines are seeds."""
    ends = {}
    for method in panel["0%"]:
        rates = np.array([lasts(cells[method]) for cells in panel.values()])  # (shares, seeds)
        style.draw_seeds(axis, range(len(panel)), rates.T, method)
        ends[method] = rates[-1].mean()
    axis.set_xticks(range(len(panel)), [*panel])
    style.describe(
        axis, "A wrong judge hurts\nsoftmin the most", "judgements inverted", "joint rate"
    )
    return len(panel) - 1, ends
