"""Does it protect a constraint on a real language model? Matched runs on tasks/reply.py's tasks.

    python study/text.py                    # runs what is missing in study/text.jsonl
    python study/text.py --minutes 60       # begins no run after an hour
    python study/text.py --repeat NAME      # one run of the file again: are its numbers the same?

Runs of a seed differ in the aggregation and its learning rate alone: prompts, request seeds and
steps are the same. The rates are chosen on a seed of their own (`rate`). study/matched.py trains
the runs, study/text_report.py makes tables of them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import matched
import numpy as np
import torch
from matched import GRID, METHODS, TUNING, Study, arguments, best_rate, options_of

import rvpo

STEPS, LONG, EVERY = 15, 45, 3
TUNED = {"rvpo 0.5:2": "rvpo", "rvpo 10": "rvpo"}  # take the other's rate
COMPARED = "gdpo", "rvpo", "rvpo 10", "hardmin", "grpo", "softmin"
MASKED = " masked"  # a method's name with it: --mask-truncated


class Group(NamedTuple):
    """Runs that differ in the method and the seed, each method at its own rate."""

    methods: tuple[str, ...]
    seeds: int  # 0, 1, ...: so many
    task: str = "reply"
    steps: int = STEPS
    schedule: str = "constant"


GROUPS = (
    Group(COMPARED, 10),
    Group(("rvpo 0.5:2", "explicit"), 3),
    Group(("rvpo", "gdpo"), 3, "reply-capped"),
    Group(("rvpo", "gdpo"), 3, "reply-capped", LONG),
    Group(("hardmin",), 3, "reply-25"),
    Group(("rvpo", "gdpo"), 2, "reply-25"),
    Group(("rvpo", "rvpo 10", "gdpo", "hardmin"), 1, steps=LONG),
    Group(("rvpo", "gdpo"), 1, schedule="linear"),
)


class Run(NamedTuple):
    task: str
    method: str
    lr: str
    seed: int
    steps: int = STEPS
    schedule: str = "constant"

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "-").replace(":", "-")
        return f"{self.task}_{method}_{self.lr}_{self.schedule}_{self.steps}_{self.seed}"

    def options(self) -> list[str]:
        method = self.method.removesuffix(MASKED)
        options = {"task": self.task, **options_of(method)}
        options |= {"lr": self.lr, "lr-schedule": self.schedule, "seed": self.seed}
        options |= {"steps": self.steps, "eval-every": EVERY}
        if method != self.method:
            options["mask-truncated"] = "true"
        return arguments(options)


# What is run


def rate(method: str, done: dict[str, dict]) -> str | None:
    """The learning rate with the best joint rate on the tuning seed, of the task `reply`."""
    runs = {lr: Run("reply", TUNED.get(method, method), lr, TUNING) for lr in GRID}
    return best_rate(runs, done, "joint")


def plan(done: dict[str, dict]) -> Iterator[Run]:
    """All runs that can be named. Those of a group come once the method's rates have been tried."""
    for method in METHODS:
        if method not in TUNED:
            for lr in GRID:
                yield Run("reply", method, lr, TUNING)
    yield from at_one_rate()
    for group in GROUPS:
        for seed in range(group.seeds):
            for method in group.methods:
                lr = rate(method, done)
                if lr:
                    yield Run(group.task, method, lr, seed, group.steps, group.schedule)


def at_one_rate() -> Iterator[Run]:
    """Does a method regain the limit? Long runs at the rate of grpo, which regained it."""
    for method in COMPARED:
        for seed in range(5 if method == "grpo" else 3):
            yield Run("reply", method, "4e-5", seed, LONG)
    yield Run("reply", "gdpo" + MASKED, "4e-5", 0, LONG)


# What is kept of a run's samples


def more(samples: list[dict]) -> dict:
    means = {name: matched.rounded(values) for name, values in paid(samples).items()}
    correlations = matched.rounded(longer(samples))
    return {"longer": correlations, "paid": means, "would pay": would_pay(samples)}


def longer(samples: list[dict]) -> list[float | None]:
    """For each step: how the advantage goes with length among the replies that keep the limit.

    It is the correlation, within prompts, with the number of words."""
    steps: dict[int, dict[str, list[tuple[int, float]]]] = {}  # step: prompt: words, advantage
    for sample in samples:
        groups = steps.setdefault(sample["step"], {})
        group = groups.setdefault(sample["prompt"][-1]["content"], [])
        if sample["rewards"]["short"] == 1:
            group.append((len(sample["response"].split()), sample["advantage"]))
    correlations = []
    for groups in steps.values():
        centred = [np.array(group) - np.mean(group, 0) for group in groups.values() if group]
        words, advantages = np.concatenate(centred or [np.zeros((1, 2))]).T
        size = float(np.linalg.norm(words) * np.linalg.norm(advantages))
        correlations.append(float(words @ advantages) / size if size > 1e-9 else None)
    return correlations


def paid(samples: list[dict]) -> dict[str, list[float | None]]:
    """For each step: the mean advantage of the replies that keep the limit, and of those cut off.

    None where there are none."""
    steps: dict[int, dict[str, list[float]]] = {}
    for sample in samples:
        step = steps.setdefault(sample["step"], {"short": [], "cut off": []})
        if sample["rewards"]["short"] == 1:
            step["short"].append(sample["advantage"])
        if sample["finish"] == "length":
            step["cut off"].append(sample["advantage"])
    means = {"short": [], "cut off": []}
    for step in steps.values():
        for name, advantages in step.items():
            means[name].append(float(np.mean(advantages)) if advantages else None)
    return means


def would_pay(samples: list[dict]) -> dict[str, dict[str, list[float | None]]]:
    """For each method and step: the mean advantage that it would have given, in this batch, to the
    replies that keep the limit and satisfy all, and to those that keep it and lack something else.
    None where there are none."""
    steps: dict[int, dict[str, list[list[float]]]] = {}  # step: prompt: rewards of its replies
    for sample in samples:
        groups = steps.setdefault(sample["step"], {})
        group = groups.setdefault(json.dumps(sample["prompt"]), [])
        group.append([*sample["rewards"].values()])  # short is the first
    means = {method: {"all": [], "lacking": []} for method in COMPARED}
    for groups in steps.values():
        rewards = torch.tensor([*groups.values()], dtype=torch.float64)  # (P, G, K)
        kept = rewards[..., 0] == 1
        satisfied = (rewards == 1).all(-1)
        for method in COMPARED:
            aggregation, *_ = method.split()
            advantages = rvpo.advantages(rewards, aggregation, float(METHODS[method] or 0))
            of_method = means[method]
            of_method["all"].append(mean(advantages[satisfied]))
            of_method["lacking"].append(mean(advantages[kept & ~satisfied]))
    return means


def mean(values: torch.Tensor) -> float | None:
    return round(values.mean().item(), 4) if len(values) else None


STUDY = Study(Path(__file__).with_suffix(".jsonl"), Run, plan, more)

if __name__ == "__main__":
    matched.main(STUDY, __doc__)
