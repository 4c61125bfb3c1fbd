"""Does it protect a constraint on a real language model? Matched runs on tasks/reply.py's tasks.

    python study/text.py                    # runs what is missing in study/text.jsonl: takes days
    python study/text.py --minutes 60       # begins no run after an hour
    python study/text.py --repeat NAME      # one run of the file again: are its numbers the same?

Each core trains one run at a time, with train.py. Runs of a seed differ in the aggregation and its
learning rate alone: prompts, request seeds and steps are the same. The rates are chosen on a seed
of their own (`rate`). The file says on which CPU a run was: another kind rounds differently.
study/text_report.py makes tables of it.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run after as many"
    )
    parser.add_argument("--repeat", metavar="NAME", help="a run of study/text.jsonl")
    OPTIONS = parser.parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np

from local.machine import cores, processor

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".jsonl")
RUNS = ROOT / "runs"
STEPS, LONG, EVERY = 15, 45, 3
METHODS = {
    "rvpo": "2",
    "rvpo 0.5:2": "0.5:2",
    "rvpo 10": "10",
    "gdpo": "",
    "grpo": "",
    "softmin": "1",
    "hardmin": "",
    "explicit": "1",
}  # name: beta, if it has one; the aggregation is the first word
MOST = "rvpo", "gdpo", "grpo", "softmin", "hardmin"  # five seeds, the others three
GRID = "1e-5", "2e-5", "4e-5"  # learning rates
TUNING = 100  # the seed they were chosen on, on the task reply
TUNED = {"rvpo 0.5:2": "rvpo", "rvpo 10": "rvpo"}  # take the other's rate
LOCK, TAKEN = Lock(), set()  # what a process of this study has begun


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
        options = {"task": self.task, "agg": self.method.split()[0]}
        if METHODS[self.method]:
            options["beta"] = METHODS[self.method]
        options |= {"lr": self.lr, "lr-schedule": self.schedule, "seed": self.seed}
        options |= {"steps": self.steps, "eval-every": EVERY}
        words = []
        for name, value in options.items():
            words += [f"--{name}", str(value)]
        return words


# What is run


def read() -> dict[str, dict]:
    """The runs that are done, by name."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    runs = [json.loads(line) for line in lines]
    return {run["name"]: run for run in runs}


def merit(run: dict) -> float:
    """The held-out joint rate, over the evaluations of a run but the first."""
    _, *evaluations = run["eval"]
    return float(np.mean([evaluation["joint"][0] for evaluation in evaluations]))


def rate(method: str, done: dict[str, dict]) -> str | None:
    """The learning rate that has the most merit on the tuning seed; None before all have run."""
    runs = [Run("reply", TUNED.get(method, method), lr, TUNING) for lr in GRID]
    if not all(run.name in done for run in runs):
        return None
    return max(runs, key=lambda run: merit(done[run.name])).lr


def at_one_rate() -> Iterator[Run]:
    """Does a method regain the limit? 45 steps at the rate of grpo, which regained it."""
    for seed in (0, 1, 2):
        for method in ("gdpo", "rvpo", "grpo", "hardmin", "rvpo 10", "softmin"):
            yield Run("reply", method, "4e-5", seed, LONG)
    for seed in (3, 4):
        yield Run("reply", "grpo", "4e-5", seed, LONG)


def ten_seeds(done: dict[str, dict]) -> Iterator[Run]:
    """Seeds 5 to 9 of what is compared with a test: with five nothing can be significant."""
    for seed in range(10):
        for method in ("rvpo", "hardmin", "rvpo 10", "gdpo", "grpo", "softmin"):
            yield Run("reply", method, rate(method, done), seed)


def plan(done: dict[str, dict]) -> Iterator[Run]:
    """All runs that can be named, the most important first.

    A method's own come once its rates have been tried."""

    def runs(
        methods: tuple[str, ...],
        seeds: tuple[int, ...],
        task: str = "reply",
        steps: int = STEPS,
        schedule: str = "constant",
    ) -> Iterator[Run]:
        for seed in seeds:
            for method in methods:
                lr = rate(method, done)
                if lr:
                    yield Run(task, method, lr, seed, steps, schedule)

    def tuning(methods: tuple[str, ...]) -> Iterator[Run]:
        return (Run("reply", method, lr, TUNING) for method in methods for lr in GRID)

    yield from tuning(("rvpo", "gdpo"))
    for task in ("reply", "reply-capped"):
        yield from runs(("rvpo", "gdpo"), (0, 1, 2), task)
    yield from tuning(("softmin", "grpo", "hardmin"))
    yield from runs(MOST, (0, 1, 2, 3, 4))
    yield from runs(("rvpo", "hardmin"), (0,), steps=LONG)
    yield from runs(("rvpo 0.5:2", "rvpo 10"), (0, 1, 2))
    yield from runs(("rvpo 10",), (0,), steps=LONG)
    yield from runs(("rvpo", "gdpo"), (0, 1), "reply-capped", LONG)
    yield from tuning(("explicit",))
    yield from runs(("hardmin",), (0, 1, 2), "reply-25")
    yield from runs((*METHODS,), (0, 1, 2))
    if all(rate(method, done) for method in METHODS):
        yield from at_one_rate()
        yield from ten_seeds(done)
    yield from runs(("rvpo", "gdpo"), (2,), "reply-capped", LONG)
    yield from runs(MOST, (0,), steps=LONG)
    yield from runs(("grpo",), (1,), steps=LONG)
    yield from runs(("rvpo", "gdpo"), (0, 1, 2), "reply-25")
    yield from runs(MOST, (0,), schedule="linear")
    yield from runs(("hardmin", "rvpo 10"), (0, 1, 2), "reply-capped")
    yield from runs((*METHODS,), (0, 1, 2), "reply-25")
    yield from runs(MOST, (1, 2), schedule="linear")
    yield from runs(MOST, (3, 4), "reply-25")
    yield from runs(MOST, (1, 2), steps=LONG)
    yield from runs(MOST, (0, 1, 2), steps=LONG, schedule="linear")


# A run, and what is kept of it


def execute(run: Run, name: str) -> dict:
    """Trains, or goes on with what was begun, on one core. Returns what is kept of the run."""
    folder, log = RUNS / name, RUNS / f"{name}.log"
    RUNS.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *run.options()]
    command += ["--name", name, "--save-every", "5", "--resume", "auto"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.run(
            command, cwd=RUNS.parent, stdout=out, stderr=out, check=False, env=one_thread
        )
    if process.returncode:
        sys.exit(f"error: {name} ended with status {process.returncode}, see {log}")
    shutil.rmtree(folder / "checkpoint")
    return kept(run, folder)


def kept(run: Run, folder: Path) -> dict:
    """What study/text.jsonl holds of a run that is done. folder: the run's directory."""
    lines, samples = read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")
    steps = [line for line in lines if "channels" in line]
    evaluations = []
    for line in lines:
        if "eval" in line:
            means = {name: curve(values) for name, values in line["eval"].items()}
            evaluations.append({"step": line["step"], **means})
    trained, credit = {}, {}
    for key in ("joint", "length_mean", "entropy", "truncated", "no_signal"):
        trained[key] = curve(step[key] for step in steps)
    for channel in steps[0]["channels"]:
        trained[channel] = curve(step["channels"][channel]["mean"] for step in steps)
        credit[channel] = curve(step["channels"][channel]["credit"] for step in steps)
    seconds = sum(sum(step["seconds"].values()) for step in steps)
    return {
        "name": run.name,
        **run._asdict(),
        "options": " ".join(run.options()),
        "cpu": processor(),
        "versions": json.loads((folder / "config.json").read_text())["versions"],
        "minutes": round(seconds / 60, 1),
        "eval": evaluations,
        "longer": curve(longer(samples)),
        "paid": {name: curve(values) for name, values in paid(samples).items()},
        "train": trained,
        "credit": credit,
    }


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def curve(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]


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


# The program


def work(end: float) -> None:
    """One core's share of the runs."""
    while time.time() < end:
        with LOCK:
            run = take()
            under_way = TAKEN - read().keys()
        if run:
            result = execute(run, run.name)
            with LOCK, RESULTS.open("a") as out:
                out.write(json.dumps(result) + "\n")
            minutes, last = result["minutes"], result["eval"][-1]
            print(f"{run.name}: {minutes} minutes, held out {last}", flush=True)
        elif under_way:  # it may decide a rate
            time.sleep(10)
        else:
            return


def take() -> Run | None:
    """The next run that nobody has begun."""
    done = read()
    for run in plan(done):
        if run.name not in TAKEN | done.keys():
            TAKEN.add(run.name)
            return run
    return None


def again(name: str) -> None:
    """Repeats a run. Says whether all that is kept of it is the same, apart from times."""
    done = read()
    if name not in done:
        sys.exit(f"error: --repeat {name}: no such run in {RESULTS.name}; it has {', '.join(done)}")
    first = done[name]
    run = Run(**{key: first[key] for key in Run._fields})
    second = execute(run, f"{name}-again-{time.strftime('%H%M%S')}")
    for key in ("eval", "train", "credit", "longer", "cpu", "versions"):
        same = first[key] == second[key]
        print(f"{key}: " + ("the same" if same else f"{first[key]}, now {second[key]}"))


def main(minutes: float) -> None:
    end = time.time() + 60 * minutes
    with ThreadPoolExecutor() as pool:
        shares = [pool.submit(work, end) for _ in range(cores())]
        for share in shares:
            share.result()


if __name__ == "__main__":
    if OPTIONS.repeat:
        again(OPTIONS.repeat)
    else:
        main(OPTIONS.minutes)
