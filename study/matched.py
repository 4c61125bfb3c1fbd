"""Matched runs of train.py: what the studies on a language model share.

A study plans its runs, and each becomes a line of its file. What is in the file is not run again.
Each core trains one run at a time, the first of the plan that nobody has begun. A line says by
which program and on which CPU the run was: others round differently.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from local.machine import cores, processor

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs"
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
GRID = "1e-5", "2e-5", "4e-5"  # learning rates
TUNING = 100  # the seed that they are chosen on
LOCK, TAKEN = Lock(), set()  # what this process has begun


class Study(NamedTuple):
    file: Path  # a line a run
    kind: type  # of its runs, a NamedTuple with `name` and `options()`
    # From the lines that are there, by name, to the runs that can be named, the first to run first.
    plan: Callable[[dict[str, dict]], Iterator]
    # From the lines of a run's samples.jsonl to what else is kept of it.
    more: Callable[[list[dict]], dict]
    program: str = "study/bfloat16.py"  # that trains a run

    def read(self) -> dict[str, dict]:
        """The runs that are done, by name."""
        lines = read_lines(self.file) if self.file.exists() else []
        return {line["name"]: line for line in lines}


def options_of(method: str) -> dict[str, str]:
    """What train.py is told of a method."""
    aggregation, *_ = method.split()
    options = {"agg": aggregation}
    if METHODS[method]:
        options["beta"] = METHODS[method]
    return options


def arguments(options: dict) -> list[str]:
    """{"lr": "1e-5"} -> ["--lr", "1e-5"]"""
    line = []
    for name, value in options.items():
        line += [f"--{name}", str(value)]
    return line


def merit(run: dict, channel: str) -> float:
    """The held-out mean of a channel, over the evaluations of a run except the first."""
    _, *evaluations = run["eval"]
    return float(np.mean([evaluation[channel][0] for evaluation in evaluations]))


def best_rate(runs: dict, done: dict[str, dict], channel: str) -> str | None:
    """The learning rate whose run has the most merit; None before all have run. runs: by rate."""
    if not all(run.name in done for run in runs.values()):
        return None
    return max(runs, key=lambda lr: merit(done[runs[lr].name], channel))


# The program


def main(study: Study, description: str) -> None:
    """Of the scripts of studies. description: what --help says."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run after as many"
    )
    parser.add_argument("--repeat", metavar="NAME", help=f"a run of study/{study.file.name}")
    options = parser.parse_args()
    if options.repeat:
        again(study, options.repeat)
    else:
        work([study], execute, cores(), time.time() + 60 * options.minutes)


def work(studies: list[Study], train: Callable, workers: int, end: float) -> None:
    """Runs what is missing, so many runs at a time.

    train: (study, run) -> its line, or None if it was broken off. end: no run begins after this
    time."""
    under_way = set()

    def share() -> None:
        while time.time() < end:
            with LOCK:
                study, run = take(studies)
                waits = bool(under_way)  # for a run that may decide a rate
                if run:
                    under_way.add(run)
            if run:
                try:
                    finish(study, train(study, run))
                finally:
                    under_way.discard(run)
            elif waits:
                time.sleep(min(10, max(0, end - time.time())))
            else:
                return

    with ThreadPoolExecutor(workers) as pool:
        shares = [pool.submit(share) for _ in range(workers)]
        for one in shares:
            one.result()


def take(studies: list[Study]) -> tuple:
    """The next run that nobody has begun, with its study; None, None if there is none."""
    for study in studies:
        done = study.read()
        for run in study.plan(done):
            if run.name not in TAKEN | done.keys():
                TAKEN.add(run.name)
                return study, run
    return None, None


def finish(study: Study, line: dict | None) -> None:
    """Adds a run's line to the file."""
    if line:
        with LOCK, study.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        last = line["eval"][-1]
        print(f"{line['name']}: {line['minutes']} minutes, held out {last}", flush=True)


def again(study: Study, name: str) -> None:
    """Repeats a run. Says whether all that is kept of it is the same, apart from times."""
    done = study.read()
    if name not in done:
        known = ", ".join(done)
        sys.exit(f"error: --repeat {name}: no such run in {study.file.name}; it has {known}")
    first = done[name]
    run = study.kind(**{key: first[key] for key in study.kind._fields})
    study = study._replace(program=first.get("program", "train.py"))  # the first lines lack it
    second = execute(study, run, f"{name}-again-{time.strftime('%H%M%S')}")
    for key in first:
        if key not in ("name", "program", "options", "minutes", *study.kind._fields):
            same = first[key] == second[key]
            print(f"{key}: " + ("the same" if same else f"{first[key]}, now {second[key]}"))


# A run, and what is kept of it


def execute(study: Study, run, name: str | None = None) -> dict:
    """Trains on one core, or goes on with what was begun, in runs/NAME. Returns the run's line.

    name: other than the run's."""
    name = name or run.name
    folder, log = RUNS / name, RUNS / f"{name}.log"
    RUNS.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / study.program), *run.options()]
    command += ["--name", name, "--save-every", "15", "--resume", "auto"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.run(
            command, cwd=RUNS.parent, stdout=out, stderr=out, check=False, env=one_thread
        )
    if process.returncode:
        sys.exit(f"error: {name} ended with status {process.returncode}, see {log}")
    shutil.rmtree(folder / "checkpoint")
    return kept(study, run, folder)


def kept(study: Study, run, folder: Path) -> dict:
    """The line of a run that is done. folder: the run's directory."""
    lines, samples = read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")
    steps = [line for line in lines if "channels" in line]
    evaluations = []
    for line in lines:
        if "eval" in line:
            means = {name: rounded(values) for name, values in line["eval"].items()}
            evaluations.append({"step": line["step"], **means})
    trained, credit = {}, {}
    for key in ("joint", "length_mean", "entropy", "truncated", "no_signal"):
        trained[key] = rounded(step[key] for step in steps)
    for channel in dict.fromkeys(name for step in steps for name in step["channels"]):
        of_channel = [step["channels"].get(channel, {}) for step in steps]
        trained[channel] = rounded(numbers.get("mean") for numbers in of_channel)
        credit[channel] = rounded(numbers.get("credit") for numbers in of_channel)
    seconds = sum(sum(step["seconds"].values()) for step in steps)
    return {
        "name": run.name,
        **run._asdict(),
        "program": study.program,
        "options": " ".join(run.options()),
        "cpu": processor(),
        "versions": json.loads((folder / "config.json").read_text())["versions"],
        "minutes": round(seconds / 60, 1),
        "eval": evaluations,
        **study.more(samples),
        "train": trained,
        "credit": credit,
    }


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]
