"""How figures look: a method has one colour, one name and one place in the order, in all of them."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which people who are colour-blind tell apart.
COLORS = {
    "rvpo": "#0072B2",
    "gdpo": "#D55E00",
    "grpo": "#009E73",
    "explicit": "#56B4E9",
    "hardmin": "#000000",
    "softmin": "#CC79A7",
}
WIDTH = 8.0  # inches: 800 pixels at DPI, the width of a page on GitHub
DPI = 100


def color(method: str) -> str:
    """Of a method, whatever its settings: "rvpo 10" is a shade of rvpo's."""
    return COLORS.get(method.split()[0], "#999999")


def label_end(
    axis, x: list[float], y: list[float], text: str, method: str, shift: float = 0.0
) -> None:
    """Names a line at its right end, in its colour, in place of a legend. shift: upwards, in points."""
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


def save(figure, file) -> None:
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
