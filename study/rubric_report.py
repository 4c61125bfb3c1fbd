"""From the runs in study/rubric.jsonl to tables, study/rubric.md, and curves, docs/rubric.png.

python study/rubric_report.py
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before numpy is imported: --help must not wait for it
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import curves
import numpy as np
from curves import Cells, best, curve, differences, final, worst_channel
from rubric import EVERY, GRID, METHODS, ONE_RATE, SEEDS, STUDY, TWICE, rate, tuning

from tools.stats import sign_flips, spread, table

ROOT = Path(__file__).parent.parent
INTRODUCTION = """# Tables of the study on rubrics

Made by study/rubric_report.py from study/rubric.jsonl. study/rubric_task.py is the task. **Score**:
points of what a reply meets over the points that it could have, as in HealthBench. **Kept**: the
share of replies that keep all three constraints. Both are held out, and count what is true. First
is before training; least is the lowest of the evaluations after that; best is chosen on the prompts
that measure it. No signal: the share of groups whose replies all have the same rewards, in the last
six steps. Neglected: criteria that less than .1 of the replies meet at the end. ± is the deviation
over seeds; p is of the exact sign-flip test, paired by seed, of a method against gdpo, the mean.
Runs at every rate are listed; those of the harder variants above 4e-5 are of an earlier plan.

"""
TITLES = {
    "plain": "Rubrics: 7 to 17 binary criteria a prompt",
    "exclusive": "Two criteria exclude each other: at most 30 words, and more than 40",
    "noisy": "The judge inverts 30% of its verdicts on one constraint, at most 30 words",
}
OWN = None  # stands for the own learning rate of each method
COMPARED = {  # the rates at which methods are compared
    "plain": {
        f"All at {ONE_RATE}": ONE_RATE,
        f"Both at {TWICE}": TWICE,
        "Each at its own rate": OWN,
    },
    "exclusive": {f"All at {ONE_RATE}": ONE_RATE},
    "noisy": {f"All at {ONE_RATE}": ONE_RATE},
}
PANELS = {  # of the figure
    f"Binary criteria,\nall at {ONE_RATE}": ("plain", ONE_RATE),
    "At twice\nthe rate": ("plain", TWICE),
    "Two criteria exclude\neach other": ("exclusive", ONE_RATE),
    "The judge errs\nin one constraint": ("noisy", ONE_RATE),
}
NO_CRITERIA = "score", "kept"  # what evaluations have beside criteria


def cells_of(done: dict[str, dict], variant: str, lr: str | None) -> Cells:
    """The runs at a learning rate, or of each method at its own; without those that chose it."""
    cells = {method: [] for method in METHODS}
    for run in done.values():
        at_rate = run["lr"] == (lr or rate(run["method"], done))
        if run["variant"] == variant and run["seed"] in SEEDS[variant] and at_rate:
            cells[run["method"]].append(run)
    return cells


# The tables


def report(done: dict[str, dict]) -> str:
    """What study/rubric.md has below its introduction."""
    parts = {
        "Learning rates: the score on the tuning seed, mean of the evaluations of a run": (
            curves.tuning(done, tuning(), "score")
        )
    }
    for variant, title in TITLES.items():
        compared = []
        for at, lr in COMPARED[variant].items():
            cells = cells_of(done, variant, lr)
            if any(cells.values()):
                compared.append(f"{at}:\n\n{against_gdpo(cells)}\n{along(cells)}")
        parts[title] = "\n".join([levels(done, variant), *compared])
    tables = "\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    return f"{tables}\n{curves.cost(done)}"


def levels(done: dict[str, dict], variant: str) -> str:
    """Score and constraints, a row a method and learning rate."""
    rows = []
    for method in METHODS:
        for lr in GRID:
            runs = cells_of(done, variant, lr)[method]
            if runs:
                rows.append([method, lr, str(len(runs)), *level(runs)])
    return table(
        "| | lr | n | score: first | best | final | kept: first | least | final "
        "| worst criterion at the end | neglected | no signal |",
        rows,
    )


def level(runs: list[dict]) -> list[str]:
    """What a row of `levels` says of runs that differ in the seed."""
    least = [min(curve(run, "kept")[1:]) for run in runs]  # the first is before any training
    return [
        spread([curve(run, "score")[0] for run in runs]),
        spread([best(run, "score") for run in runs]),
        spread([final(run, "score") for run in runs]),
        spread([curve(run, "kept")[0] for run in runs]),
        spread(least),
        spread([final(run, "kept") for run in runs]),
        worst_channel(runs, *NO_CRITERIA),
        spread([neglected(run) for run in runs]),
        spread([np.mean(run["train"]["no_signal"][-EVERY:]) for run in runs]),
    ]


def neglected(run: dict) -> int:
    """How many criteria less than .1 of the replies meet at the end."""
    return sum(final(run, criterion) < 0.1 for criterion in curves.channels(run, *NO_CRITERIA))


def against_gdpo(cells: Cells) -> str:
    """The differences at the end, their tests, and what so many seeds can show."""
    scores = differences(cells, "gdpo", "score")
    kept = differences(cells, "gdpo", "kept")
    if not scores:
        return "Too few runs for a test: gdpo and another method need two seeds that both have.\n"
    rows = []
    for method in scores:
        row = [method, str(len(scores[method]))]
        for of_methods in (scores, kept):
            p, holm = sign_flips(of_methods)[method]
            row += [spread(of_methods[method]), f"{p:.3f}, {holm:.3f}"]
        rows.append(row)
    seeds = max(len(of_seeds) for of_seeds in scores.values())
    smallest_p = 2 / 2**seeds
    sentence = f"With {seeds} seeds p is at least {smallest_p:.3f}"
    if smallest_p > 0.05:
        sentence += ": too few for a difference to be significant"
    compared = table("| less gdpo's | n | final score | p, Holm | final kept | p, Holm |", rows)
    return f"{compared}\n{sentence}.\n"


def along(cells: Cells) -> str:
    """Score, kept and the worst criterion of each run at each evaluation, means over seeds."""
    rows = []
    steps = []
    for method, runs in cells.items():
        if runs:
            steps = [str(evaluation["step"]) for evaluation in runs[0]["eval"]]
            measures = [
                np.mean([curve(run, "score") for run in runs], 0),
                np.mean([curve(run, "kept") for run in runs], 0),
                np.mean([worst(run) for run in runs], 0),
            ]
            row = [method]
            for score, kept, least in np.transpose(measures):
                row.append(f"{score:.2f} {kept:.2f} {least:.2f}")
            rows.append(row)
    steps = " | ".join(steps)
    return table(f"| score, kept, worst criterion of each run, at step | {steps} |", rows)


def worst(run: dict) -> list[float]:
    """The share that meets the criterion that is met the least, at each evaluation."""
    shares = [curve(run, criterion) for criterion in curves.channels(run, *NO_CRITERIA)]
    return np.min(shares, 0).tolist()


ROWS = {"score": "score", "kept": "replies that keep\nthe constraints"}


def figure(done: dict[str, dict], out: Path) -> None:
    panels = {title: cells_of(done, *of_panel) for title, of_panel in PANELS.items()}
    curves.figure(panels, ROWS, out, 5.0)


if __name__ == "__main__":
    runs = STUDY.read()
    (ROOT / "study/rubric.md").write_text(INTRODUCTION + report(runs))
    if all(any(cells_of(runs, *of_panel).values()) for of_panel in PANELS.values()):
        figure(runs, ROOT / "docs/rubric.png")
