"""How figures look: a method has one colour, one name and one place in the order."""

from collections.abc import Iterable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's colours, which people who are colour-blind tell apart.
COLORS = {
    "rvpo": "#0072B2",
    "gdpo": "#D55E00",
    "grpo": "#009E73",
    "explicit": "#56B4E9",
    "hardmin": "#000000",
    "softmin": "#CC79A7",
}
DASHES = {"rvpo 10": "--", "rvpo 0.5:2": ":"}  # beside rvpo with beta 2
WIDTH = 8.0  # inches: 800 pixels at DPI, the width of a page on GitHub
DPI = 100
LINE_HEIGHT = 10.0  # points between two names at the right end of a panel


def color(method: str) -> str:
    """Of a method, whatever its settings: "rvpo 10" has rvpo's."""
    return COLORS.get(method.split()[0], "#999999")


def panels(rows: int, columns: int, height: float, **options):
    """A figure, `height` inches high, and its axes, as plt.subplots gives them."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), layout="constrained", **options
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)  # the names of lines stand there
    return figure, axes


def describe(axis, title: str = "", x: str = "", y: str = "") -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def draw_line(axis, x, y, method: str, **options) -> None:
    """A line in the colour and the dashes of its method."""
    options = {"color": color(method), "linestyle": DASHES.get(method, "-")} | options
    axis.plot(x, y, **options)


def draw_seeds(axis, x, curves, method: str) -> None:
    """A thin line for each seed, and a thick one for their mean. curves: (seeds, points)."""
    if len(curves) > 1:
        for curve in curves:
            draw_line(axis, x, curve, method, linewidth=0.6, alpha=0.35)
    draw_line(axis, x, np.mean(curves, 0), method, linewidth=1.8)


def label_end(
    axis, x: list[float], y: list[float], text: str, method: str, shift: float = 0.0
) -> None:
    """Names a line at its right end, in its colour. shift: upwards, in points."""
    axis.annotate(
        text,
        (x[-1], y[-1]),
        xytext=(5, shift),
        textcoords="offset points",
        color=color(method),
        fontsize=9,
        va="center",
        annotation_clip=False,
    )


def label_ends(axis, x: float, ends: dict[str, float]) -> None:
    """Names the lines of a panel that end at x, none above another. ends: {method: its last value}.

    Call it when the panel has its limits and its size."""
    methods = sorted(ends, key=ends.get)
    heights = [axis.transData.transform((x, ends[method]))[1] for method in methods]
    heights = np.array(heights) * 72 / axis.figure.dpi  # points
    places = heights.copy()
    for _ in range(100):  # names that are too close push each other apart
        push = np.maximum(LINE_HEIGHT - np.diff(places), 0) / 2
        places[1:] += push
        places[:-1] -= push
    for method, shift in zip(methods, places - heights, strict=True):
        label_end(axis, [x], [ends[method]], method, method, shift)


Ends = tuple[float, dict[str, float]]  # of a panel's lines: x, and {method: y}


def save(figure, file, ends: Iterable[tuple[plt.Axes, Ends]] = ()) -> None:
    """ends: of each panel whose lines are to be named at their ends."""
    figure.canvas.draw()  # the panels get their sizes
    for axis, (x, values) in ends:
        label_ends(axis, x, values)
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
