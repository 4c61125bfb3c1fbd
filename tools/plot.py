"""From one or more runs of train.py, or of eval.py --policies, to one PNG and a table of their best and final policies.

    python tools/plot.py runs/NAME [runs/OTHER ...] [--out FILE.png]

A run of train.py: every channel, the joint rate, gradient norm. One of eval.py --policies: every
metric of the benchmark. Lines: the sampled batches of training. Points with bars: held-out prompts,
mean and standard error.
The best and the final policy are those of the joint rate, or of the benchmark's first metric. The best of several is
chosen on the prompts that measure it: it is biased upwards, the more so the more there are.
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

TITLES = {"joint": "joint (all satisfied)", "grad_norm": "gradient norm"}
OF_TRAINING = "joint", "grad_norm"  # panels beside the channels
MARKS = {"best": "*", "final": "s"}  # matplotlib's markers


class Run(NamedTuple):
    steps: list[dict]  # training steps, none of eval.py
    evals: list[dict]  # {"step": N, "eval": {metric: (mean, standard error)}}
    metric: str  # by which the best is chosen

    def points(self, metric: str) -> list[tuple[int, float, float]]:
        """(step, mean, standard error) of each evaluation that has the metric; the error of one prompt is 0."""
        return [
            (line["step"], line["eval"][metric][0], line["eval"][metric][1] or 0.0)
            for line in self.evals
            if line["eval"].get(metric, [None])[0] is not None
        ]

    def marked(self) -> dict[str, tuple[int, float, float]]:
        """The points that are marked, {} without evaluations. The best is the earliest of equal ones."""
        points = self.points(self.metric)
        return (
            {"best": max(points, key=lambda point: point[1]), "final": points[-1]} if points else {}
        )


def read_policies(folders: list[Path]) -> Run:
    """Of the step-N that eval.py --policies has written, each with a results.json."""
    evals = []
    for folder in folders:
        try:
            metrics = json.loads((folder / "results.json").read_text())["metrics"]
            evals.append(
                {
                    "step": int(folder.name.removeprefix("step-")),
                    "eval": {
                        name: (values["mean"], values["stderr"]) for name, values in metrics.items()
                    },
                }
            )
            if not metrics:
                raise ValueError("it has no metric")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            sys.exit(f"error: {folder / 'results.json'} cannot be read: {error}")
    evals.sort(key=lambda line: line["step"])
    return Run([], evals, next(iter(evals[0]["eval"])))


def read(run: Path) -> Run:
    """Of a run's metrics.jsonl, or of its step-N if it is one of eval.py --policies."""
    if folders := [*run.glob("step-*")]:
        return read_policies(folders)
    if not (run / "metrics.jsonl").is_file():
        sys.exit(
            f"error: {run}: no run is there; name the directory of a run of train.py, or of "
            "eval.py --policies"
        )
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {run / 'metrics.jsonl'} cannot be read: {error}")
    if not any("channels" in line for line in lines):
        sys.exit(f"error: {run / 'metrics.jsonl'} holds no training step yet")
    return Run(
        [line for line in lines if "channels" in line],
        [line for line in lines if "eval" in line],
        "joint",
    )


def print_table(data: dict[str, Run]) -> None:
    """Mean and standard error of held-out prompts, a line a run."""
    width = max(map(len, data))
    print(f"{'':{width}}  {'':>16}  {'start':>14}  {'best':>14}  (at step)  {'final':>14}")
    for name, run in data.items():
        start, best, final = (
            [run.points(run.metric)[0], *run.marked().values()] if run.marked() else [None] * 3
        )
        cells = [
            f"{point[1]:.3f} ({point[2]:.3f})" if point else "-" for point in (start, best, final)
        ]
        print(
            f"{name:{width}}  {run.metric:>16}  {cells[0]:>14}  {cells[1]:>14}  {best[0] if best else '-':>9}  "
            f"{cells[2]:>14}"
        )


def plot(data: dict[str, Run], out: Path) -> None:
    """data: {what the legend says: run}."""
    channels = list(
        dict.fromkeys(
            name for run in data.values() for line in run.steps for name in line["channels"]
        )
    )
    measured = [
        name
        for run in data.values()
        if not run.steps
        for line in run.evals
        for name in line["eval"]
    ]
    trained = OF_TRAINING if channels else ()
    panels = list(dict.fromkeys([*channels, *trained, *measured]))
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
        for color, (name, run) in enumerate(data.items()):
            means = [
                {name: stats["mean"] for name, stats in line["channels"].items()}
                for line in run.steps
            ]
            values = [
                {**line, **mean}.get(panel) for line, mean in zip(run.steps, means, strict=True)
            ]
            axis.plot(
                [line["step"] for line in run.steps],
                values,
                color=f"C{color}",
                linewidth=1.2,
                label=name,
            )
            if points := run.points(panel):
                step, mean, error = zip(*points, strict=True)
                axis.errorbar(
                    step,
                    mean,
                    error,
                    color=f"C{color}",
                    fmt="o" if run.steps else "o-",
                    markersize=4,
                    capsize=3,
                )
            for mark, (step, mean, _) in run.marked().items() if panel == run.metric else ():
                axis.plot(
                    step, mean, MARKS[mark], color=f"C{color}", markersize=11, fillstyle="none"
                )
        low, high = axis.get_ylim()
        if panel not in OF_TRAINING[1:] and low > -0.2 and high < 1.2:
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
