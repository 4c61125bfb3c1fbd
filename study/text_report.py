"""The tables of docs/text.md, below its marker, and docs/text.png, from the runs in study/text.jsonl:

python study/text_report.py
"""

import argparse
import itertools
import sys
from pathlib import Path

if __name__ == "__main__":  # before numpy is imported: --help must not wait for it
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import matplotlib
import numpy as np
from text import GRID, LONG, METHODS, STEPS, TUNED, TUNING, Run, merit, read

from tools.stats import holm, sign_flip, spread, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
MARK = "<!-- below: python study/text_report.py -->\n"
Cells = dict[str, list[dict]]  # method: the runs of its seeds


def of(done: dict[str, dict], task: str, steps: int = STEPS, schedule: str = "constant") -> Cells:
    """The runs that count, not those that chose a rate."""
    return {
        method: [
            run
            for run in done.values()
            if (run["task"], run["method"], run["steps"], run["schedule"])
            == (task, method, steps, schedule)
            and run["seed"] != TUNING
        ]
        for method in METHODS
    }


def final(run: dict, channel: str = "joint") -> float:
    return run["eval"][-1][channel][0]


def best(run: dict) -> float:
    """The best of the evaluations: chosen on the prompts that it is measured on, so it is too good."""
    return max(x["joint"][0] for x in run["eval"])


def lost(run: dict) -> str:
    """The first step whose rollouts keep the limit in less than half."""
    return str(
        next((i for i, share in enumerate(run["train"]["short"], 1) if share < 0.5), "never")
    )


def rows(cells: Cells) -> list[list[str]]:
    """A row a method. p: of its final joint rate against rvpo's, by the exact sign-flip test over the seeds that both
    have; Holm: corrected over the methods of the table."""
    rvpo = {run["seed"]: final(run) for run in cells["rvpo"]}
    p = {}
    for method, runs in cells.items():
        pairs = [final(run) - rvpo[run["seed"]] for run in runs if run["seed"] in rvpo]
        if method != "rvpo" and len(pairs) > 1:
            p[method] = sign_flip(pairs)
    corrected = dict(zip(p, holm([*p.values()]), strict=True))
    out = []
    for method, runs in cells.items():
        if runs:
            names = [name for name in runs[0]["eval"][0] if name not in ("step", "joint")]
            worst = min(names, key=lambda name: np.mean([final(run, name) for run in runs]))
            out.append(
                [
                    method,
                    runs[0]["lr"],
                    str(len(runs)),
                    spread([run["eval"][0]["short"][0] for run in runs]),
                    spread([*map(best, runs)]),
                    spread([*map(final, runs)]),
                    spread([final(run, "short") for run in runs]),
                    ", ".join(map(lost, runs)),
                    f"{worst} {np.mean([final(run, worst) for run in runs]):.2f}",
                    f"{p[method]:.3f}, {corrected[method]:.3f}" if method in p else "",
                ]
            )
    return out


HEAD = (
    "| | lr | n | kept at first | joint, best | joint, final | kept at the end | under half at step | "
    "worst channel at the end | p, Holm |"
)
SHARES = 1.0, 0.8, 0.65, 0.5, 0.25, 0.0


def credits(done: dict[str, dict]) -> list[list[str]]:
    """Of all steps of a method: mean `credit` of the limit by the share of the rollouts that kept it, with the number
    of steps; and how the advantage went with length among those that did."""
    out = []
    for method in METHODS:
        runs = [
            run
            for run in done.values()
            if run["method"] == method and run["task"] != "reply-capped"
        ]
        steps = [
            pair
            for run in runs
            for pair in zip(run["train"]["short"], run["credit"]["short"], strict=True)
        ]
        cells = []
        for high, low in itertools.pairwise(SHARES):
            found = [
                credit for share, credit in steps if low <= share < high and credit is not None
            ]
            cells.append(f"{np.mean(found):+.2f} ({len(found)})" if found else "")
        if runs:
            out.append(
                [
                    method,
                    *cells,
                    f"{np.mean([x for run in runs for x in run['longer'] if x is not None]):+.2f}",
                ]
            )
    return out


def report(done: dict[str, dict]) -> str:
    tuning = []
    for method in [method for method in METHODS if method not in TUNED]:
        names = [Run("reply", method, lr, TUNING).name for lr in GRID]
        tuning.append(
            [method, *(f"{merit(done[name]):.3f}" if name in done else "" for name in names)]
        )
    parts = [
        "Learning rates: the held-out joint rate on the tuning seed, mean of the evaluations of a run\n\n"
        + table("| | " + " | ".join(GRID) + " |", tuning)
    ]
    for title, cells in (
        ("reply: at most 35 words", of(done, "reply")),
        ("reply-capped: no reward goes on beyond what satisfies it", of(done, "reply-capped")),
        ("reply-25: at most 25 words", of(done, "reply-25")),
        (f"reply, {LONG} steps", of(done, "reply", LONG)),
        (f"reply-capped, {LONG} steps", of(done, "reply-capped", LONG)),
        ("reply, learning rate falling to 0", of(done, "reply", STEPS, "linear")),
    ):
        if any(cells.values()):
            parts.append(f"{title}\n\n{table(HEAD, rows(cells))}")
    parts.append(
        "What an update did with the limit, but in reply-capped: mean credit (steps), by the share of the "
        "step's rollouts that kept it; and the correlation of the advantage with the number of words among "
        "these\n\n"
        + table(
            "| | .8 or more | .65 to .8 | .5 to .65 | .25 to .5 | less | words |", credits(done)
        )
    )
    hours = sum(run["minutes"] for run in done.values()) / 60
    return "\n".join(
        [
            *parts,
            f"{len(done)} runs, {hours:.1f} hours of training on one core each; "
            + ", ".join(sorted({run["cpu"] for run in done.values()}))
            + ".\n",
        ]
    )


def figure(done: dict[str, dict], out: Path) -> None:
    """Held-out curves, mean over seeds, of the constraint and of the joint rate."""
    settings = [
        ("reply", STEPS),
        ("reply-capped", STEPS),
        ("reply-25", STEPS),
        ("reply", LONG),
        ("reply-capped", LONG),
    ]
    settings = [setting for setting in settings if any(of(done, *setting).values())]
    drawn, axes = plt.subplots(
        2,
        len(settings),
        figsize=(4 * len(settings), 6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for column, (task, steps) in enumerate(settings):
        for row, channel in enumerate(("short", "joint")):
            axis = axes[row, column]
            for color, (method, runs) in enumerate(of(done, task, steps).items()):
                if runs:
                    curves = np.array([[x[channel][0] for x in run["eval"]] for run in runs])
                    at = [x["step"] for x in runs[0]["eval"]]
                    axis.plot(
                        at,
                        curves.mean(0),
                        marker="o",
                        markersize=3,
                        color=f"C{color}",
                        label=f"{method} ({len(runs)})",
                    )
            what = "the limit is kept" if channel == "short" else channel
            axis.set(title=f"{task}, {steps} steps: {what}", ylim=(-0.03, 1.03))
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    drawn.supxlabel("step")
    drawn.savefig(out, dpi=110)


if __name__ == "__main__":
    page = DOCS / "text.md"
    page.write_text(page.read_text().partition(MARK)[0] + MARK + "\n" + report(read()))
    figure(read(), DOCS / "text.png")
