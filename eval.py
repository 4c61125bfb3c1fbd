"""Evaluate a model on a task, or every policy that a run has kept.

    python eval.py --task bfcl --model runs/RUN               # a run, a directory, a hub id
    torchrun --nproc_per_node=8 eval.py --task healthbench --model Qwen/Qwen2.5-7B \\
        --judge-url https://api.openai.com/v1 --judge-model gpt-4.1-2025-04-14
    python eval.py --task bfcl --model runs/RUN --policies    # of train.py --keep-policies
    python tools/compare.py runs/A runs/B                     # are two evaluations different?

Writes runs/NAME/results.json (every metric's mean and bootstrap standard error, the settings) and
samples.jsonl (one line an item, with its scores), and prints the table. --policies writes both into
runs/NAME/step-N/ for each policy, and goes on, with the same --name, where it broke off.
"""

import sys

from config import EvalConfig, parse
from infra.ranks import RANK, InputError, join, on_rank_0, run_program

try:  # before torch is imported: a wrong option must not wait for it
    CONFIG = parse(EvalConfig, __doc__) if __name__ == "__main__" else None
except InputError as error:
    sys.exit(f"error: {error}")

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import policy
import rewards
import rollout
from infra import pretrained
from infra.bootstrap import Table, summarize
from infra.log import RunLog
from infra.prompts import Prompt, dated, encode, may_think, today
from infra.run_directory import by_step, make_run, versions, write_json
from tasks import load_prompts, load_task


def main(config: EvalConfig) -> None:
    config.say_engine()
    device = join()
    config = config.model_copy(update={"date": today(config.date)})
    name = config.name or f"eval-{Path(config.task).stem}-{time.strftime('%m%d-%H%M%S')}"
    if config.policies:
        with make_run(name, again="step-*") as run:
            tables = evaluate_policies(config, run, device)
        if RANK == 0:
            print_policies(tables)
            print(f"\n{run}: step-N/results.json, step-N/samples.jsonl")
    else:
        with make_run(name) as run:
            table = evaluate(config, run, device)
        if RANK == 0:
            print_table(table)
            print(f"\n{run}: results.json, samples.jsonl")


def evaluate(config: EvalConfig, run: Path, device: torch.device) -> Table:
    """Samples a response to each prompt of the task, scores them, and writes both files into `run`.

    Raises InputError.
    """
    exam = prepare(config, config.model)
    engine = load_engine(config, exam, device)
    return measure(config, rollout.Sampler(engine, exam.task, config.seed), exam.prompts, run)


def evaluate_policies(config: EvalConfig, run: Path, device: torch.device) -> dict[Path, Table]:
    """Evaluates each policy that --model has kept, by one engine, unless that is already done.

    Returns {run/step-N: its table} in the order of the steps. Raises InputError.
    """
    paths = kept_policies(config)
    exam = prepare(config, str(paths[0]))
    configs = {run / path.name: config.model_copy(update={"model": str(path)}) for path in paths}
    tables = {}
    for folder, of_policy in configs.items():
        tables[folder] = earlier_table(folder, settings(of_policy, exam.decoding, exam.prompts))
    if all(tables.values()):
        return tables
    engine = load_engine(config, exam, device)
    sampler = rollout.Sampler(engine, exam.task, config.seed)
    for folder, of_policy in configs.items():
        if not tables[folder]:
            push(Path(of_policy.model), engine)
            tables[folder] = measure(of_policy, sampler, exam.prompts, folder)
    return tables


def measure(
    config: EvalConfig, sampler: rollout.Sampler, prompts: list[Prompt], folder: Path
) -> Table:
    """Evaluates the weights that the engine has, and writes both files into the folder.

    Raises InputError if the judge fails too often; samples.jsonl is written by then.
    """
    task = sampler.task
    sampled = sampler.sample(prompts, 1, "eval")  # one response a prompt
    groups = sampler.score(prompts, sampled)
    samples = records(task, groups)
    write_samples(folder, samples)
    report = task.report([group.rewards.numpy() for group in groups])
    task.check(report)
    averages = task.averages()
    table = summarize(samples, averages, task.clip, config.seed)
    if not table:
        raise InputError(f"no item has a score; the responses are in {folder}/samples.jsonl")

    def write_results() -> None:
        results = {
            "task": config.task,
            "settings": settings(config, sampler.engine.decoding, prompts),
            "metrics": table,
            "channels": described_channels(task, prompts),
            "averages": averages,
            "truncated": float(np.mean([sample["truncated"] for sample in samples])),
            "judge": report,
            "versions": versions(),
        }
        write_json(folder / "results.json", results)

    on_rank_0(write_results)
    return table


def described_channels(task: rewards.Task, prompts: list[Prompt]) -> dict[str, dict]:
    """Of rewards that are functions. A judge's criteria are in samples.jsonl."""
    examples = [prompt.example for prompt in prompts if not prompt.example.criteria]
    return rewards.described(rewards.distinct(task, examples))


# What is asked, and of which model


class Exam(NamedTuple):
    task: rewards.Task
    prompts: list[Prompt]
    decoding: rollout.Decoding
    checkpoint: Path  # of the model
    max_len: int  # most tokens of a prompt and its response


def prepare(config: EvalConfig, model: str) -> Exam:
    """All that is known before a model's weights are loaded. Raises InputError."""
    task = load_task(config)
    _, examples = load_prompts(task, config.task, 0, config.limit)
    if not examples:
        raise InputError(f"{config.eval_data or config.task}: no rows to evaluate on")
    task.try_out(examples[0])  # a faulty reward is found now, and not after all is sampled
    temperature = task.temperature if config.temperature is None else config.temperature
    max_tokens = config.max_tokens or task.max_tokens
    known = pretrained.describe(model, max_tokens)
    tokenizer = known.tokenizer
    prompts = encode(
        tokenizer, examples, known.room, known.embeddings, config.date, config.enable_thinking
    )
    decoding = rollout.Decoding(tokenizer, known.stops, temperature, max_tokens)
    max_len = max(len(prompt.ids) for prompt in prompts) + max_tokens
    if RANK == 0:
        how = f"temperature {temperature:g}, at most {max_tokens} tokens"
        print(f"{config.task}: {len(prompts)} prompts, one sample each at {how}", flush=True)
    return Exam(task, prompts, decoding, known.path, max_len)


def load_engine(config: EvalConfig, exam: Exam, device: torch.device):
    """An engine with the checkpoint's weights. With --policies `push` must fill them first.

    Raises InputError.
    """
    pretrained.announce(config.model)
    with pretrained.readable(config.model):
        if config.engine == "vllm":
            return rollout.VLLMEngine(
                exam.checkpoint,
                exam.decoding,
                exam.max_len,
                config.gpu_memory,
                fixed=not config.policies,
            )
        from local import hf

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return hf.HFEngine(hf.load(exam.checkpoint, device, dtype), exam.decoding)


def kept_policies(config: EvalConfig) -> list[Path]:
    """The policies that --model has kept, in the order of their steps.

    Weights are not loaded. Raises InputError.
    """
    paths = by_step(Path(config.model).expanduser() / "policies")
    if not paths:
        raise InputError(
            f"--policies: {config.model}/policies has no step-N: name a run of "
            "train.py --keep-policies, such as --model runs/NAME"
        )
    for path in paths:
        with pretrained.readable(str(path)):
            pretrained.refuse_quantized(pretrained.resolve(str(path)))
    return paths


def push(path: Path, engine) -> None:
    """Loads a kept policy and hands its weights to the engine. Raises InputError."""
    with pretrained.readable(str(path)):
        weights = policy.load(path, torch.device("cpu"), dtype=engine.dtype, trained=False)
        # vLLM needs some of the KV cache's memory to take weights over.
        engine.sleep()
        engine.push(policy.full_weights(weights, engine.dtype))


# What is written


def records(task: rewards.Task, groups: list[rollout.Group]) -> list[dict]:
    """The lines of samples.jsonl, one an item. Examples with one id are one item."""
    items: dict[tuple[str, str], list[rollout.Group]] = {}
    for i, group in enumerate(groups):
        example = group.prompt.example
        items.setdefault((example.id or str(i), example.category), []).append(group)
    return [record(task, *key, answered) for key, answered in items.items()]


def record(task: rewards.Task, name: str, category: str, groups: list[rollout.Group]) -> dict:
    """An item's line. groups: one, with one response, for each of its examples.

    A score is the mean over the examples that have it, NaN if none has.
    """
    present: dict[str, list[float]] = {}
    responses, details = [], []
    for group in groups:
        (response,) = group.responses
        scores, detail = task.result(group.prompt.example, response.text, group.rewards[0].numpy())
        for score, value in scores.items():
            values = present.setdefault(score, [])
            if not math.isnan(value):
                values.append(value)
        responses.append(response)
        if task.shows_prompts:
            detail = {"prompt": group.prompt.example.messages} | detail
        details.append(detail)
    return {
        "id": name,
        "category": category,
        "scores": {
            score: float(np.mean(values)) if values else math.nan
            for score, values in present.items()
        },
        "truncated": float(np.mean([response.finish == "length" for response in responses])),
        "tokens": sum(len(response.tokens) for response in responses),
        "responses": details,
    }


def write_samples(folder: Path, samples: list[dict]) -> None:
    def start_anew() -> None:
        folder.mkdir(exist_ok=True)
        (folder / "samples.jsonl").unlink(missing_ok=True)  # left by an evaluation that was killed

    on_rank_0(start_anew)
    RunLog(folder).samples(samples)


def settings(config: EvalConfig, decoding: rollout.Decoding, prompts: list[Prompt]) -> dict:
    """What decides the results, for results.json.

    The date and --enable-thinking are named only for models whose prompts depend on them.
    """
    examples = [prompt.example for prompt in prompts]
    used = {
        "items": rewards.digest(examples),
        "model": config.model,
        "engine": config.engine,
        "temperature": decoding.temperature,
        "max_tokens": decoding.max_tokens,
        "seed": config.seed,
    }
    if dated(decoding.tokenizer, examples, config.date, config.enable_thinking):
        used["date"] = config.date
    if may_think(decoding.tokenizer):
        thinks = config.enable_thinking
        used["enable_thinking"] = "default" if thinks is None else thinks
    if config.judge_model:
        used["judge_model"] = config.judge_model
        used["judge_mode"] = config.judge_mode
    return used


def earlier_table(folder: Path, wanted: dict) -> Table | None:
    """The table of an evaluation that is already done, None if there is none.

    wanted: the settings of now. Raises InputError if the evaluation had others.
    """
    file = folder / "results.json"
    if not file.exists():
        return None
    try:
        results = json.loads(file.read_text())
        used, table = results["settings"], results["metrics"]
        different = [key for key in wanted if used.get(key) != wanted[key]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} cannot be read: {type(error).__name__} {error}; delete it, or choose another "
            "--name"
        ) from error
    if different:
        key = different[0]
        raise InputError(
            f"{file} is of another evaluation: {key} is {used.get(key)} there, and {wanted[key]} "
            "now; choose another --name"
        )
    return table


# What is printed


def print_table(table: Table) -> None:
    for metric, values in table.items():
        print(f"{metric:>45}  {values['mean']:.3f} ({values['stderr']:.3f})  n={values['n']}")


def print_policies(tables: dict[Path, Table]) -> None:
    """A line a step. tables: in the order of the steps.

    BEST has the highest mean of the first metric, the earliest of equal ones. FINAL is the last.
    """
    names = [*dict.fromkeys(name for table in tables.values() for name in table)]
    by = names[0]
    means = {path: table[by]["mean"] for path, table in tables.items() if by in table}
    best = max(means, key=means.get)
    *_, final = tables
    print(f"{'':>10}  {'':>11}", *(f"{name:>14}" for name in names), sep="  ")
    for path, table in tables.items():
        marks = ["BEST"] if path == best else []
        marks += ["FINAL"] if path == final else []
        line = [f"{path.name:>10}", f"{' '.join(marks):>11}"]
        for name in names:
            cell = "-"
            if name in table:
                cell = f"{table[name]['mean']:.3f} ({table[name]['stderr']:.3f})"
            line.append(f"{cell:>{max(14, len(name))}}")
        print(*line, sep="  ")
    print(f"BEST: by {by}, chosen on the items that measure it, so it is biased upwards")


if __name__ == "__main__":
    run_program(main, CONFIG)
