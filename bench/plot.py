"""From the metrics.jsonl of one or more runs to one PNG: every channel, the joint rate, gradient norm, advantage std.

    python bench/plot.py runs/NAME [runs/OTHER ...] [--out FILE.png]

Lines: the sampled batches of training. Points with bars: held-out prompts, mean and standard error.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLES = {"joint": "joint (all satisfied)", "grad_norm": "gradient norm", "advantage_std": "advantage std"}


def read(run: Path) -> tuple[list[dict], list[dict]]:
    """(training steps, evaluations) of a run's metrics.jsonl."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {run / 'metrics.jsonl'} cannot be read: {error}")
    if not any("channels" in line for line in lines):
        sys.exit(f"error: {run / 'metrics.jsonl'} holds no training step yet")
    return [line for line in lines if "channels" in line], [line for line in lines if "eval" in line]


def plot(runs: list[Path], out: Path) -> None:
    data = {str(run): read(run) for run in runs}
    channels = list(dict.fromkeys(name for steps, _ in data.values() for line in steps for name in line["channels"]))
    panels = [*channels, "joint", "grad_norm", "advantage_std"]
    columns = min(5, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.3 * rows), squeeze=False, sharex=True,
                                layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for color, (name, (steps, evals)) in enumerate(data.items()):
            means = [{name: stats["mean"] for name, stats in line["channels"].items()} for line in steps]
            values = [{**line, **mean}.get(panel) for line, mean in zip(steps, means, strict=True)]
            axis.plot([line["step"] for line in steps], values, color=f"C{color}", linewidth=1.2, label=name)
            points = [(line["step"], *line["eval"][panel]) for line in evals if panel in line["eval"]]
            if points:
                step, mean, error = zip(*points, strict=True)
                axis.errorbar(step, mean, [e or 0 for e in error], color=f"C{color}", fmt="o", markersize=4, capsize=3)
        low, high = axis.get_ylim()
        if panel in [*channels, "joint"] and low > -0.2 and high < 1.2:
            axis.set_ylim(-0.03, 1.03)
        axis.set_title(TITLES.get(panel, panel), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    if len(runs) > 1:
        axes[0, 0].legend(fontsize=7)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", type=Path, help="the PNG (default: plot.png in the first run)")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "plot.png"
    if out.suffix != ".png" or not out.parent.is_dir():
        sys.exit(f"error: --out {out}: name a .png file in a directory that exists")
    plot(args.runs, out)
    print(out)
