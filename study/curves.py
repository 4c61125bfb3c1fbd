"""What the reports on language models read off their runs: numbers, tests, tables, curves.

A run is a line of a study's file. Its curves are means over the held-out prompts, one number an
evaluation.
"""

from pathlib import Path

import numpy as np
from matched import merit

from tools import style
from tools.stats import table

Cells = dict[str, list[dict]]  # method: the runs of its seeds


def curve(run: dict, channel: str) -> list[float]:
    means = []
    for evaluation in run["eval"]:
        mean, _ = evaluation[channel]
        means.append(mean)
    return means


def final(run: dict, channel: str = "joint") -> float:
    return curve(run, channel)[-1]


def best(run: dict, channel: str = "joint") -> float:
    """The best of the evaluations. It is chosen on the prompts that measure it: it is too good."""
    return max(curve(run, channel))


def channels(run: dict, *others: str) -> list[str]:
    """Names of what evaluations measure, without the joint rate and without others."""
    first, *_ = run["eval"]
    return [name for name in first if name not in ("step", "joint", *others)]


def worst_channel(runs: list[dict], *others: str) -> str:
    """The channel that is satisfied the least at the end, and how often, mean over seeds."""
    means = {}
    for channel in channels(runs[0], *others):
        means[channel] = np.mean([final(run, channel) for run in runs])
    worst = min(means, key=means.get)
    return f"{worst} {means[worst]:.2f}"


def differences(cells: Cells, baseline: str, channel: str) -> dict[str, list[float]]:
    """{method: at the end its channel less the baseline's, of each seed that both have}. Methods
    with one such seed or none are left out."""
    of_baseline = {run["seed"]: final(run, channel) for run in cells[baseline]}
    pairs = {}
    for method, runs in cells.items():
        of_seeds = []
        for run in runs:
            if run["seed"] in of_baseline:
                of_seeds.append(final(run, channel) - of_baseline[run["seed"]])
        if method != baseline and len(of_seeds) > 1:
            pairs[method] = of_seeds
    return pairs


def tuning(done: dict[str, dict], runs: dict[str, dict], channel: str) -> str:
    """The table of merits on the tuning seed. runs: {method: {learning rate: run}}."""
    rows = []
    for method, by_rate in runs.items():
        row = [method]
        for run in by_rate.values():
            run = done.get(run.name)
            row.append(f"{merit(run, channel):.3f}" if run else "")
        rows.append(row)
    return table("| | " + " | ".join(by_rate) + " |", rows)


def cost(done: dict[str, dict]) -> str:
    """The last line of the tables."""
    hours = sum(run["minutes"] for run in done.values()) / 60
    machines = {run["cpu"] for run in done.values()}
    machines = ", ".join(sorted(machines))
    in_half = sum(run.get("program") == "study/bfloat16.py" for run in done.values())
    return (
        f"{len(done)} runs, {hours:.1f} hours of training on one core each; {machines}. "
        f"In bfloat16 (study/bfloat16.py): {in_half}.\n"
    )


def figure(panels: dict[str, Cells], rows: dict[str, str], out: Path, height: float) -> None:
    """Held-out curves, a column a panel and a row a channel; thin lines are seeds.

    panels: {title: the methods that it shows}. rows: {channel: what it is}."""
    drawn, axes = style.panels(len(rows), len(panels), height, sharex="col", sharey=True)
    ends = []
    for column, (title, cells) in zip(axes.T, panels.items(), strict=True):
        for axis, channel in zip(column, rows, strict=True):
            ends.append((axis, draw(axis, cells, channel)))
        style.describe(column[0], title)
        style.describe(column[-1], x="step")
    for axis, name in zip(axes[:, 0], rows.values(), strict=True):
        axis.set(ylabel=name, ylim=(-0.03, 1.03))
    style.save(drawn, out, ends)


def draw(axis, cells: Cells, channel: str) -> style.Ends:
    ends = {}
    for method, runs in cells.items():
        if runs:
            steps = [evaluation["step"] for evaluation in runs[0]["eval"]]
            curves = [curve(run, channel) for run in runs]
            style.draw_seeds(axis, steps, curves, method)
            ends[method] = np.mean(curves, 0)[-1]
    return steps[-1], ends
