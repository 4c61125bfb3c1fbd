"""From the runs in study/text.jsonl to study/text.md, the tables, and docs/text.png, the curves.

python study/text_report.py
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before numpy is imported: --help must not wait for it
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import curves
import numpy as np
from curves import Cells, best, channels, curve, differences, final, worst_channel
from text import COMPARED, GRID, LONG, METHODS, STEPS, STUDY, TUNED, TUNING, Run, rate

from tools.stats import fisher, holm, sign_flips, spread, table

ROOT = Path(__file__).parent.parent
INTRODUCTION = """# Tables of the study on text

Made by study/text_report.py from study/text.jsonl. [docs/results.md](../docs/results.md) and
[docs/regain.md](../docs/regain.md) say what they mean. joint and kept: the held-out shares of
replies that satisfy all and that keep the limit. ± is the deviation over seeds. p is of the exact
sign-flip test, paired by seed, of values at the end against rvpo's; rvpo 0.5:2 and explicit, in
three seeds, have none. under half at step: the first step of training, a run, whose replies keep
the limit in less than half.

"""


def cells_of(
    done: dict[str, dict],
    task: str,
    steps: int = STEPS,
    schedule: str = "constant",
    lr: str | None = None,
) -> Cells:
    """The runs that count, not those that chose a rate. lr: None, each method's own."""
    cells = {method: [] for method in METHODS}
    for run in done.values():
        setting = run["task"], run["steps"], run["schedule"]
        wanted_rate = lr or rate(run["method"], done) or run["lr"]
        if run["seed"] == TUNING or run["lr"] != wanted_rate:
            continue
        if setting == (task, steps, schedule):
            cells.setdefault(run["method"], []).append(run)
    return cells


def lost(run: dict) -> str:
    """The first step whose rollouts keep the limit in less than half."""
    for step, share in enumerate(run["train"]["short"], 1):
        if share < 0.5:
            return str(step)
    return "never"


# The tables


def report(done: dict[str, dict]) -> str:
    """study/text.md."""
    parts = {
        "Learning rates: the held-out joint rate on the tuning seed, mean of the evaluations of a "
        "run": tuning(done)
    }
    for title, cells in (
        ("reply: at most 35 words", cells_of(done, "reply")),
        (
            "reply-capped: no reward goes on beyond what satisfies it",
            cells_of(done, "reply-capped"),
        ),
        ("reply-25: at most 25 words", cells_of(done, "reply-25")),
        (f"reply, {LONG} steps", cells_of(done, "reply", LONG)),
        (f"reply, {LONG} steps, all at 4e-5", cells_of(done, "reply", LONG, lr="4e-5")),
        (f"reply-capped, {LONG} steps", cells_of(done, "reply-capped", LONG)),
        ("reply, learning rate falling to 0", cells_of(done, "reply", STEPS, "linear")),
    ):
        if any(cells.values()):
            parts[title] = compare(cells)
    at_one_rate = cells_of(done, "reply", LONG, lr="4e-5")
    if any(at_one_rate.values()):
        parts[
            f"Who regains the limit, {LONG} steps at 4e-5: a run loses it when less than half of a "
            "step's replies keep it, and regains it when half do. p: Fisher's exact test against "
            "gdpo, of the numbers of runs that regained it or kept it"
        ] = regained(at_one_rate)
        parts[
            "The same, run by run: what was sampled from the first step on in which all other "
            "channels are full (.95) and the limit is lost, until it is regained"
        ] = returns(at_one_rate)
        parts[
            "What each method would have paid for the first replies that keep the limit again: the "
            "mean advantage in steps of these runs in which at most 4 of 32 keep it and the other "
            "channels are full, of replies that satisfy all and of those that lack something else"
        ] = first_pay(at_one_rate)
    parts[
        "What an update did with the limit, but in reply-capped: mean credit (steps), by the share "
        "of the step's rollouts that kept it; and the correlation of the advantage with the number "
        "of words among these"
    ] = credits(done)
    tables = "\n".join(f"{title}\n\n{text}" for title, text in parts.items())
    return f"{tables}\n{curves.cost(done)}"


def tuning(done: dict[str, dict]) -> str:
    runs = {}
    for method in METHODS:
        if method not in TUNED:
            runs[method] = {lr: Run("reply", method, lr, TUNING) for lr in GRID}
    return curves.tuning(done, runs, "joint")


def compare(cells: Cells) -> str:
    """A row a method."""
    joint, kept = against_rvpo(cells, "joint"), against_rvpo(cells, "short")
    rows = []
    for method, runs in cells.items():
        if runs:
            rows.append(
                [
                    method,
                    runs[0]["lr"],
                    str(len(runs)),
                    spread([curve(run, "short")[0] for run in runs]),
                    spread([best(run) for run in runs]),
                    spread([final(run) for run in runs]),
                    spread([final(run, "short") for run in runs]),
                    ", ".join(lost(run) for run in runs),
                    worst_channel(runs),
                    joint.get(method, ""),
                    kept.get(method, ""),
                ]
            )
    return table(
        "| | lr | n | kept at first | joint, best | joint, final | kept at the end "
        "| under half at step | worst channel at the end | joint: p, Holm | kept: p, Holm |",
        rows,
    )


def against_rvpo(cells: Cells, channel: str) -> dict[str, str]:
    """{method: p and Holm's p of the channel at the end, over the seeds that both have}

    Methods that are not COMPARED have too few seeds, and no test."""
    compared = {method: runs for method, runs in cells.items() if method in COMPARED}
    tests = sign_flips(differences(compared, "rvpo", channel))
    return {method: f"{p:.3f}, {holm:.3f}" for method, (p, holm) in tests.items()}


FULL, FEW = 0.95, 0.125  # mean of the channels beside the limit; share that keeps the limit
ROLLOUTS = 32  # of a step


def fullness(run: dict) -> list[float]:
    """For each step: the mean of the channels beside the limit, over its rollouts."""
    names = channels(run, "short")
    return np.mean([run["train"][name] for name in names], 0).tolist()


class Return(NamedTuple):
    """How a run that lost the limit went on. Steps count from 0."""

    first: int  # step in which the limit is lost and the other channels are full
    end: int  # the step that regains it, or the number of steps
    kept: int  # replies that keep the limit in between
    sampled: int  # replies in between
    regained: bool


def course(run: dict) -> Return | None:
    """None if the run never lost the limit, or if the other channels were never full after that."""
    shares = run["train"]["short"]
    below = [step for step, share in enumerate(shares) if share < 0.5]
    full = [step for step, mean in enumerate(fullness(run)) if mean >= FULL]
    if not below or not full:
        return None
    first = max(full[0], below[0])
    again = [step for step in range(first, len(shares)) if shares[step] >= 0.5]
    end = again[0] if again else len(shares)
    kept = sum(round(share * ROLLOUTS) for share in shares[first:end])
    return Return(first, end, kept, ROLLOUTS * (end - first), bool(again))


def has_limit(run: dict) -> bool:
    """Whether it never lost the limit, or regained it."""
    of_run = course(run)
    return lost(run) == "never" or (of_run is not None and of_run.regained)


def regained(cells: Cells) -> str:
    """A row a method."""
    counts = {}  # method: runs that have the limit, runs
    for method, runs in cells.items():
        counts[method] = sum(has_limit(run) for run in runs), len(runs)
    others = [method for method, (_, n) in counts.items() if n > 1 and method != "gdpo"]
    p = [fisher(*counts[method], *counts["gdpo"]) for method in others]
    tests = dict(zip(others, zip(p, holm(p), strict=True), strict=True))
    rows = []
    for method, (k, n) in counts.items():
        if n:
            test = "{:.3f}, {:.3f}".format(*tests[method]) if method in tests else ""
            of_seeds = spread([final(run) for run in cells[method]])
            rows.append([method, f"{k} of {n}", of_seeds, test])
    return table("| | regained or kept | joint, final | p, Holm |", rows)


def returns(cells: Cells) -> str:
    """A row a run."""
    rows = []
    for method, runs in cells.items():
        for run in sorted(runs, key=lambda run: run["seed"]):
            row = [method, str(run["seed"]), lost(run)]
            of_run = course(run)
            if of_run is None:
                rows.append([*row, *[""] * 5, f"{final(run):.2f}"])
                continue
            first, end, kept, sampled, again = of_run
            rows.append(
                [
                    *row,
                    str(first + 1),
                    f"{kept} of {sampled}",
                    mean_of(run, "truncated", first, end),
                    mean_of(run, "entropy", first, end),
                    str(end + 1) if again else "never",
                    f"{final(run):.2f}",
                ]
            )
    return table(
        "| | seed | under half at step | others full at step | keep the limit | cut off | entropy "
        "| half again at step | joint, final |",
        rows,
    )


def mean_of(run: dict, key: str, first: int, end: int) -> str:
    """Of what a run logged, over steps. Old runs lack some, and a step without signal has none."""
    values = [value for value in run["train"].get(key, [])[first:end] if value is not None]
    return f"{np.mean(values):.2f}" if values else ""


def first_pay(cells: Cells) -> str:
    """A row a method. Old runs were not compared."""
    paid = {method: {"all": [], "lacking": []} for method in COMPARED}
    for run in itertools.chain(*cells.values()):
        if "would pay" not in run:
            continue
        for step, mean in enumerate(fullness(run)):
            if mean >= FULL and 0 < run["train"]["short"][step] <= FEW:
                for method, kinds in paid.items():
                    for kind, advantages in kinds.items():
                        advantages.append(run["would pay"][method][kind][step])
    rows = []
    for method, kinds in paid.items():
        row = [method]
        for advantages in kinds.values():
            there = [value for value in advantages if value is not None]
            row.append(f"{spread(there)} ({len(there)})" if there else "")
        rows.append(row)
    return table("| | satisfies all (steps) | lacks something (steps) |", rows)


SHARES = 1.0, 0.8, 0.65, 0.5, 0.25, 0.0  # of a step's rollouts, which keep the limit


def credits(done: dict[str, dict]) -> str:
    """Mean `credit` of the limit by the share that kept it, and how advantages went with length."""
    rows = []
    for method in METHODS:
        shares, credit, longer = [], [], []  # of all steps
        for run in done.values():
            if run["method"] == method and run["task"] != "reply-capped":
                shares += run["train"]["short"]
                credit += run["credit"]["short"]
                longer += run["longer"]
        if not shares:
            continue
        steps = [pair for pair in zip(shares, credit, strict=True) if None not in pair]
        cells = []
        for high, low in itertools.pairwise(SHARES):
            values = [value for share, value in steps if low <= share < high]
            cells.append(f"{np.mean(values):+.2f} ({len(values)})" if values else "")
        words = np.mean([value for value in longer if value is not None])
        rows.append([method, *cells, f"{words:+.2f}"])
    return table("| | .8 or more | .65 to .8 | .5 to .65 | .25 to .5 | less | words |", rows)


# The figure. Titles say what the committed runs show.

PANELS = {  # title: task, steps, learning rate, methods
    "In 15 steps gdpo and grpo\ngive the limit up": (
        "reply", STEPS, None, ("rvpo", "rvpo 10", "gdpo", "grpo", "hardmin", "softmin")
    ),
    "In 45 steps at 4e-5 some\nget it back": (
        "reply", LONG, "4e-5", ("rvpo", "rvpo 10", "gdpo", "grpo", "hardmin", "softmin")
    ),
    "With capped rewards\nboth keep it": ("reply-capped", LONG, None, ("rvpo", "gdpo")),
}  # fmt: skip
ROWS = {"short": "replies that keep the limit", "joint": "replies that satisfy all"}


def figure(done: dict[str, dict], out: Path) -> None:
    panels = {}
    for title, (task, steps, lr, methods) in PANELS.items():
        cells = cells_of(done, task, steps, lr=lr)
        panels[title] = {method: cells[method] for method in methods}
    curves.figure(panels, ROWS, out, 5.4)


if __name__ == "__main__":
    runs = STUDY.read()
    (ROOT / "study/text.md").write_text(INTRODUCTION + report(runs))
    figure(runs, ROOT / "docs/text.png")
