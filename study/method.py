"""docs/method.png: what the mean, the soft minimum and the minimum make of two rewards.

python study/method.py
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before matplotlib is imported: --help must not wait for it
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import math

import matplotlib.pyplot as plt
import numpy as np
import torch

import rvpo
from tools import style

ROOT = Path(__file__).parent.parent
PANELS = {
    "mean (GDPO)": 0.0,
    "beta 0.5": 0.5,
    "beta 2": 2.0,
    "beta 10": 10.0,
    "minimum": math.inf,
}
RANGE = 2.0  # standard deviations
EVEN = (0.0, 0.0)
NEGLECT = (-1.0, 1.5)  # the first reward is given up for the second


def scores(beta: float, points: np.ndarray) -> np.ndarray:
    """points (..., 2): two z-scores -> the soft minimum (...)."""
    return rvpo.soft_min(torch.from_numpy(points), beta).numpy()


def draw(axis, name: str, beta: float) -> None:
    line = np.linspace(-RANGE, RANGE, 161)
    grid = np.stack(np.meshgrid(line, line), axis=-1)  # (161, 161, 2)
    axis.contourf(line, line, scores(beta, grid), levels=np.linspace(-2.4, 2.4, 13), cmap="RdBu")
    axis.contour(line, line, scores(beta, grid), levels=[0.0], colors="black", linewidths=1.5)
    neglect, even = scores(beta, np.array([NEGLECT, EVEN]))
    axis.plot(*EVEN, "o", color="black", markersize=6)
    axis.plot(*NEGLECT, "X", color="black", markersize=7)
    sign = ">" if neglect > even else "<"
    axis.set_title(
        f"{name}\n✕ {neglect:+.2f} {sign} ● {even:+.2f}".replace("+0.00", "0"), fontsize=9
    )
    axis.set(aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    axis.tick_params(labelsize=8)


def main() -> None:
    figure, axes = plt.subplots(
        1, 5, figsize=(style.WIDTH, 2.35), sharey=True, layout="constrained"
    )
    for axis, (name, beta) in zip(axes, PANELS.items(), strict=True):
        draw(axis, name, beta)
    axes[0].set_ylabel("z-score of reward 2", fontsize=9)
    axes[2].set_xlabel("z-score of reward 1", fontsize=9)
    figure.suptitle(
        "The mean pays for giving one reward up (✕). A soft minimum does not.", fontsize=11
    )
    style.save(figure, ROOT / "docs" / "method.png")


if __name__ == "__main__":
    main()
