"""Does it protect a constraint on a real language model? Matched runs of train.py on the tasks of tasks/reply.py.

    python study/text.py                    # runs what is missing in study/text.jsonl, one a core, for days if need be
    python study/text.py --minutes 60       # begins no run after an hour
    python study/text.py --repeat NAME      # one run of the file once more, and whether it gives the same numbers

A run differs from the others of its seed in the aggregation and its learning rate alone: prompts, request seeds and
steps are the same. The rates are chosen on a seed of their own (`rate`). The file says on which CPU a run was: another
kind rounds differently. study/text_report.py makes tables of it.
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
sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # the code that is studied; a script sees its own folder only

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np

from local.machine import cores, processor

ROOT = Path(__file__).parent.parent
RESULTS, RUNS = Path(__file__).with_suffix(".jsonl"), ROOT / "runs"
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
GRID, TUNING = (
    ("1e-5", "2e-5", "4e-5"),
    100,
)  # learning rates; the seed they were chosen on, on the task reply
LOCK, TAKEN = Lock(), set()  # what a process of this study has begun
TUNED = {"rvpo 0.5:2": "rvpo", "rvpo 10": "rvpo"}  # take the other's rate


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
        beta = METHODS[self.method]
        return [
            "--task",
            self.task,
            "--agg",
            self.method.split()[0],
            *(["--beta", beta] if beta else []),
            "--lr",
            self.lr,
            "--lr-schedule",
            self.schedule,
            "--seed",
            str(self.seed),
            "--steps",
            str(self.steps),
            "--eval-every",
            str(EVERY),
        ]


def read() -> dict[str, dict]:
    """The runs that are done, by name."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def merit(run: dict) -> float:
    """The held-out joint rate, over the evaluations of a run but the first."""
    return float(np.mean([x["joint"][0] for x in run["eval"][1:]]))


def rate(method: str, done: dict[str, dict]) -> str | None:
    """The learning rate that has the most merit on the tuning seed; None before all have run."""
    runs = [Run("reply", TUNED.get(method, method), lr, TUNING) for lr in GRID]
    if not all(run.name in done for run in runs):
        return None
    return max(runs, key=lambda run: merit(done[run.name])).lr


def at_one_rate() -> Iterator[Run]:
    """Does a method regain the limit that it has lost? 45 steps at grpo's rate, which regained it."""
    for seed in (0, 1, 2):
        for method in ("gdpo", "rvpo", "grpo", "hardmin", "rvpo 10", "softmin"):
            yield Run("reply", method, "4e-5", seed, LONG)
    for seed in (3, 4):
        yield Run("reply", "grpo", "4e-5", seed, LONG)


def ten_seeds(done: dict[str, dict]) -> Iterator[Run]:
    """Seeds 5 to 9 of what is compared with a test: with five seeds no difference can be significant."""
    for seed in range(10):
        for method in ("rvpo", "hardmin", "rvpo 10", "gdpo", "grpo", "softmin"):
            yield Run("reply", method, rate(method, done), seed)


def plan(done: dict[str, dict]) -> Iterator[Run]:
    """All runs that can be named, the most important first: a method's own come once its rates have been tried."""

    def runs(
        methods: tuple[str, ...],
        seeds: tuple[int, ...],
        task: str = "reply",
        steps: int = STEPS,
        schedule: str = "constant",
    ) -> Iterator[Run]:
        found = [(seed, method, rate(method, done)) for seed in seeds for method in methods]
        return (Run(task, method, lr, seed, steps, schedule) for seed, method, lr in found if lr)

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


def longer(file: Path) -> list[float | None]:
    """Of a run's samples.jsonl, for each step: the correlation, within prompts, of the advantage with the number of
    words among the replies that keep the limit."""
    found: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for sample in map(json.loads, file.read_text().splitlines()):
        group = found.setdefault(sample["step"], {}).setdefault(sample["prompt"][-1]["content"], [])
        if sample["rewards"]["short"] == 1:
            group.append((len(sample["response"].split()), sample["advantage"]))
    out = []
    for groups in found.values():
        centred = [np.array(group) - np.mean(group, 0) for group in groups.values() if group]
        words, advantages = np.concatenate(centred or [np.zeros((1, 2))]).T
        size = float(np.linalg.norm(words) * np.linalg.norm(advantages))
        out.append(float(words @ advantages) / size if size > 1e-9 else None)
    return out


def paid(file: Path) -> dict[str, list[float | None]]:
    """Of a run's samples.jsonl, for each step: the mean advantage of the replies that keep the limit, and of those that
    were cut off. None where there are none."""
    steps: dict[int, dict[str, list[float]]] = {}
    for sample in map(json.loads, file.read_text().splitlines()):
        step = steps.setdefault(sample["step"], {"short": [], "cut off": []})
        if sample["rewards"]["short"] == 1:
            step["short"].append(sample["advantage"])
        if sample["finish"] == "length":
            step["cut off"].append(sample["advantage"])
    return {
        name: [float(np.mean(step[name])) if step[name] else None for step in steps.values()]
        for name in ("short", "cut off")
    }


def execute(run: Run, name: str) -> dict:
    """Trains, or goes on with what was begun, on one core. Returns what is kept of the run."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *run.options(),
        "--name",
        name,
        "--save-every",
        "5",
        "--resume",
        "auto",
    ]
    RUNS.mkdir(exist_ok=True)
    log = RUNS / f"{name}.log"
    with log.open("w") as out:
        status = subprocess.run(
            command,
            cwd=RUNS.parent,
            stdout=out,
            stderr=out,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).returncode
    if status:
        sys.exit(f"error: {name} ended with status {status}, see {log}")
    folder = RUNS / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "channels" in line]
    channels = [*steps[0]["channels"]]
    versions = json.loads((folder / "config.json").read_text())["versions"]
    shutil.rmtree(folder / "checkpoint")

    def curve(values) -> list:
        return [None if x is None else round(x, 4) for x in values]

    evals = [
        {"step": x["step"], **{k: curve(v) for k, v in x["eval"].items()}}
        for x in lines
        if "eval" in x
    ]
    return {
        "name": run.name,
        **run._asdict(),
        "options": " ".join(run.options()),
        "cpu": processor(),
        "versions": versions,
        "minutes": round(sum(sum(line["seconds"].values()) for line in steps) / 60, 1),
        "eval": evals,
        "longer": curve(longer(folder / "samples.jsonl")),
        "paid": {name: curve(values) for name, values in paid(folder / "samples.jsonl").items()},
        "train": {
            **{
                key: curve(line[key] for line in steps)
                for key in ("joint", "length_mean", "entropy", "truncated", "no_signal")
            },
            **{c: curve(line["channels"][c]["mean"] for line in steps) for c in channels},
        },
        "credit": {c: curve(line["channels"][c]["credit"] for line in steps) for c in channels},
    }


def work(end: float) -> None:
    """One core's share: the next run that nobody has begun."""
    while time.time() < end:
        with LOCK:
            run = next((run for run in plan(read()) if run.name not in TAKEN | read().keys()), None)
            TAKEN.update([run.name] if run else [])
        if run is None and not TAKEN - read().keys():
            return
        if run is None:  # a run that is under way may decide a rate
            time.sleep(10)
            continue
        result = execute(run, run.name)
        with LOCK, RESULTS.open("a") as out:
            out.write(json.dumps(result) + "\n")
        print(f"{run.name}: {result['minutes']} minutes, held out {result['eval'][-1]}", flush=True)


def again(name: str) -> None:
    """Repeats a run. Says whether all that is kept of it is the same, but for times."""
    done = read()
    if name not in done:
        sys.exit(f"error: --repeat {name}: no such run in {RESULTS.name}; it has {', '.join(done)}")
    first = done[name]
    run = Run(**{key: first[key] for key in Run._fields})
    second = execute(run, f"{name}-again-{time.strftime('%H%M%S')}")
    for key in ("eval", "train", "credit", "longer", "cpu", "versions"):
        print(
            f"{key}: {'the same' if first[key] == second[key] else f'{first[key]}, now {second[key]}'}"
        )


def main(minutes: float) -> None:
    end = time.time() + 60 * minutes
    with ThreadPoolExecutor() as pool:
        for share in [pool.submit(work, end) for _ in range(cores())]:
            share.result()


if __name__ == "__main__":
    if OPTIONS.repeat:
        again(OPTIONS.repeat)
    else:
        main(OPTIONS.minutes)
