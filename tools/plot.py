"""From runs of train.py, or of eval.py --policies, to one PNG and a table of their policies.

    python tools/plot.py runs/NAME [runs/OTHER ...] [--out FILE.png]

A run of train.py: every channel, the joint rate, the gradient norm. One of eval.py --policies:
every metric of the benchmark. Lines: the sampled batches of training. Points with bars: held-out
prompts, mean and standard error.

The best and the final policy are those of the joint rate, or of the benchmark's first metric. The
best of several is chosen on the prompts that measure it: it is biased upwards, the more so the more
there are.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLES = {"joint": "all channels satisfied (joint)", "grad_norm": "norm of the gradient"}
OF_TRAINING = "joint", "grad_norm"  # panels beside the channels
MARKS = {"best": "*", "final": "s"}  # matplotlib's markers


class Run(NamedTuple):
    steps: list[dict]  # training steps, none of eval.py
    evals: list[dict]  # {"step": N, "eval": {metric: (mean, standard error)}}
    metric: str  # by which the best is chosen

    def points(self, metric: str) -> list[tuple[int, float, float]]:
        """(step, mean, standard error) of each evaluation that has the metric.

        The error of a single prompt is 0."""
        points = []
        for line in self.evals:
            mean, error = line["eval"].get(metric, (None, None))
            if mean is not None:
                points.append((line["step"], mean, error or 0.0))
        return points

    def marked(self) -> dict[str, tuple[int, float, float]]:
        """The points that are marked, if any. The best is the earliest of equal ones."""
        points = self.points(self.metric)
        if not points:
            return {}
        return {"best": max(points, key=lambda point: point[1]), "final": points[-1]}

    def curve(self, panel: str) -> list[float | None]:
        """Of each training step: a channel's mean, or another number of the log."""
        values = []
        for line in self.steps:
            channel = line["channels"].get(panel)
            values.append(channel["mean"] if channel else line.get(panel))
        return values


def read_policies(folders: list[Path]) -> Run:
    """Of the step-N that eval.py --policies has written, each with a results.json."""
    evals = []
    for folder in folders:
        file = folder / "results.json"
        try:
            step = int(folder.name.removeprefix("step-"))
            metrics = json.loads(file.read_text())["metrics"]
            means = {name: (values["mean"], values["stderr"]) for name, values in metrics.items()}
            if not means:
                raise ValueError("it has no metric")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            sys.exit(f"error: {file} cannot be read: {error}")
        evals.append({"step": step, "eval": means})
    evals.sort(key=lambda line: line["step"])
    return Run([], evals, next(iter(evals[0]["eval"])))


def read(run: Path) -> Run:
    """Of a run's metrics.jsonl, or of its step-N if it is one of eval.py --policies."""
    folders = [*run.glob("step-*")]
    if folders:
        return read_policies(folders)
    file = run / "metrics.jsonl"
    if not file.is_file():
        sys.exit(
            f"error: {run}: no run is there; name the directory of a run of train.py, or of "
            "eval.py --policies"
        )
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {file} cannot be read: {error}")
    steps = [line for line in lines if "channels" in line]
    if not steps:
        sys.exit(f"error: {file} holds no training step yet")
    return Run(steps, [line for line in lines if "eval" in line], "joint")


def print_table(data: dict[str, Run]) -> None:
    """Mean and standard error of held-out prompts, a line a run."""
    width = max(map(len, data))
    print(f"{'':{width}}  {'':>16}  {'start':>14}  {'best':>14}  (at step)  {'final':>14}")
    for name, run in data.items():
        start = best = final = at = "-"
        marked = run.marked()
        if marked:
            first, *_ = run.points(run.metric)
            start, best, final = map(cell, (first, marked["best"], marked["final"]))
            at, _, _ = marked["best"]
        print(f"{name:{width}}  {run.metric:>16}  {start:>14}  {best:>14}  {at:>9}  {final:>14}")


def cell(point: tuple[int, float, float]) -> str:
    _, mean, error = point
    return f"{mean:.3f} ({error:.3f})"


def panels_of(data: dict[str, Run]) -> list[str]:
    """Channels, what train.py logs beside them, and what only a benchmark measures."""
    channels, measured = {}, {}  # as ordered sets
    for run in data.values():
        for line in run.steps:
            channels |= dict.fromkeys(line["channels"])
        if not run.steps:
            for line in run.evals:
                measured |= dict.fromkeys(line["eval"])
    trained = dict.fromkeys(OF_TRAINING if channels else ())
    return [*(channels | trained | measured)]


def plot(data: dict[str, Run], out: Path) -> None:
    """data: {what the legend says: run}."""
    panels = panels_of(data)
    columns = min(5, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.6 * columns, 2.3 * rows),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for place, (name, run) in enumerate(data.items()):
            draw(axis, panel, name, run, f"C{place}")
        low, high = axis.get_ylim()
        if panel != "grad_norm" and low > -0.2 and high < 1.2:
            axis.set_ylim(-0.03, 1.03)
        axis.set_title(TITLES.get(panel, panel), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("step (star: the best held-out evaluation, square: the final one)", fontsize=9)
    if len(data) > 1:
        axes[0, 0].legend(fontsize=7)
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        sys.exit(f"error: {out} cannot be written ({error.strerror}): name another file with --out")


def draw(axis, panel: str, name: str, run: Run, color: str) -> None:
    """A run's line, its evaluations, and the marks of its policies."""
    steps = [line["step"] for line in run.steps]
    axis.plot(steps, run.curve(panel), color=color, linewidth=1.2, label=name)
    points = run.points(panel)
    if points:
        step, mean, error = zip(*points, strict=True)
        dots = "o" if run.steps else "o-"
        axis.errorbar(step, mean, error, color=color, fmt=dots, markersize=4, capsize=3)
    if panel == run.metric:
        for mark, (step, mean, _) in run.marked().items():
            axis.plot(step, mean, MARKS[mark], color=color, markersize=11, fillstyle="none")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # as in train.py
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", type=Path, help="the PNG (default: plot.png in the first run)")
    args = parser.parse_args()
    if args.out and (args.out.suffix != ".png" or not args.out.parent.is_dir()):
        sys.exit(f"error: --out {args.out}: name a .png file in a directory that exists")
    data = {str(run): read(run) for run in args.runs}
    out = args.out or args.runs[0] / "plot.png"
    plot(data, out)
    print_table(data)
    print(out)
