"""An experiment of the paper: trains what is missing of it, evaluates every policy that was kept, prints its table.

    python experiments/run.py tools                  # what experiments/tools.toml says, on the 8 GPUs of this node
    python experiments/run.py medicine --models 7B --seeds 0 --judge-url http://HOST:8000/v1 --judge-model NAME
    python experiments/run.py medicine --commands    # what would be typed, a line each
    python experiments/run.py medicine --table       # of what there is
    python experiments/run.py medicine --tiny        # the whole in minutes on a CPU: a tiny model, a stub of a judge

Stopped or killed, the same line goes on. The runs are runs/TASK-MODEL-METHOD-sSEED, their evaluations lie beside them.
One runs after the other; a node more with the same runs/ takes those at which no other is at work.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a script sees its own folder only

from config import JudgeOptions, TrainConfig, option, parse
from experiments.files import NAMES, read
from infra.ranks import InputError


def options() -> argparse.Namespace:
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
        help="as --judge-url: of evaluation, if it has another judge than training; its key is in the "
        "environment variable GRADER_API_KEY",
    )
    add("--grader-model", help="as --judge-model")
    add(
        "--tiny",
        action="store_true",
        help="a tiny model, a few prompts and a stub of a judge, on a CPU",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--commands", action="store_true", help="only print what would be run")
    only.add_argument("--table", action="store_true", help="only print the table of what there is")
    return parser.parse_args()


if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    ARGS = options()

import contextlib
import fcntl
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
from eval import EvalConfig
from infra.resume import MAY_CHANGE
from infra.run_directory import by_step, evaluations, finished
from tools.compare import compare
from tools.stats import holm, sign_flip, spread, table


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
        return [line["step"] for line in evaluations(self.run)] if finished(self.run) else []

    def measured(self) -> dict[int, dict]:
        """{step: metrics} of all its policies, {} unless all are there."""
        files = {step: self.results / f"step-{step}" / "results.json" for step in self.steps()}
        if not all(file.exists() for file in files.values()):
            return {}
        return {step: json.loads(file.read_text())["metrics"] for step, file in files.items()}


def words(given: dict) -> list[str]:
    return [
        word
        for name, value in given.items()
        for word in ([option(name)] if value is True else [option(name), str(value)])
    ]


def judge_options(args: argparse.Namespace, task: str, **others: str | None) -> dict:
    """Of the command line, if the task has a judge. others: what counts instead, if given. Raises InputError."""
    if "judge_url" not in tasks.task_module(task).OPTIONS:
        return {}
    given = {
        name: others.get(name) or getattr(args, name, None) for name in JudgeOptions.model_fields
    }
    if args.commands or args.table:
        given |= {name: given[name] or name.upper() for name in ("judge_url", "judge_model")}
    if missing := [name for name in ("judge_url", "judge_model") if not given[name]]:
        raise InputError(
            f"{option(missing[0])}: {task} needs a judge, an OpenAI-compatible endpoint; docs/rubrics.md "
            "says how to start one"
        )
    return {name: value for name, value in given.items() if value}


def jobs(args: argparse.Namespace) -> list[Job]:
    """All that the command line asks for, the first seed of everything first. Raises InputError."""
    experiment = read(args.experiment)
    tiny = {}
    if args.tiny:
        import tiny as scaled_down

        tiny = scaled_down.options(experiment)
        experiment["models"] = dict([*experiment["models"].items()][:1])
    for chosen, part in ((args.models, "models"), (args.methods, "methods")):
        if wrong := [name for name in chosen or () if name not in experiment[part]]:
            raise InputError(
                f"--{part} {wrong[0]}: {args.experiment} has {', '.join(experiment[part])}"
            )
    found = []
    for seed in args.seeds or experiment["seeds"]:
        for size in args.models or experiment["models"]:
            for method in args.methods or experiment["methods"]:
                task, benchmark = experiment["train"]["task"], experiment["eval"]["task"]
                name = "tiny-" * args.tiny + f"{task}-{size}-{method.replace(' ', '-')}-s{seed}"
                train = {
                    **experiment["models"][size],
                    **experiment["train"],
                    **experiment["methods"][method],
                    **judge_options(args, task),
                    **tiny.get("train", {}),
                    "seed": seed,
                    "name": name,
                    "resume": "auto",
                }
                grader = judge_options(
                    args, benchmark, judge_url=args.grader_url, judge_model=args.grader_model
                )
                evaluate = {
                    **experiment["eval"],
                    **grader,
                    **tiny.get("eval", {}),
                    "model": f"runs/{name}",
                    "policies": True,
                    "name": f"{name}-{benchmark}",
                }
                found.append(Job(size, method, seed, words(train), words(evaluate)))
    return found


def check(job: Job, may_differ: set[str]) -> None:
    """Raises InputError for a wrong option, and for a finished run that had others."""
    config = parse(TrainConfig, "", job.train)
    parse(EvalConfig, "", job.evaluate)
    if finished(job.run):
        had = json.loads((job.run / "config.json").read_text())
        given = {name: getattr(config, name) for name in config._given - may_differ}
        if other := [name for name in sorted(given) if had.get(name) != given[name]]:
            raise InputError(
                f"{job.run} is another run: its {option(other[0])} is {had.get(other[0])}, and "
                f"{given[other[0]]} in the experiment; move it away"
            )


def launcher(gpus: int) -> list[str]:
    return (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        if gpus > 1
        else []
    )


@contextlib.contextmanager
def locked(name: str, wait: bool) -> Iterator[int | None]:
    """runs/.locks/NAME, as a file descriptor; None if another process has it, and is not to be waited for. What is
    started has it, too, so that nothing begins beside a run whose runner was killed."""
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
    key = {"JUDGE_API_KEY": os.environ["GRADER_API_KEY"]} if "GRADER_API_KEY" in os.environ else {}
    process = subprocess.Popen(
        [sys.executable, *command],
        pass_fds=locks,
        env={**os.environ, **(key if "--policies" in command else {})},
    )
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


def work(job: Job, gpus: int) -> None:
    """Trains and evaluates it, unless that is done or another node is at it."""
    with locked(socket.gethostname(), True) as host, locked(job.run.name, False) as run:
        if run is None:
            print(f"{job.run}: another node is at it")
            return
        if not finished(job.run):
            call([*launcher(gpus), str(ROOT / "train.py"), *job.train], (host, run))
        if not job.measured():
            call([*launcher(gpus), str(ROOT / "eval.py"), *job.evaluate], (host, run))


def row(
    method: str, runs: dict[int, Job], base: dict[int, Job], columns: list[str]
) -> tuple[list[str], list[float]]:
    """Of a method's evaluated runs, by seed: the cells but for p-values, and the final differences from the baseline
    over the seeds that both have."""
    tables = {seed: job.measured() for seed, job in runs.items()}
    metric = next(iter(next(iter(next(iter(tables.values())).values()))))  # the benchmark's first
    first, final = ([curve[step(curve)] for curve in tables.values()] for step in (min, max))
    best = [max(curve[step][metric]["mean"] for step in curve) for curve in tables.values()]
    pairs = [(tables[seed], base[seed].measured()) for seed in sorted(tables.keys() & base.keys())]
    return (
        [
            method,
            str(len(runs)),
            spread([x[metric]["mean"] for x in first]),
            spread(best),
            *(
                spread([x[name]["mean"] for x in final if name in x])
                if any(name in x for x in final)
                else "-"
                for name in (metric, *columns)
            ),
        ],
        [x[max(x)][metric]["mean"] - y[max(y)][metric]["mean"] for x, y in pairs],
    )


def items_p(job: Job, base: Job) -> str:
    """Of the two final policies, over the items of the benchmark: eval.py's paired permutation test."""
    a, b = (by_step(x.results)[-1] / "results.json" for x in (base, job))
    return f"{compare(a, b)[0]['p']:.3f}"


def report(args: argparse.Namespace, found: list[Job]) -> str:
    """A table for each model."""
    experiment, parts = read(args.experiment), []
    columns, baseline = experiment["table"]["columns"], experiment["baseline"]
    for size in dict.fromkeys(job.model for job in found):
        done: dict[str, dict[int, Job]] = {}
        for job in found:
            if job.model == size and job.measured():
                done.setdefault(job.method, {})[job.seed] = job
        base = done.get(baseline, {})
        rows = {method: row(method, runs, base, columns) for method, runs in done.items()}
        p = {m: sign_flip(d) for m, (_, d) in rows.items() if m != baseline and d}
        corrected = dict(zip(p, holm([*p.values()]), strict=True))
        lines = []
        for method, (cells, differences) in rows.items():
            pairs = [(done[method][s], base[s]) for s in sorted(done[method].keys() & base.keys())]
            lines.append(
                [
                    *cells,
                    *(
                        [
                            f"{np.mean(differences):+.3f}",
                            f"{p[method]:.3f}, {corrected[method]:.3f}",
                            ", ".join(items_p(*pair) for pair in pairs),
                        ]
                        if method in p
                        else ["", "", ""]
                    ),
                ]
            )
        total = sum(job.model == size for job in found)
        parts.append(
            f"{experiment['train']['task']}, {size}, {experiment['eval']['task']}: "
            f"{sum(map(len, done.values()))} of {total} runs\n\n"
            + table(
                f"| | n | start | best | final | {' | '.join(columns)} | final - {baseline} | p, Holm | "
                "p of each seed |",
                lines,
            )
        )
    return "\n".join(
        [
            *parts,
            f"""\
Mean ± standard deviation over seeds (n); columns after `final` are the final policy's. best: the best of a run's
evaluations, chosen on the items that measure it, so it is biased upwards. p: exact sign-flip test of the final score
against {baseline}'s over the seeds that both have; with n of them it cannot be below 2 / 2^n. p of each seed: the two
final policies over the benchmark's items, as by tools/compare.py.""",
        ]
    )


def main(args: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        if args.tiny:
            import tiny

            args.gpus = 1
            args.judge_url, args.judge_model = stack.enter_context(tiny.judge()), "stub"
        found = jobs(args)
        for job in found:
            check(job, MAY_CHANGE | ({*JudgeOptions.model_fields} if args.table else set()))
        for job in found:
            if args.commands:
                start = shlex.join(
                    ["torchrun", *launcher(args.gpus)[2:]] if args.gpus > 1 else ["python"]
                )
                print(
                    f"{start} train.py {shlex.join(job.train)}\n{start} eval.py {shlex.join(job.evaluate)}"
                )
            elif not args.table:
                work(job, args.gpus)
        if not args.commands:
            print("\n" + report(args, found))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main(ARGS)
    except InputError as error:
        sys.exit(f"error: {error}")
