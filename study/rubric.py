"""Do aggregations differ where rewards are binary criteria? Matched runs of study/rubric_task.py.

    python study/rubric.py                # runs what is missing in study/rubric.jsonl: hours
    python study/rubric.py --minutes 60   # begins no run after an hour
    python study/rubric.py --repeat NAME  # one run of the file again: are its numbers the same?

Five methods, five seeds, and two seeds of each harder variant. Runs of a seed differ in the
aggregation and its learning rate alone. All methods run at one rate. On the plain variant each also
runs at its own rate, chosen on the tuning seed (`rate`), and gdpo and rvpo at twice the common one.
study/matched.py trains the runs, study/rubric_report.py makes tables of them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import matched
from matched import TUNING, Study, arguments, best_rate, options_of

METHODS = "gdpo", "rvpo 0.5:2", "rvpo", "hardmin", "grpo"
TUNED = {"rvpo 0.5:2": "rvpo"}  # takes the other's rate
SEEDS = {"plain": range(5), "exclusive": range(2), "noisy": range(2)}  # of each variant
STEPS, EVERY = 30, 6
GRID = *matched.GRID, "8e-5", "1.6e-4", "3.2e-4"  # learning rates
ONE_RATE = "4e-5"  # of all methods
TWICE = "8e-5"  # twice that, of gdpo and rvpo: is it the method or the rate?
TRIED = 18  # steps of a run that tries a rate


class Run(NamedTuple):
    variant: str
    method: str
    lr: str
    seed: int
    steps: int = STEPS

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "-").replace(":", "-")
        return f"rubric-{self.variant}_{method}_{self.lr}_{self.steps}_{self.seed}"

    def options(self) -> list[str]:
        options = {"task": "study/rubric_task.py", "data": self.variant}
        options |= options_of(self.method)
        options |= {"lr": self.lr, "seed": self.seed, "steps": self.steps, "eval-every": EVERY}
        return arguments(options)


def tuning() -> dict[str, dict[str, Run]]:
    """{method: {learning rate: the run that tries it}}"""
    runs = {}
    for method in METHODS:
        if method not in TUNED:
            runs[method] = {lr: Run("plain", method, lr, TUNING, TRIED) for lr in GRID}
    return runs


def rate(method: str, done: dict[str, dict]) -> str | None:
    """The learning rate with the best score on the tuning seed; None before all have run."""
    return best_rate(tuning()[TUNED.get(method, method)], done, "score")


def plan(done: dict[str, dict]) -> Iterator[Run]:
    """All runs that can be named: those that try a rate, then all methods at one rate, gdpo and
    rvpo at twice that, and each at its own. Some are named twice."""
    for runs in tuning().values():
        yield from runs.values()
    for variant, seeds in SEEDS.items():
        for seed in seeds:
            for method in METHODS:
                yield Run(variant, method, ONE_RATE, seed)
    for seed in SEEDS["plain"]:
        for method in ("gdpo", "rvpo"):
            yield Run("plain", method, TWICE, seed)
        for method in METHODS:
            lr = rate(method, done)
            if lr:
                yield Run("plain", method, lr, seed)


def more(samples: list[dict]) -> dict:
    """Nothing is kept of the samples."""
    return {}


STUDY = Study(Path(__file__).with_suffix(".jsonl"), Run, plan, more)

if __name__ == "__main__":
    matched.main(STUDY, __doc__)
