"""What study.py makes of its runs: statistics, tables, the figure."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import toy

from tools.stats import holm, sign_flip, spread, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LONGER = "Three times as long"
Panel = dict[
    str, dict[str, list]
]  # row: column: runs, one a seed. `done` below is {run: what study.result returns}


def last(out: dict, name: str = "joint") -> float:
    """The mean of the last two evaluations."""
    return float(np.mean(out["eval"][name][-2:]))


def best(out: dict) -> float:
    """The best mean of two evaluations in a row, as `last` is one."""
    joint = np.array(out["eval"]["joint"])
    return float(((joint[1:] + joint[:-1]) / 2).max())


def shares(out: dict) -> dict[str, float]:
    """Each channel at the end, as a share of what satisfies it."""
    return {name: min(1.0, last(out, name) / full) for name, full in out["full"].items()}


def closed_credit(beta: float, channels: int, group: int, successes: int) -> tuple[float, float]:
    """Score of a rollout that succeeds, and of one that fails, in a channel of two values that `successes` of the group
    satisfy, while the other channels are constant (eps left out). The first is never above ln(K / (K-1)) / beta."""
    p = successes / group
    unit = math.sqrt(
        (group - 1) / group
    )  # z of a success is unit * sqrt((1-p) / p), the std being unbiased

    def score(z: float) -> float:
        return -math.log1p(math.expm1(-beta * z) / channels) / beta if beta else z / channels

    return score(unit * math.sqrt((1 - p) / p)), score(-unit * math.sqrt(p / (1 - p)))


def compare(panel: dict[str, list], done: dict, rates: dict, task: str) -> str:
    """A task's table: every aggregation, and rvpo against each of the others."""
    rows, finals = [], {m: [last(done[run]) for run in runs] for m, runs in panel.items()}
    p = {m: sign_flip(np.subtract(finals["rvpo"], finals[m])) for m in panel if m != "rvpo"}
    corrected = dict(zip(p, holm([*p.values()]), strict=True))
    for m, runs in panel.items():
        outs = [done[run] for run in runs]
        ends = {name: np.mean([shares(out)[name] for out in outs]) for name in outs[0]["full"]}
        worst = min(ends, key=ends.get)
        curves = np.array([out["eval"]["joint"] for out in outs])
        rows.append(
            [
                m,
                f"{rates[task, m]:g}",
                spread(finals[m]),
                f"{curves[:, (curves.shape[1] - 1) // 3].mean():.3f}",
                f"{worst} {ends[worst]:.2f}",
                f"{np.mean([[last(out, name) for name in ends] for out in outs]):.3f}",
                f"{sum(x >= 0.5 for x in finals[m])} of {len(outs)}",
                f"{np.mean(curves.max(1) - finals[m]):.3f}",
                *(
                    [
                        f"{np.mean(finals['rvpo']) - np.mean(finals[m]):+.3f}",
                        f"{p[m]:.4f}",
                        f"{corrected[m]:.3f}",
                    ]
                    if m in p
                    else ["", "", ""]
                ),
            ]
        )
    return table(
        "| aggregation | lr | joint rate ± sd | after a third | worst channel | mean reward | joint >= .5 "
        "| peak - final | rvpo - it | p | Holm's p |",
        rows,
    )


def report(done: dict, panels: dict[str, Panel], rates: dict, every: int) -> str:
    """study.md."""
    conflict = panels["Aggregation"]["conflict"]
    parts = {
        f"{task} (K = {len(toy.SUITE[task][0])})": compare(panel, done, rates, task)
        for task, panel in panels["Aggregation"].items()
    }
    for title, panel in [*panels.items()][1:]:
        if title == LONGER:
            continue
        columns = next(iter(panel.values()))
        parts[title] = table(
            "| joint rate | " + " | ".join(columns) + " |",
            (
                [str(row), *(spread([last(done[run]) for run in runs]) for runs in cells.values())]
                for row, cells in panel.items()
            ),
        )

    parts["Three times as long: conflict (best: of the means of two evaluations in a row)"] = table(
        "| aggregation | after 120 steps | after 360 | of each seed | best | best - final |",
        (
            [
                m,
                spread([last(done[run._replace(times=1)]) for run in runs]),
                spread([last(done[run]) for run in runs]),
                " ".join(f"{last(done[run]):.2f}" for run in runs),
                spread([best(done[run]) for run in runs]),
                f"{np.mean([best(done[run]) - last(done[run]) for run in runs]):.3f}",
            ]
            for m, runs in panels[LONGER]["conflict"].items()
        ),
    )

    def mean(method: str, *keys: str) -> np.ndarray:
        """Over the seeds of the conflict task that have the number."""
        values = [
            functools.reduce(lambda x, key: x[key], keys, done[run]) for run in conflict[method]
        ]
        return np.ma.masked_invalid(values).mean(0).filled(math.nan)

    noise = panels["Noise: no conflict, `safe` inverted at random"]
    parts["The same: soft-min weight of `safe` in rvpo (uniform: 0.17)"] = table(
        "| share | weight |",
        (
            [row, f"{np.mean([done[run]['weight']['safe'] for run in cells['rvpo']]):.2f}"]
            for row, cells in noise.items()
        ),
    )
    parts["mean - beta/2 * variance against the soft minimum, on rvpo's own Z (conflict)"] = table(
        "| beta | mean abs. soft-min | mean error | largest error | mean bound | largest error / bound |",
        (
            [beta, *(f"{x:.3f}" for x in mean("rvpo", "taylor", beta))]
            for beta in ("0.5", "1", "2", "5")
        ),
    )
    rows = []
    for m in conflict:
        binding = {name: mean(m, "binding", name) for name in done[conflict[m][0]]["full"]}
        ends = [max((shares[i], name) for name, shares in binding.items()) for i in (0, -1)]
        rows.append(
            [
                m,
                *(
                    f"{mean(m, x)[0]:.2f} → {mean(m, x)[-1]:.2f}"
                    for x in ("grad_norm", "advantage_std")
                ),
                " → ".join(f"{name} {share:.2f}" for share, name in ends),
                *("none" if math.isnan(x) else f"{x:+.2f}" for x in mean(m, "credit")),
            ]
        )
    parts[
        f"Over training (conflict): first and last {every} steps; mean advantage of one success, and "
        "of one failure, that is all that differs in its group"
    ] = table(
        "| aggregation | gradient norm | advantage std | binds most often, share | lone success | lone failure |",
        rows,
    )
    parts[
        "Score of one success, and of one failure, in 8 (closed form, the other channels constant)"
    ] = table(
        "| beta | K | success | its limit | failure |",
        (
            [
                f"{beta:g}",
                str(k),
                *(
                    f"{x:+.2f}"
                    for x in (
                        closed_credit(beta, k, 8, 1)[0],
                        math.log(k / (k - 1)) / beta,
                        closed_credit(beta, k, 8, 7)[1],
                    )
                ),
            ]
            for beta in (0.5, 2, 5)
            for k in (2, 9, 17)
        ),
    )
    return "\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def figure(done: dict, panels: dict[str, Panel], every: int, out: Path) -> None:
    """study.png. every: steps between evaluations."""
    conflict = panels["Aggregation"]["conflict"]
    drawn, axes = plt.subplots(2, 4, figsize=(15, 6.4), layout="constrained")
    colors = {m: f"C{i}" for i, m in enumerate(conflict)}

    def lines(axis, title: str, xlabel: str, drawn: dict[str, tuple], **options) -> None:
        """drawn: {label: (x, means)}."""
        for label, (x, y) in drawn.items():
            axis.plot(x, y, "o-", markersize=3, color=colors.get(label), label=label)
        axis.set(title=title, xlabel=xlabel, **options)
        axis.legend(fontsize=7)

    def over_training(value: Callable[[dict], list[float]], first: int) -> dict[str, tuple]:
        means = {m: np.mean([value(done[run]) for run in runs], 0) for m, runs in conflict.items()}
        return {
            m: (every * (first + np.arange(len(means[m]))), means[m])
            for m in ("rvpo", "gdpo", "grpo", "softmin")
        }

    def joint(panel: Panel, column: str) -> list[float]:
        return [np.mean([last(done[run]) for run in cells[column]]) for cells in panel.values()]

    for axis, (task, panel) in zip(axes[0], panels["Aggregation"].items(), strict=False):
        for i, (m, runs) in enumerate(panel.items()):
            values = [last(done[run]) for run in runs]
            axis.plot([i] * len(values), values, "o", color=colors[m], markersize=4, alpha=0.6)
            axis.plot([i - 0.3, i + 0.3], [np.mean(values)] * 2, color=colors[m], linewidth=2)
        axis.set(title=f"{task}: joint rate, a dot a seed", ylim=(-0.03, 1.03))
        axis.set_xticks(range(len(panel)), [*panel], rotation=40, ha="right", fontsize=8)
    lines(
        axes[0, 3],
        "conflict: length limit kept",
        "step",
        over_training(lambda x: x["eval"]["length14"], 0),
    )
    betas, noise = panels["Beta"], panels["Noise: no conflict, `safe` inverted at random"]
    lines(
        axes[1, 0],
        "rvpo: joint rate",
        "beta",
        {task: ([float(beta) for beta in betas], joint(betas, task)) for task in betas["2"]},
        xscale="log",
        ylim=(-0.03, 1.03),
    )
    lines(
        axes[1, 1],
        "no conflict, `safe` misjudged: joint rate",
        "share",
        {m: ([*noise], joint(noise, m)) for m in noise["0%"]},
        ylim=(-0.03, 1.03),
    )
    counts = range(1, 8)
    lines(
        axes[1, 2],
        "score at K = 9, G = 8 (closed form)",
        "rate of the channel",
        {
            f"beta {beta:g}, {'a failure' if i else 'a success'}": (
                [n / 8 for n in counts],
                [closed_credit(beta, 9, 8, n)[i] for n in counts],
            )
            for beta in (0, 2, 5)
            for i in (0, 1)
        },
    )
    lines(axes[1, 3], "conflict: gradient norm", "step", over_training(lambda x: x["grad_norm"], 1))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    drawn.savefig(out, dpi=90)
