"""The options of train.py and of eval.py, a line each: name, type, default, bounds, help.
Nothing here takes long to import, so that --help and a wrong option are answered at once."""

import argparse
import datetime
import importlib.util
import math
import re
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

import tasks
from infra.ranks import RANK, InputError, check_launch


class JudgeOptions(BaseModel):
    """The judge of rubrics and HealthBench. Its key is in the environment variable JUDGE_API_KEY."""

    judge_url: str | None = Field(
        None, description="OpenAI-compatible endpoint, such as http://localhost:8000/v1"
    )
    judge_model: str | None = Field(None, description="the judge's name there")
    judge_mode: Literal["each", "all"] = Field(
        "each", description="each: a request a criterion; all: one a response"
    )
    judge_cache: str | None = Field(
        None, description="file in which verdicts are kept and looked up"
    )
    judge_concurrency: int = Field(64, ge=1, description="most requests at a time, over all ranks")
    judge_timeout: float = Field(
        120.0, ge=0.1, le=1e5, description="seconds for a request, its retries included"
    )
    judge_max_missing: float = Field(
        0.2, ge=0, le=1, description="stop if a larger share of verdicts is missing"
    )


class Shared(JudgeOptions):  # what both programs have
    model_config = ConfigDict(extra="forbid")
    trains: ClassVar[bool] = False
    _given: set[str] = PrivateAttr(default_factory=set)  # the options that the command line had

    model: str = Field("smollm2", description="smollm2, a hub id, or a directory (a run's, too)")
    task: str = Field(
        "tools", description=f"{', '.join(tasks.FILES)}, or a file of your own, such as mine.py"
    )
    eval_data: str | None = Field(
        None,
        description="held-out prompts, a file in the task's schema; default: public "
        "data, or, with train.py --data, its last rows",
    )
    engine: Literal["auto", "vllm", "hf"] = Field(
        "auto",
        description="vllm; hf: transformers' generate, slower; auto: vllm where it is installed",
    )
    gpu_memory: float = Field(
        0.4, ge=0.01, le=1, description="share of a GPU's memory that vLLM may take"
    )
    date: str | None = Field(
        None, description="YYYY-MM-DD, for a chat template that asks (Llama's); default: today"
    )
    enable_thinking: bool | None = Field(
        None, description="true or false, for a chat template that knows it, such as Qwen3's"
    )
    seed: int = Field(0, ge=0, description="of all that is drawn at random")
    name: str | None = Field(
        None, pattern=r"^\w[\w.-]{0,99}$", description="results go to runs/NAME"
    )

    def check(self) -> None:
        """Raises InputError for what no option shows by itself."""
        try:
            datetime.date.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            raise InputError(f"--date {self.date}: must be YYYY-MM-DD") from None
        installed = importlib.util.find_spec("vllm") is not None
        if self.engine == "vllm" and not installed:
            raise InputError(
                "--engine vllm: vLLM is not installed; pip install -r requirements.txt, or --engine hf"
            )
        if self.engine == "auto":
            self.engine = "vllm" if installed else "hf"
            if not installed and RANK == 0:
                print("vLLM is not installed: transformers samples (--engine hf), which is slower")


class TrainConfig(Shared):  # the options of train.py
    trains: ClassVar[bool] = True

    data: str | None = Field(
        None,
        description="training prompts: parquet, JSON, JSONL or CSV in the task's schema; "
        "default: public data",
    )
    weights: str | None = Field(
        None,
        description="of channels, NAME=NUMBER,...; 0: logged only. Of rubrics: uniform, "
        "category or row",
    )
    agg: Literal["rvpo", "gdpo", "grpo", "explicit", "softmin", "hardmin"] = Field(
        "rvpo",
        description="rvpo, gdpo (mean), grpo (raw sum), explicit (mean - beta * var), hardmin, softmin (ours)",
    )
    beta: str = Field(
        "0.5:2", description="soft-min sharpness: a number, or START:END, linear over the run"
    )
    group: int = Field(8, ge=2, le=10_000, description="G, rollouts a prompt")
    prompts: int = Field(128, ge=1, description="P, prompts a step, over all ranks")
    updates: int = Field(
        1, ge=1, description="optimizer steps a batch, each on prompts of its own; 1 is on-policy"
    )
    kl: float = Field(
        0.0, ge=0, le=1e6, description="coefficient of the KL penalty to the initial policy"
    )
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="of sampling and of the trained distribution"
    )
    max_tokens: int = Field(1024, ge=1, description="longest response")
    steps: int = Field(100, ge=1, description="batches to sample and train on")
    lr: float = Field(1e-6, ge=0, le=100, description="AdamW's learning rate")
    lr_schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: falls to 0 until the run's end"
    )
    warmup: int = Field(5, ge=0, description="steps of linear warm-up")
    tokens_per_microbatch: int = Field(
        8192, ge=1, description="most tokens in one forward: memory, not the gradient"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="on, off, or auto: on a GPU that has no room without"
    )
    eval_every: int = Field(
        0, ge=0, description="steps between evaluations; 0: before and after the run only"
    )
    eval_prompts: int = Field(128, ge=0, description="held-out prompts, one sample each")
    keep_policies: bool = Field(
        False, description="the policy of each evaluation, in runs/NAME/policies/step-N"
    )
    save_every: str = Field(
        "auto",
        pattern=r"^(auto|\d+)$",
        description="steps between checkpoints; auto: as often as "
        "takes 1% of the time; 0: only when stopped",
    )
    track: Literal["wandb", "trackio"] | None = Field(
        None, description="log there, too: pip install it first"
    )
    resume: str | None = Field(
        None, description="runs/NAME: go on, with its options; auto: if --name has a checkpoint"
    )

    def check(self) -> None:
        super().check()
        if self.updates > self.prompts:
            raise InputError(
                f"--updates {self.updates}: at most --prompts ({self.prompts}), for each needs some"
            )
        if math.inf in parse_beta(self.beta) and self.agg == "explicit":
            raise InputError(
                "--beta inf: the explicit penalty, mean - beta * variance, needs a finite beta"
            )
        if "beta" in self._given and self.agg in ("gdpo", "grpo", "hardmin"):
            raise InputError(
                f"--beta {self.beta}: --agg {self.agg} has no beta; leave it out, or "
                "choose another --agg"
            )


class EvalConfig(Shared):  # the options of eval.py
    limit: int | None = Field(
        None, ge=1, description="only the first rows (bfcl: of each category)"
    )
    subset: str = Field("full", description="of healthbench: full, hard or consensus")
    repeats: int = Field(
        4,
        ge=1,
        le=1000,
        description="of gpqa: answers a question, its choices in another order each",
    )
    temperature: float | None = Field(
        None, ge=0, le=100, description="of sampling; default: the task's own"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="longest response; default: the task's own"
    )
    policies: bool = Field(
        False, description="each policy in runs/NAME/policies, of the run that --model names"
    )
    gpu_memory: float = Field(
        0.9, ge=0.01, le=1, description="share of a GPU's memory that vLLM may take"
    )


# train.py's defaults for --model smollm2: what fits 135M parameters on two cores is no setting for 7B on GPUs.
SMOLLM2 = {"prompts": 4, "steps": 14, "max_tokens": 64, "lr": 2e-5, "warmup": 2, "eval_prompts": 64}


def parse_beta(text: str) -> tuple[float, float]:
    """'2' -> (2, 2); '0.5:2' -> (0.5, 2). Raises InputError on anything that is no schedule."""
    try:
        parts = [float(part) for part in text.split(":")]
        start, end = parts * 2 if len(parts) == 1 else parts
        if not (start >= 0 and end >= 0) or (math.inf in (start, end) and start != end):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--beta: beta '{text}' is neither a number >= 0 nor START:END, such as 2 or 0.5:2"
        ) from None
    return start, end


# What pydantic says to programmers, as one says it to a user. The last two are options that have a
# pattern.
PLAIN = {
    "int_parsing": "should be a whole number",
    "int_parsing_size": "has too many digits",
    "float_parsing": "should be a number",
    "bool_parsing": "should be true or false",
    "string_unicode": "is no valid text",
    "name": "should be letters, digits, '_', '.' and '-', at most 100, and not begin with '.' or "
    "'-'",
    "save_every": "should be auto, or a number of steps, such as 20",
}


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(kind: type[Shared], description: str, argv: list[str] | None = None) -> Shared:
    """The command line as a TrainConfig, or what eval.py has. Raises InputError for the first thing that is wrong."""

    def fail(message: str) -> None:
        raise InputError(f"{message}; see --help")

    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    presets = SMOLLM2 if kind is TrainConfig else {}
    for name in sorted(
        kind.model_fields, key=lambda name: name in JudgeOptions.model_fields
    ):  # the judge's come last
        field = kind.model_fields[name]
        other = f"; of smollm2: {presets[name]}" if name in presets else ""
        default = f" (default {field.default}{other})" * (field.default is not None)
        flag = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        parser.add_argument(
            option(name),
            metavar="",
            default=argparse.SUPPRESS,
            **flag,
            help=(field.description + default).replace("%", "%%"),
        )  # argparse formats it with %
    given = vars(parser.parse_args(argv))
    check_launch()
    for name, value in given.items():
        if not value.strip():
            raise InputError(f"{option(name)} is empty: give it a value, or leave it out")
        if re.match(r"\w+://[^/\s]*@", value):
            raise InputError(
                f"{option(name)} holds a password, which would be written to runs/: a judge's key goes "
                "into the environment variable JUDGE_API_KEY"
            )
    try:
        config = kind(
            **{**(presets if given.get("model", "smollm2") == "smollm2" else {}), **given}
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        name, kind_of_error = wrong["loc"][0], wrong["type"]
        known_as = name if kind_of_error == "string_pattern_mismatch" else kind_of_error
        message = PLAIN.get(known_as, wrong["msg"].removeprefix("Input "))
        raise InputError(f"{option(name)} {wrong['input'][:60]}: {message}") from None
    config._given = {*given}
    if given.get("resume", "auto") != "auto":
        return config  # the run's own options count
    config.check()
    reads = getattr(tasks.task_module(config.task), "OPTIONS", None) or ()
    if isinstance(reads, str):
        reads = [reads]
    for name in ("data", "eval_data", "subset", "repeats", *JudgeOptions.model_fields):
        if name in given and name not in reads:
            advice = "leave it out"
            if config.task not in tasks.FILES:
                advice += f", or, if its file reads it, say so there: OPTIONS = ({name!r},)"
            raise InputError(
                f"{option(name)} {given[name]}: the task {config.task} does not use it; {advice}"
            )
    return config
