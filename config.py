"""The options of train.py and of eval.py, and reading them from the command line.

Each option has its name, type, default and bounds on one line, and below it what --help says.
Nothing here takes long to import, so that --help and a wrong option are answered at once.
"""

import argparse
import datetime
import importlib.util
import math
import os
import re
import shutil
from typing import ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

import tasks
from infra.ranks import RANK, InputError, check_launch


class JudgeOptions(BaseModel):
    """The judge of rubrics and HealthBench. Its key is in the environment: JUDGE_API_KEY."""

    # The text below an option becomes its description.
    model_config = ConfigDict(use_attribute_docstrings=True)

    judge_url: str | None = None
    """OpenAI-compatible endpoint, such as http://localhost:8000/v1"""
    judge_model: str | None = None
    """the judge's name there"""
    judge_mode: Literal["each", "all"] = "each"
    """each: a request a criterion; all: one a response"""
    judge_cache: str | None = None
    """file in which verdicts are kept and looked up"""
    judge_concurrency: int = Field(64, ge=1)
    """most requests at a time, over all ranks"""
    judge_timeout: float = Field(120.0, ge=0.1, le=1e5)
    """seconds for a request, its retries included"""
    judge_max_missing: float = Field(0.2, ge=0, le=1)
    """stop if a larger share of verdicts is missing"""


class Shared(JudgeOptions):
    """The options that both programs have."""

    model_config = ConfigDict(extra="forbid")
    trains: ClassVar[bool] = False
    _given: set[str] = PrivateAttr(default_factory=set)  # the options that the command line had

    # The model
    model: str = "smollm2"
    """smollm2, a hub id, or a directory (a run's, too)"""
    enable_thinking: bool | None = None
    """true or false, for a chat template that knows it, such as Qwen3's"""
    date: str | None = None
    """YYYY-MM-DD, for a chat template that asks (Llama's); default: today"""

    # Data and task
    task: str = "tools"
    """one of the list below, or a file of your own, such as mine.py"""
    eval_data: str | None = None
    """held-out prompts, a file in the task's schema; default: public data, or, with train.py
    --data, its last rows"""

    # Sampling
    engine: Literal["auto", "vllm", "hf"] = "auto"
    """vllm; hf: transformers' generate, slower; auto: vllm where it is installed"""
    gpu_memory: float = Field(0.4, ge=0.01, le=1)
    """share of a GPU's memory that vLLM may take"""

    # The run
    name: str | None = Field(None, pattern=r"^\w[\w.-]{0,99}$")
    """results go to runs/NAME"""
    seed: int = Field(0, ge=0)
    """of all that is drawn at random"""

    def check(self) -> None:
        """Chooses the engine for `auto`. Raises InputError for options that do not go together, or
        that lack a package."""
        try:
            datetime.date.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            raise InputError(f"--date {self.date}: must be YYYY-MM-DD") from None
        installed = importlib.util.find_spec("vllm") is not None
        if self.engine == "vllm" and not installed:
            raise InputError(
                "--engine vllm: vLLM is not installed; pip install -r requirements.txt, "
                "or --engine hf"
            )
        if self.engine == "auto":
            self.engine = "vllm" if installed else "hf"

    def say_engine(self) -> None:
        """Says so if transformers samples because vLLM is not there."""
        chosen = self.engine == "hf" and "engine" not in self._given
        if chosen and RANK == 0 and importlib.util.find_spec("vllm") is None:
            print("vLLM is not installed: transformers samples (--engine hf), which is slower")


class TrainConfig(Shared):
    """The options of train.py."""

    trains: ClassVar[bool] = True

    # Data and task
    data: str | None = None
    """training prompts: parquet, JSON, JSONL or CSV in the task's schema; default: public data"""
    weights: str | None = None
    """of channels, NAME=NUMBER,...; 0: logged only. Of rubrics: uniform, category or row"""

    # The method
    agg: Literal["rvpo", "gdpo", "grpo", "explicit", "softmin", "hardmin"] = "rvpo"
    """rvpo, gdpo (mean), grpo (raw sum), explicit (mean - beta * var), hardmin, softmin (ours)"""
    beta: str = "0.5:2"
    """soft-min sharpness: a number, or START:END, linear over the run"""
    kl: float = Field(0.0, ge=0, le=1e6)
    """coefficient of the KL penalty to the initial policy"""

    # Sampling
    prompts: int = Field(128, ge=1)
    """P, prompts a step, over all ranks"""
    group: int = Field(8, ge=2, le=10_000)
    """G, rollouts a prompt"""
    temperature: float = Field(1.0, ge=0.01, le=100)
    """of sampling and of the trained distribution"""
    max_tokens: int = Field(1024, ge=1)
    """longest response"""

    # Optimization
    steps: int = Field(100, ge=1)
    """batches to sample and train on"""
    updates: int = Field(1, ge=1)
    """optimizer steps a batch, each on prompts of its own; 1 is on-policy"""
    lora: int = Field(0, ge=0, le=4096)
    """rank of adapters that are trained instead of all weights (LoRA); 0: all weights"""
    lora_alpha: float | None = Field(None, ge=0.01, le=1e6)
    """an adapter's product is scaled by this / rank; default: 2 x rank"""
    lr: float = Field(1e-6, ge=0, le=100)
    """AdamW's learning rate; with --lora the default is 10 times as large"""
    clip: str = "0.2:0.2"
    """LOW:HIGH: a ratio of new and old probabilities beyond 1 - LOW or 1 + HIGH gains nothing"""
    mask_truncated: bool = False
    """responses that were cut off at --max-tokens are not trained on"""
    correction: Literal["token", "sequence"] = "token"
    """importance weights for the gap of engine and trainer. token: one per token, capped at 2;
    sequence: one per response, and responses whose weight exceeds 3 are left out"""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: falls to 0 until the run's end"""
    warmup: int = Field(5, ge=0)
    """steps of linear warm-up"""
    tokens_per_microbatch: int = Field(8192, ge=1)
    """most tokens in one forward: memory, not the gradient"""
    kernels: Literal["eager", "compile", "liger"] = "eager"
    """of the decoder's layers: transformers' own, torch.compile's, or the package liger-kernel's"""
    flash_attention_3: bool = False
    """attention by the package flash_attn_interface, for H100 and newer GPUs"""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """on, off, or auto: on a GPU that has no room without"""

    # The run
    eval_every: int = Field(0, ge=0)
    """steps between evaluations; 0: before and after the run only"""
    eval_prompts: int = Field(128, ge=0)
    """held-out prompts, one sample each"""
    keep_policies: bool = False
    """the policy of each evaluation, in runs/NAME/policies/step-N"""
    save_every: str = Field("auto", pattern=r"^(auto|\d+)$")
    """steps between checkpoints; auto: as often as takes 1% of the time; 0: only when stopped"""
    resume: str | None = None
    """runs/NAME: go on, with its options; auto: if --name has a checkpoint"""
    track: Literal["wandb", "trackio"] | None = None
    """log there, too: pip install it first"""
    plan: str | None = Field(None, pattern=r"^(here|[1-9][0-9]{0,2}x[\w ]+)$")
    """only say what the run would take: here, or on such as 8xH100; nothing is loaded"""

    def check(self) -> None:
        super().check()
        if self.updates > self.prompts:
            raise InputError(
                f"--updates {self.updates}: at most --prompts ({self.prompts}), for each needs some"
            )
        parse_clip(self.clip)
        if self.kernels == "compile" and not any(map(shutil.which, COMPILERS)):
            raise InputError(
                "--kernels compile needs a C++ compiler (Debian, Ubuntu: apt-get install g++ "
                "python3-dev); or leave it out"
            )
        if self.kernels == "liger":
            need("--kernels liger", "liger_kernel", "a GPU and `pip install liger-kernel`")
        if self.flash_attention_3:
            need("--flash-attention-3", "flash_attn_interface", "a GPU and FlashAttention 3")
        if self.lora:
            need(f"--lora {self.lora}", "peft", "`pip install peft`")
        if self.lora_alpha and not self.lora:
            raise InputError(f"--lora-alpha {self.lora_alpha}: give --lora, too, or leave it out")
        if self.lora and "lr" not in self._given:
            self.lr *= 10  # "LoRA Without Regret" (Thinking Machines, 2025), and TRL's guide
        if math.inf in parse_beta(self.beta) and self.agg == "explicit":
            raise InputError(
                "--beta inf: the explicit penalty, mean - beta * variance, needs a finite beta"
            )
        if "beta" in self._given and self.agg in ("gdpo", "grpo", "hardmin"):
            raise InputError(
                f"--beta {self.beta}: --agg {self.agg} has no beta; leave it out, or "
                "choose another --agg"
            )


class EvalConfig(Shared):
    """The options of eval.py."""

    # The model
    policies: bool = False
    """each policy in runs/NAME/policies, of the run that --model names"""

    # Data and task
    limit: int | None = Field(None, ge=1)
    """only the first rows (bfcl: of each category)"""
    subset: str = "full"
    """of healthbench: full, hard or consensus"""
    repeats: int = Field(4, ge=1, le=1000)
    """of gpqa: answers a question, its choices in another order each"""

    # Sampling
    temperature: float | None = Field(None, ge=0, le=100)
    """of sampling; default: the task's own"""
    max_tokens: int | None = Field(None, ge=1)
    """longest response; default: the task's own"""
    gpu_memory: float = Field(0.9, ge=0.01, le=1)
    """share of a GPU's memory that vLLM may take"""


COMPILERS = os.environ.get("CXX", "g++"), "clang++", "c++"
# Defaults that replace those above for --model smollm2: 135M parameters on two cores.
SMOLLM2 = {"prompts": 4, "steps": 14, "max_tokens": 64, "lr": 2e-5, "warmup": 2, "eval_prompts": 64}


def parse_beta(text: str) -> tuple[float, float]:
    """'2' -> (2, 2); '0.5:2' -> (0.5, 2). Raises InputError on anything that is no schedule."""
    try:
        numbers = [float(part) for part in text.split(":")]
        start, end = numbers * 2 if len(numbers) == 1 else numbers
        if not (start >= 0 and end >= 0) or (math.inf in (start, end) and start != end):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--beta: beta '{text}' is neither a number >= 0 nor START:END, such as 2 or 0.5:2"
        ) from None
    return start, end


def need(given: str, module: str, what: str) -> None:
    """Raises InputError if a package that few runs need is not installed."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{given} needs {what}; or leave it out")


def parse_clip(text: str) -> tuple[float, float]:
    """'0.2:0.28' -> (0.2, 0.28). Raises InputError."""
    try:
        low, high = (float(part) for part in text.split(":"))
        if not (0 < low <= 1 and 0 < high < math.inf):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--clip {text}: must be LOW:HIGH, two numbers above 0 of which LOW is at most 1, such "
            "as 0.2:0.28"
        ) from None
    return low, high


# Reading the command line


def parse(kind: type[Shared], description: str, argv: list[str] | None = None) -> Shared:
    """The command line as a TrainConfig or an EvalConfig. Raises InputError for the first thing
    that is wrong."""
    presets = SMOLLM2 if kind is TrainConfig else {}
    given = vars(make_parser(kind, description, presets).parse_args(argv))
    check_launch()
    for name, text in given.items():
        check_text(name, text)
    if given.get("model", "smollm2") != "smollm2":
        presets = {}
    config = validate(kind, {**presets, **given})
    config._given = set(given)
    if given.get("plan") and given.get("resume"):
        raise InputError("--plan: a resumed run has been planned; leave --resume out")
    # --resume runs/NAME: the run's own options count, which were checked when it began. Without
    # --resume, or with auto, which may begin a new run, they are checked here.
    if given.get("resume") in (None, "auto"):
        config.check()
        check_use(config.task, given)
    return config


# How --help groups the options, in this order.
GROUPS = {
    "model": ("model", "lora", "lora_alpha", "enable_thinking", "date", "policies"),
    "data and task": ("task", "data", "eval_data", "weights", "limit", "subset", "repeats"),
    "method": ("agg", "beta", "kl"),
    "sampling": ("prompts", "group", "temperature", "max_tokens", "engine", "gpu_memory"),
    "optimization": (
        "steps",
        "updates",
        "lr",
        "lr_schedule",
        "warmup",
        "clip",
        "mask_truncated",
        "correction",
        "tokens_per_microbatch",
        "gradient_checkpointing",
        "kernels",
        "flash_attention_3",
    ),
    "run": (
        "name",
        "seed",
        "eval_every",
        "eval_prompts",
        "keep_policies",
        "save_every",
        "resume",
        "track",
        "plan",
    ),
    "judge": tuple(JudgeOptions.model_fields),
}
# What an option takes, where its type does not say so.
TAKES = {
    "model": "NAME|DIR",
    "task": "NAME|FILE.py",
    "data": "FILE",
    "eval_data": "FILE",
    "judge_cache": "FILE",
    "judge_url": "URL",
    "weights": "NAME=NUMBER,...",
    "beta": "NUMBER|START:END",
    "clip": "LOW:HIGH",
    "date": "YYYY-MM-DD",
    "name": "NAME",
    "judge_model": "NAME",
    "save_every": "auto|STEPS",
    "resume": "auto|runs/NAME",
    "plan": "here|8xH100",
    "subset": "NAME",
    "enable_thinking": "true|false",
}


def make_parser(kind: type[Shared], description: str, presets: dict) -> argparse.ArgumentParser:
    """A parser that returns texts, of the options that the command line has."""
    offered = [name for name in tasks.FILES if not kind.trains or name not in tasks.BENCHMARKS]
    lines = [f"  {name:14}{tasks.ABOUT[name]}" for name in offered]
    parser = argparse.ArgumentParser(
        description=description,
        epilog="\n".join(["tasks:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=f"{'train.py' if kind.trains else 'eval.py'} [options]",
    )
    parser.error = fail
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name in kind.model_fields:
                add_option(group, name, kind.model_fields[name], presets)
    return parser


def add_option(group, name: str, field, presets: dict) -> None:
    default = "" if field.default is None else f" (default {field.default})"
    if name in presets:
        default = f" (default {field.default}; of smollm2: {presets[name]})"
    text = " ".join(field.description.split()) + default
    group.add_argument(
        option(name),
        metavar=TAKES.get(name) or takes(field.annotation),
        default=argparse.SUPPRESS,
        nargs="?" if field.annotation is bool else None,
        const="true" if field.annotation is bool else None,
        help=text.replace("%", "%%"),  # argparse formats it with %
    )


def takes(annotation) -> str:
    """What an option of this type takes, for --help."""
    if annotation is bool:
        return "true|false"
    choices = get_args(annotation)
    if choices and type(None) in choices:  # X | None
        annotation, *_ = choices
        choices = get_args(annotation)
    return "|".join(choices) if choices else "NUMBER"


def fail(message: str) -> None:
    raise InputError(f"{message}; see --help")


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_text(name: str, text: str) -> None:
    """Raises InputError for an option that is empty, or that would put a secret into a file."""
    if not text.strip():
        raise InputError(f"{option(name)} is empty: give it a value, or leave it out")
    if re.match(r"\w+://[^/\s]*@", text):
        raise InputError(
            f"{option(name)} holds a password, which would be written to runs/: a judge's key goes "
            "into the environment variable JUDGE_API_KEY"
        )


# What pydantic says to programmers, as one says it to a user: by the kind of error, or, for a
# pattern that does not match, by the option.
PLAIN = {
    "int_parsing": "should be a whole number",
    "int_parsing_size": "has too many digits",
    "float_parsing": "should be a number",
    "bool_parsing": "should be true or false",
    "string_unicode": "is no valid text",
    "name": "should be letters, digits, '_', '.' and '-', at most 100, and not begin with '.' or "
    "'-'",
    "save_every": "should be auto, or a number of steps, such as 20",
    "plan": "should be here, or a number and a GPU, such as 8xH100",
}


def validate(kind: type[Shared], values: dict) -> Shared:
    """Texts become numbers, and numbers are held to their bounds. Raises InputError."""
    try:
        return kind(**values)
    except ValidationError as error:
        wrong, *_ = error.errors()
        name, *_ = wrong["loc"]
        key = name if wrong["type"] == "string_pattern_mismatch" else wrong["type"]
        message = PLAIN.get(key, wrong["msg"].removeprefix("Input "))
        raise InputError(f"{option(name)} {wrong['input'][:60]}: {message}") from None


def check_use(task: str, given: dict[str, str]) -> None:
    """Raises InputError for an option that was given, and that the task does not read."""
    reads = getattr(tasks.task_module(task), "OPTIONS", None) or ()
    if isinstance(reads, str):
        reads = [reads]
    for name in ("data", "eval_data", "subset", "repeats", *JudgeOptions.model_fields):
        if name not in given or name in reads:
            continue
        advice = "leave it out"
        if task not in tasks.FILES:
            advice += f", or, if its file reads it, say so there: OPTIONS = ({name!r},)"
        raise InputError(f"{option(name)} {given[name]}: the task {task} does not use it; {advice}")
