"""Does it protect a constraint on a real language model? Matched runs of train.py on the tasks `reply` and `reply-25`.

    python study/text.py                    # runs what is missing in study/text.jsonl, one a core, for days if need be
    python study/text.py --minutes 60       # begins no run after an hour
    python study/text.py --repeat NAME      # one run of the file once more, and whether it gives the same numbers

A run differs from the others of its seed in the aggregation and its learning rate alone: prompts, request seeds and
steps are the same. Seeds come one after the other, each with all methods on one machine, for another kind of CPU rounds
differently. The rates were chosen on a seed of their own (`RATES`).
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after as many")
    parser.add_argument("--repeat", metavar="NAME", help="a run of study/text.jsonl")
    OPTIONS = parser.parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # the code that is studied; a script sees its own folder only

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".jsonl")
STEPS, LONG, EVERY = 15, 45, 3
METHODS = {"rvpo": "2", "rvpo 0.5:2": "0.5:2", "gdpo": "0", "grpo": "0", "softmin": "1", "hardmin": "0",
           "explicit": "1"}  # name: beta; the aggregation is the first word
MOST = "rvpo", "gdpo", "grpo", "softmin"  # five seeds, the others three
GRID, TUNING = ("1e-5", "2e-5", "4e-5"), 100  # learning rates; the seed they were chosen on, on the task reply
LOCK, TAKEN = Lock(), set()  # what a process of this study has begun
TUNED = {"rvpo 0.5:2": "rvpo"}  # take the other's rate


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
        return ["--task", self.task, "--agg", self.method.split()[0], "--beta", METHODS[self.method], "--lr", self.lr,
                "--lr-schedule", self.schedule, "--seed", str(self.seed), "--steps", str(self.steps),
                "--eval-every", str(EVERY)]


def read() -> dict[str, dict]:
    """The runs that are done, by name."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def rate(method: str, done: dict[str, dict]) -> str | None:
    """The learning rate with the best held-out joint rate on the tuning seed, over the evaluations of a run but the
    first; None before all have run."""
    runs = [Run("reply", TUNED.get(method, method), lr, TUNING) for lr in GRID]
    if not all(run.name in done for run in runs):
        return None
    return max(runs, key=lambda run: np.mean([x["joint"][0] for x in done[run.name]["eval"][1:]])).lr


def plan(done: dict[str, dict]) -> Iterator[Run]:
    """All runs, the most important first."""
    for method in METHODS:
        if method not in TUNED:
            yield from (Run("reply", method, lr, TUNING) for lr in GRID)
    rates = {method: rate(method, done) for method in METHODS}
    if None in rates.values():
        return
    methods = [[*METHODS] if seed < 3 else [*MOST] for seed in range(5)]
    yield from (Run("reply", method, rates[method], seed) for seed in range(3) for method in methods[seed])
    yield from (Run("reply", method, rates[method], 0, LONG) for method in MOST)
    yield from (Run("reply-25", method, rates[method], 0) for method in methods[0])
    yield from (Run("reply", method, rates[method], 0, STEPS, "linear") for method in MOST)
    yield from (Run("reply", method, rates[method], seed) for seed in (3, 4) for method in methods[seed])
    for seed in range(1, 5):
        yield from (Run("reply-25", method, rates[method], seed) for method in methods[seed])
    for seed in (1, 2):
        yield from (Run("reply", method, rates[method], seed, LONG) for method in MOST)
        yield from (Run("reply", method, rates[method], seed, STEPS, "linear") for method in MOST)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def execute(run: Run, name: str) -> dict:
    """Trains, or goes on with what was begun, on one core. Returns what is kept of the run."""
    command = [sys.executable, str(ROOT / "train.py"), *run.options(), "--name", name, "--save-every", "5",
               "--resume", "auto"]
    log = ROOT / "runs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as out:
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out,
                                check=False).returncode
    if status:
        sys.exit(f"error: {name} ended with status {status}, see {log}")
    folder = ROOT / "runs" / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "channels" in line]
    channels = [*steps[0]["channels"]]
    versions = json.loads((folder / "config.json").read_text())["versions"]
    shutil.rmtree(folder / "checkpoint")

    def curve(values) -> list:
        return [None if x is None else round(x, 4) for x in values]

    evals = [{"step": line["step"], **{k: curve(v) for k, v in line["eval"].items()}}
             for line in lines if "eval" in line]
    return {"name": run.name, **run._asdict(), "options": " ".join(run.options()), "cpu": cpu(), "versions": versions,
            "minutes": round(sum(sum(line["seconds"].values()) for line in steps) / 60, 1),
            "eval": evals,
            "train": {**{key: curve(line[key] for line in steps) for key in ("joint", "length_mean")},
                      **{c: curve(line["channels"][c]["mean"] for line in steps) for c in channels}},
            "credit": {c: curve(line["channels"][c]["credit"] for line in steps) for c in channels}}


def work(end: float) -> None:
    """One core's share: the next run that nobody has begun."""
    while time.time() < end:
        with LOCK:
            run = next((run for run in plan(read()) if run.name not in TAKEN | read().keys()), None)
            TAKEN.add(run.name if run else "")
        if run is None:
            return
        result = execute(run, run.name)
        with LOCK, RESULTS.open("a") as out:
            out.write(json.dumps(result) + "\n")
        print(f"{run.name}: {result['minutes']} minutes, held out {result['eval'][-1]}", flush=True)


def main(minutes: float) -> None:
    end = time.time() + 60 * minutes
    with ThreadPoolExecutor() as pool:
        cores = len(os.sched_getaffinity(0))
        for share in [pool.submit(work, end) for _ in range(cores)]:
            share.result()


if __name__ == "__main__":
    main(OPTIONS.minutes)
