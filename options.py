"""train.py's options: one table, the defaults that follow the model, and the checks that need nothing loaded."""

import argparse
import math
import re
import time

import rvpo
from rewards import TASKS, InputError
from rollout import check_engine

# What fits 135M parameters on two cores is no setting for 7B on GPUs.
PRESETS = {
    "smollm2": {"prompts": 4, "steps": 14, "max-tokens": 64, "lr": 2e-5, "warmup": 2, "eval-prompts": 64},
    "tiny": {"prompts": 2, "group": 4, "steps": 2, "max-tokens": 96, "lr": 1e-3, "warmup": 0, "eval-prompts": 4},
}
SMALLEST = {"steps": 1, "group": 2, "prompts": 1, "updates": 1, "max_tokens": 1, "tokens_per_microbatch": 1,
            "warmup": 0, "eval_every": 0, "eval_prompts": 0, "seed": 0, "kl": 0, "is_cap": 0, "lr": 0, "clip_low": 0,
            "clip_high": 0, "temperature": 0.01, "grad_clip": 1e-6, "gpu_memory": 0.01}
LARGEST = {"clip_low": 1, "gpu_memory": 1}


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    def fail(message: str) -> None:
        raise InputError(f"{message}; see --help")

    model = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    model.add_argument("--model", default="smollm2", help="smollm2, tiny, a hub id, a directory or a GGUF file")
    model.error = fail
    preset = PRESETS.get(model.parse_known_args(argv)[0].model, {})
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[model], allow_abbrev=False)
    parser.error = fail

    def option(group, name: str, default, text: str) -> None:
        kind, default = str if default is None else type(default), preset.get(name, default)
        group.add_argument(f"--{name}", default=default, type=kind, help=f"{text} (default {default})")

    task = parser.add_argument_group("task")
    option(task, "task", "tools", "one of " + ", ".join(TASKS))
    option(task, "data", None, "training prompts: parquet, JSON or JSONL (rlla; default: the public file)")
    option(task, "eval-data", None, "held-out prompts (default with --data: its last rows)")
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
    running = parser.add_argument_group("running")
    option(running, "engine", None, "vllm, or hf for transformers' generate (default: vllm where it is installed)")
    option(running, "gpu-memory", 0.4, "share of the GPU's memory that vLLM may take")
    option(running, "eval-every", 0, "steps between evaluations; 0: before and after the run only")
    option(running, "eval-prompts", 128, "held-out prompts, one sample each")
    option(running, "seed", 0, "of the order of the prompts and of the rollouts")
    option(running, "name", None, "results go to runs/NAME (default: task, aggregation, date and time)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Fills in the engine and the name. Raises InputError for what can be seen to be wrong."""
    for name, known in [("task", TASKS), ("agg", rvpo.AGGREGATIONS), ("engine", ["vllm", "hf", None])]:
        if getattr(args, name) not in known:
            raise InputError(f"--{name} {getattr(args, name)}: choose one of {', '.join(filter(None, known))}")
    for name, low in SMALLEST.items():
        high = LARGEST.get(name, math.inf)
        if not (low <= getattr(args, name) <= high and math.isfinite(getattr(args, name))):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}"
                             + (f" and at most {high}" if name in LARGEST else " and finite"))
    if args.updates > args.prompts:
        raise InputError(f"--updates {args.updates}: at most --prompts ({args.prompts}), each has prompts of its own")
    try:
        schedule = rvpo.parse_beta(args.beta)
    except ValueError as error:
        raise InputError(f"--beta: {error}") from error
    if args.agg == "explicit" and math.inf in schedule:
        raise InputError("--beta inf: the explicit penalty, mean - beta * variance, needs a finite beta")
    args.engine = check_engine(args.engine)
    args.name = args.name or f"{args.task}-{args.agg}-{time.strftime('%m%d-%H%M%S')}"
    if not re.fullmatch(r"\w[\w.-]{0,99}", args.name):
        raise InputError(f"--name {args.name}: at most 100 letters, digits, '.', '-', '_'; results go to runs/NAME")
