"""Trains what is missing of an experiment, evaluates every kept policy, and prints the table.

    python experiments/run.py tools                 # experiments/tools.toml, on 8 GPUs
    python experiments/run.py medicine --models 7B --seeds 0 \\
        --judge-url http://HOST:8000/v1 --judge-model NAME
    python experiments/run.py medicine --commands   # what would be typed, a line each
    python experiments/run.py medicine --table      # of the runs that are there
    python experiments/run.py medicine --tiny       # in minutes on a CPU, with a stub of a judge

Stopped or killed, the same line goes on. The runs are runs/TASK-MODEL-METHOD-sSEED; their
evaluations lie beside them. One runs after the other. Another node with the same runs/ takes those
that no node works on.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a script sees its own folder only

from config import EvalConfig, JudgeOptions, TrainConfig, option, parse
from experiments.files import NAMES, read
from infra.ranks import InputError


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiment", choices=NAMES, help="a file in experiments/")
    add("--models", nargs="+", help="some of the experiment's models")
    add("--methods", nargs="+", help="some of its methods")
    add("--seeds", nargs="+", type=int, help="others than its seeds")
    add("--gpus", type=int, default=8, help="of this node (default 8)")
    for name, field in JudgeOptions.model_fields.items():
        if name != "judge_cache":
            add(option(name), help=field.description)
    add(
        "--grader-url",
        help="as --judge-url: of evaluation, if it has another judge than training; its key is in "
        "the environment variable GRADER_API_KEY",
    )
    add("--grader-model", help="as --judge-model")
    tiny = "a tiny model, a few prompts and a stub of a judge, on a CPU"
    add("--tiny", action="store_true", help=tiny)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--commands", action="store_true", help="only print what would be run")
    only.add_argument("--table", action="store_true", help="only print the table of what there is")
    return parser.parse_args()


if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    ARGS = options()

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import tasks
from infra.bootstrap import Table
from infra.resume import MAY_CHANGE
from infra.run_directory import by_step, evaluations, finished
from tools.compare import compare
from tools.stats import holm, sign_flip, spread, table


def main(args: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        if args.tiny:
            import tiny

            args.gpus = 1
            args.judge_model = "stub"
            args.judge_url = stack.enter_context(tiny.judge())
        wanted = jobs(args)
        may_differ = MAY_CHANGE | set(JudgeOptions.model_fields if args.table else ())
        for job in wanted:
            check(job, may_differ)
        for job in wanted:
            if args.commands:
                print_commands(job, args.gpus)
            elif not args.table:
                work(job, args.gpus)
        if not args.commands:
            print("\n" + report(args, wanted))


# Jobs


class Job(NamedTuple):
    """A policy to train and to evaluate."""

    model: str  # the experiment's names
    method: str
    seed: int
    train: list[str]  # words of the command lines, without the program
    evaluate: list[str]

    @property
    def run(self) -> Path:
        return Path("runs") / self.train[self.train.index("--name") + 1]

    @property
    def results(self) -> Path:  # of the evaluation: step-N/results.json for every policy
        return Path("runs") / self.evaluate[self.evaluate.index("--name") + 1]

    def steps(self) -> list[int]:
        """At which its policy was kept; none before its training is finished."""
        if not finished(self.run):
            return []
        return [line["step"] for line in evaluations(self.run)]

    def measured(self) -> dict[int, Table]:
        """The table of each step, {} unless all are there."""
        files = {step: self.results / f"step-{step}" / "results.json" for step in self.steps()}
        if not all(file.exists() for file in files.values()):
            return {}
        return {step: json.loads(file.read_text())["metrics"] for step, file in files.items()}

    def final(self) -> Table:
        tables = self.measured()
        return tables[max(tables)]


def jobs(args: argparse.Namespace) -> list[Job]:
    """All that the command line asks for, the first seed of everything first. Raises InputError."""
    experiment = read(args.experiment)
    tiny = {}
    if args.tiny:
        import tiny as scaled_down

        tiny = scaled_down.options(experiment)
        first, *_ = experiment["models"]
        experiment["models"] = {first: experiment["models"][first]}
    for chosen, part in ((args.models, "models"), (args.methods, "methods")):
        for name in chosen or ():
            if name not in experiment[part]:
                raise InputError(
                    f"--{part} {name}: {args.experiment} has {', '.join(experiment[part])}"
                )
    models = args.models or experiment["models"]
    methods = args.methods or experiment["methods"]
    seeds = args.seeds or experiment["seeds"]
    return [
        make_job(experiment, model, method, seed, args, tiny)
        for seed, model, method in itertools.product(seeds, models, methods)
    ]


def make_job(
    experiment: dict, model: str, method: str, seed: int, args: argparse.Namespace, tiny: dict
) -> Job:
    """tiny: options that count instead of the experiment's. Raises InputError."""
    task, benchmark = experiment["train"]["task"], experiment["eval"]["task"]
    name = f"{task}-{model}-{method.replace(' ', '-')}-s{seed}"
    if args.tiny:
        name = f"tiny-{name}"
    train = {
        **experiment["models"][model],
        **experiment["train"],
        **experiment["methods"][method],
        **judge_options(args, task),
        **tiny.get("train", {}),
        "seed": seed,
        "name": name,
        "resume": "auto",
    }
    grader = {"judge_url": args.grader_url, "judge_model": args.grader_model}
    evaluate = {
        **experiment["eval"],
        **judge_options(args, benchmark, **grader),
        **tiny.get("eval", {}),
        "model": f"runs/{name}",
        "policies": True,
        "name": f"{name}-{benchmark}",
    }
    return Job(model, method, seed, words(train), words(evaluate))


def judge_options(args: argparse.Namespace, task: str, **instead: str | None) -> dict:
    """Those of the command line, if the task has a judge. instead: what counts before them.

    Raises InputError.
    """
    if "judge_url" not in tasks.task_module(task).OPTIONS:
        return {}
    chosen = {}
    for name in JudgeOptions.model_fields:
        chosen[name] = instead.get(name) or getattr(args, name, None)
    for name in ("judge_url", "judge_model"):
        if not chosen[name] and (args.commands or args.table):
            chosen[name] = name.upper()
        if not chosen[name]:
            raise InputError(
                f"{option(name)}: {task} needs a judge, an OpenAI-compatible endpoint; "
                "docs/rubrics.md says how to start one"
            )
    return {name: value for name, value in chosen.items() if value}


def words(options: dict) -> list[str]:
    """Of a command line."""
    line = []
    for name, value in options.items():
        line.append(option(name))
        if value is not True:
            line.append(str(value))
    return line


def check(job: Job, may_differ: set[str]) -> None:
    """Raises InputError for a wrong option, and for a finished run that had others."""
    config = parse(TrainConfig, "", job.train)
    parse(EvalConfig, "", job.evaluate)
    if not finished(job.run):
        return
    trained = json.loads((job.run / "config.json").read_text())
    for name in sorted(config._given - may_differ):
        wanted = getattr(config, name)
        if trained.get(name) != wanted:
            raise InputError(
                f"{job.run} is another run: its {option(name)} is {trained.get(name)}, and "
                f"{wanted} in the experiment; move it away"
            )


# Running


def print_commands(job: Job, gpus: int) -> None:
    start = "python"
    if gpus > 1:
        start = f"torchrun --standalone --nproc_per_node={gpus}"
    print(f"{start} train.py {shlex.join(job.train)}")
    print(f"{start} eval.py {shlex.join(job.evaluate)}")


def work(job: Job, gpus: int) -> None:
    """Trains and evaluates it, unless that is done or another node works on it."""
    launcher = []
    if gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    with locked(socket.gethostname(), True) as host, locked(job.run.name, False) as run:
        if run is None:
            print(f"{job.run}: another node is at it")
            return
        if not finished(job.run):
            call([*launcher, str(ROOT / "train.py"), *job.train], (host, run))
        if not job.measured():
            call([*launcher, str(ROOT / "eval.py"), *job.evaluate], (host, run))


@contextlib.contextmanager
def locked(name: str, wait: bool) -> Iterator[int | None]:
    """runs/.locks/NAME, as a file descriptor; None if another process has it and wait is false.

    Programs that are started have it, too, so that nothing begins beside a run whose runner was
    killed.
    """
    file = Path("runs/.locks") / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield None
                return
            print("waiting for a run that is under way on this node", flush=True)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield opened.fileno()


def call(command: list[str], locks: tuple[int, int]) -> None:
    """Runs a program of ours. If this one is stopped, it is, too, and saves its state."""
    print("\n" + shlex.join(command), flush=True)
    environment = dict(os.environ)
    if "--policies" in command and "GRADER_API_KEY" in environment:
        environment["JUDGE_API_KEY"] = environment["GRADER_API_KEY"]
    process = subprocess.Popen([sys.executable, *command], pass_fds=locks, env=environment)
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        raise InputError(
            f"that ended with status {status}, see above; the same line as before goes on from here"
        )


# The table


LEGEND = """\
Mean ± standard deviation over seeds (n); columns after `final` are the final policy's. best: the \
best of a run's
evaluations, chosen on the items that measure it, so it is biased upwards. p: exact sign-flip test \
of the final score
against {baseline}'s over the seeds that both have; with n of them it cannot be below 2 / 2^n. p \
of each seed: the two
final policies over the benchmark's items, as by tools/compare.py."""


def report(args: argparse.Namespace, wanted: list[Job]) -> str:
    """A table for each model."""
    experiment = read(args.experiment)
    parts = []
    for model in dict.fromkeys(job.model for job in wanted):
        of_model = [job for job in wanted if job.model == model]
        measured: dict[str, dict[int, Job]] = {}  # by method and seed
        for job in of_model:
            if job.measured():
                measured.setdefault(job.method, {})[job.seed] = job
        count = sum(map(len, measured.values()))
        parts.append(
            f"{experiment['train']['task']}, {model}, {experiment['eval']['task']}: "
            f"{count} of {len(of_model)} runs\n\n{model_table(measured, experiment)}"
        )
    return "\n".join([*parts, LEGEND.format(baseline=experiment["baseline"])])


def model_table(measured: dict[str, dict[int, Job]], experiment: dict) -> str:
    """measured: {method: {seed: its evaluated run}}."""
    columns, baseline = experiment["table"]["columns"], experiment["baseline"]
    base = measured.get(baseline, {})
    pairs = {}  # with the baseline's run of the same seed
    differences = {}  # of the final scores
    for method, runs in measured.items():
        seeds = sorted(runs.keys() & base.keys()) if method != baseline else []
        if seeds:
            pairs[method] = [(runs[seed], base[seed]) for seed in seeds]
            differences[method] = [score(run) - score(other) for run, other in pairs[method]]
    p = {method: sign_flip(values) for method, values in differences.items()}
    corrected = dict(zip(p, holm([*p.values()]), strict=True))
    rows = []
    for method, runs in measured.items():
        cells = ["", "", ""]
        if method in p:
            cells = [
                f"{np.mean(differences[method]):+.3f}",
                f"{p[method]:.3f}, {corrected[method]:.3f}",
                ", ".join(items_p(*pair) for pair in pairs[method]),
            ]
        rows.append([method, *score_cells([*runs.values()], columns), *cells])
    return table(
        f"| | n | start | best | final | {' | '.join(columns)} | final - {baseline} | p, Holm "
        "| p of each seed |",
        rows,
    )


def score(run: Job) -> float:
    """The final policy's, of the benchmark's first metric."""
    first, *_ = run.final().values()
    return first["mean"]


def score_cells(runs: list[Job], columns: list[str]) -> list[str]:
    """Of a method's evaluated runs: n, start, best, final, the columns of the final policies."""
    curves = [run.measured() for run in runs]
    metric, *_ = runs[0].final()
    starts, bests = [], []
    for curve in curves:
        means = {step: table[metric]["mean"] for step, table in curve.items()}
        starts.append(means[min(means)])
        bests.append(max(means.values()))
    cells = [str(len(runs)), spread(starts), spread(bests)]
    finals = [curve[max(curve)] for curve in curves]
    for name in (metric, *columns):
        means = [table[name]["mean"] for table in finals if name in table]
        cells.append(spread(means) if means else "-")
    return cells


def items_p(run: Job, base: Job) -> str:
    """Of the two final policies, over the items of the benchmark: tools/compare.py's test."""
    first, second = (by_step(job.results)[-1] / "results.json" for job in (base, run))
    of_first_metric, *_ = compare(first, second)
    return f"{of_first_metric['p']:.3f}"


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main(ARGS)
    except InputError as error:
        sys.exit(f"error: {error}")
