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
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from infra.ranks import InputError, run_program
from tools.runs import Run, read

TITLES = {"joint": "all channels satisfied (joint)", "grad_norm": "norm of the gradient"}
OF_TRAINING = "joint", "grad_norm"  # panels beside the channels
MARKS = {"best": "*", "final": "s"}  # matplotlib's markers


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", type=Path, help="the PNG (default: plot.png in the first run)")
    args = parser.parse_args(argv)
    if args.out and (args.out.suffix != ".png" or not args.out.parent.is_dir()):
        raise InputError(f"--out {args.out}: name a .png file in a directory that exists")
    data = {str(path): read_curves(path) for path in args.runs}
    out = args.out or args.runs[0] / "plot.png"
    plot(data, out)
    print_table(data)
    print(out)


def read_curves(path: Path) -> Run:
    """A run that has something to draw. Raises InputError."""
    run = read(path)
    if run.trains() and not run.steps:
        raise InputError(f"{path}/metrics.jsonl holds no training step yet")
    if any(line["step"] is None for line in run.evals):
        raise InputError(f"{path} is one evaluation: name runs of train.py or eval.py --policies")
    return run


def marked(run: Run) -> dict[str, tuple[int, float, float]]:
    """The points that are marked, if any. The best is the earliest of equal ones."""
    points = run.points(run.metric)
    if not points:
        return {}
    return {"best": max(points, key=lambda point: point[1]), "final": points[-1]}


def curve(run: Run, panel: str) -> list[float | None]:
    """Of each training step: a channel's mean, or another number of the log."""
    values = []
    for line in run.steps:
        channel = line["channels"].get(panel)
        values.append(channel["mean"] if channel else line.get(panel))
    return values


def print_table(data: dict[str, Run]) -> None:
    """Mean and standard error of held-out prompts, a line a run."""
    width = max(map(len, data))
    print(f"{'':{width}}  {'':>16}  {'start':>14}  {'best':>14}  (at step)  {'final':>14}")
    for name, run in data.items():
        start = best = final = at = "-"
        marks = marked(run)
        if marks:
            first, *_ = run.points(run.metric)
            start, best, final = map(cell, (first, marks["best"], marks["final"]))
            at, _, _ = marks["best"]
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
        raise InputError(
            f"{out} cannot be written ({error.strerror}): name another file with --out"
        ) from error


def draw(axis, panel: str, name: str, run: Run, color: str) -> None:
    """A run's line, its evaluations, and the marks of its policies."""
    steps = [line["step"] for line in run.steps]
    axis.plot(steps, curve(run, panel), color=color, linewidth=1.2, label=name)
    points = run.points(panel)
    if points:
        step, mean, error = zip(*points, strict=True)
        dots = "o" if run.steps else "o-"
        axis.errorbar(step, mean, error, color=color, fmt=dots, markersize=4, capsize=3)
    if panel == run.metric:
        for mark, (step, mean, _) in marked(run).items():
            axis.plot(step, mean, MARKS[mark], color=color, markersize=11, fillstyle="none")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
