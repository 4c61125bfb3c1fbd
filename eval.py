"""Evaluate a model on a task, or every policy that a run has kept.

    python eval.py --task bfcl --model runs/NAME              # a run, a directory, a hub id
    torchrun --nproc_per_node=8 eval.py --task healthbench --model Qwen/Qwen2.5-7B \\
        --judge-url https://api.openai.com/v1 --judge-model gpt-4.1-2025-04-14
    python eval.py --task bfcl --model runs/NAME --policies   # of train.py --keep-policies
    python tools/compare.py runs/A runs/B                     # are two evaluations different?

Writes runs/NAME/results.json (every metric's mean and bootstrap standard error, the settings) and samples.jsonl (one
line an item, with its scores), and prints the table. --policies writes both into runs/NAME/step-N/ for each policy, and
goes on, with the same --name, where it broke off.
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

import numpy as np
import torch

import policy
import rewards
import rollout
from infra import pretrained
from infra.log import RunLog
from infra.prompts import Prompt, dated, encode, may_think, today
from infra.run_directory import by_step, make_run, versions, write_json
from tasks import load_prompts, load_task

RESAMPLES, PAIRED_RESAMPLES = 1_000, 10_000


def metrics(
    samples: list[dict], averages: dict[str, dict[str, float]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{metric: (values (N,), weights (N,))} over all items; the metric is their weighted mean, NaN where an item has no
    such score. averages: {name: {group: weight}} of the score "correct", which is then also given for each group."""
    groups = np.array([sample["category"] for sample in samples])
    values = {
        name: np.array(
            [sample["scores"].get(name) for sample in samples], dtype=float
        )  # None becomes NaN
        for name in dict.fromkeys(name for sample in samples for name in sample["scores"])
    }
    out = {}
    for name, weight in averages.items() if "correct" in values else ():
        sizes = {group: (groups == group).sum() for group in weight}
        out[name] = (
            values["correct"],
            np.array([weight.get(g, 0.0) / sizes.get(g, 1) for g in groups]),
        )
    for group in dict.fromkeys(groups) if averages else []:
        out[str(group)] = np.where(groups == group, values["correct"], np.nan), np.ones(len(groups))
    return out | {
        name: (x, np.ones(len(x)))
        for name, x in values.items()
        if not (averages and name == "correct")
    }


def resample(
    values: np.ndarray, weights: np.ndarray, groups: np.ndarray, n: int, seed: int
) -> np.ndarray:
    """(n,): the weighted mean of n bootstrap samples of the items, drawn within each group."""
    rng, out = np.random.default_rng(seed), np.zeros(n)
    part = values * weights / weights.sum()
    for group in np.unique(groups):
        members = part[groups == group]
        for chunk in np.array_split(
            np.arange(n), max(1, n * len(members) // 1_000_000)
        ):  # in bounded memory
            out[chunk] += members[rng.integers(len(members), size=(len(chunk), len(members)))].sum(
                1
            )
    return out


def summarize(
    samples: list[dict], averages: dict, clip: bool, seed: int
) -> dict[str, dict[str, float]]:
    """{metric: {mean, stderr, n}}. stderr: the standard deviation of bootstrapped means. clip: both to [0, 1]."""
    groups, out = np.array([sample["category"] for sample in samples]), {}
    for name, (values, weights) in metrics(samples, averages).items():
        has = ~np.isnan(values) & (weights > 0)
        if has.any():
            means = resample(values[has], weights[has], groups[has], RESAMPLES, seed)
            mean = np.average(values[has], weights=weights[has])
            low, high = (0, 1) if clip else (-np.inf, np.inf)
            out[name] = {
                "mean": float(np.clip(mean, low, high)),
                "stderr": float(np.clip(means, low, high).std()),
                "n": int(has.sum()),
            }
    return out


def load_engine(
    config: EvalConfig, path: Path, decoding: rollout.Decoding, max_len: int, device: torch.device
):
    """Of the checkpoint as it is; with --policies, the first's, into which `push` puts the weights of each. max_len:
    prompt and response. Raises InputError."""
    pretrained.announce(config.model)
    with pretrained.readable(config.model):
        if config.engine == "vllm":
            return rollout.VLLMEngine(
                path, decoding, max_len, config.gpu_memory, fixed=not config.policies
            )
        from local import hf

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return hf.HFEngine(hf.load(path, device, dtype), decoding)


def records(task: rewards.Task, groups: list[rollout.Group]) -> list[dict]:
    """The lines of samples.jsonl. Examples with one id are one item: its scores are the means of theirs that are not
    missing, NaN if all are."""
    items: dict[tuple[str, str], list[rollout.Group]] = {}
    for i, group in enumerate(groups):
        example = group.prompt.example
        items.setdefault((example.id or str(i), example.category), []).append(group)
    out = []
    for (name, category), members in items.items():
        responses = [group.responses[0] for group in members]
        results = [
            task.result(group.prompt.example, response.text, group.rewards[0].numpy())
            for group, response in zip(members, responses, strict=True)
        ]
        values: dict[str, list[float]] = {}
        for score, value in (pair for scores, _ in results for pair in scores.items()):
            values.setdefault(score, []).extend([] if math.isnan(value) else [value])
        out.append(
            {
                "id": name,
                "category": category,
                "scores": {
                    score: float(np.mean(x)) if x else math.nan for score, x in values.items()
                },
                "truncated": float(
                    np.mean([response.finish == "length" for response in responses])
                ),
                "tokens": sum(len(response.tokens) for response in responses),
                "responses": [more for _, more in results],
            }
        )
    return out


def kept_policies(config: EvalConfig) -> list[Path]:
    """The policies that --model has kept, in the order of their steps. Weights are not loaded. Raises InputError."""
    paths = by_step(Path(config.model).expanduser() / "policies")
    if not paths:
        raise InputError(
            f"--policies: {config.model}/policies has no step-N: name a run of train.py --keep-policies, "
            "such as --model runs/NAME"
        )
    for path in paths:
        with pretrained.readable(str(path)):
            pretrained.refuse_quantized(pretrained.resolve(str(path)))
    return paths


def evaluate(
    config: EvalConfig, run: Path, device: torch.device
) -> dict[Path, dict[str, dict[str, float]]]:
    """Everything. Returns {the folder with the results: metrics}, which is `run`, or run/step-N of each policy. Raises
    InputError."""
    paths = kept_policies(config) if config.policies else []
    task = load_task(config)
    _, examples = load_prompts(task, config.task, 0, config.limit)
    if not examples:
        raise InputError(f"{config.eval_data or config.task}: no rows to evaluate on")
    task.try_out(examples[0])  # a faulty reward is found now, and not after all is sampled
    temperature = task.temperature if config.temperature is None else config.temperature
    max_tokens = config.max_tokens or task.max_tokens
    known = pretrained.describe(str(paths[0]) if paths else config.model, max_tokens)
    prompts = encode(
        known.tokenizer, examples, known.room, known.embeddings, config.date, config.enable_thinking
    )
    max_len = max(len(prompt.ids) for prompt in prompts) + max_tokens
    decoding = rollout.Decoding(known.tokenizer, known.stops, temperature, max_tokens)
    tables = {
        run / kept.name: table
        for kept in paths
        if (
            table := measured(
                run / kept.name,
                settings(config.model_copy(update={"model": str(kept)}), decoding, prompts),
            )
        )
    }
    if paths and len(tables) == len(paths):
        return tables
    engine = load_engine(config, known.path, decoding, max_len, device)
    sampler = rollout.Sampler(engine, task, config.seed)
    if not paths:
        return {run: measure(config, sampler, prompts, run)}
    for kept in paths:
        if run / kept.name in tables:
            continue
        with pretrained.readable(str(kept)):
            weights = policy.load(kept, torch.device("cpu"), dtype=engine.dtype, trained=False)
            engine.sleep()  # as in training: what takes the weights over needs some of the KV cache's memory
            engine.push(policy.full_weights(weights, engine.dtype))
        del weights
        of_kept = config.model_copy(update={"model": str(kept)})
        tables[run / kept.name] = measure(of_kept, sampler, prompts, run / kept.name)
    return {run / kept.name: tables[run / kept.name] for kept in paths}


def settings(config: EvalConfig, decoding: rollout.Decoding, prompts: list[Prompt]) -> dict:
    """What decides the results, for results.json. What matters to some models only: of those."""
    examples, tokenizer = [prompt.example for prompt in prompts], decoding.tokenizer
    found = {
        "items": rewards.digest(examples),
        "model": config.model,
        "engine": config.engine,
        "temperature": decoding.temperature,
        "max_tokens": decoding.max_tokens,
        "seed": config.seed,
    }
    if dated(tokenizer, examples, config.date, config.enable_thinking):
        found["date"] = config.date
    if may_think(tokenizer):
        thinks = config.enable_thinking
        found["enable_thinking"] = "default" if thinks is None else thinks
    return found | (
        {"judge_model": config.judge_model, "judge_mode": config.judge_mode}
        if config.judge_model
        else {}
    )


def measured(folder: Path, wanted: dict) -> dict[str, dict[str, float]] | None:
    """The metrics of an evaluation that is done, None if it is not. Raises InputError if its settings are others."""
    file = folder / "results.json"
    if not file.exists():
        return None
    try:
        results = json.loads(file.read_text())
        found, table = results["settings"], results["metrics"]
        other = [key for key in wanted if found.get(key) != wanted[key]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} cannot be read: {type(error).__name__} {error}; delete it, or choose another "
            "--name"
        ) from error
    if other:
        raise InputError(
            f"{file} is of another evaluation: {other[0]} is {found.get(other[0])} there, and "
            f"{wanted[other[0]]} now; choose another --name"
        )
    return table


def measure(
    config: EvalConfig, sampler: rollout.Sampler, prompts: list[Prompt], run: Path
) -> dict[str, dict[str, float]]:
    """Of the weights that the engine has. Writes results.json and samples.jsonl into `run`. Returns the metrics. Raises
    InputError if the judge fails too often, with samples.jsonl written."""
    task, decoding = sampler.task, sampler.engine.decoding
    groups = sampler.score(prompts, sampler.sample(prompts, 1, "eval"))  # one response a prompt
    samples = records(task, groups)
    on_rank_0(
        lambda: (run.mkdir(exist_ok=True), (run / "samples.jsonl").unlink(missing_ok=True))
    )  # of a killed one
    RunLog(run).samples(samples)
    report = task.report([group.rewards.numpy() for group in groups])
    task.check(report)
    table = summarize(samples, task.averages(), task.clip, config.seed)
    if not table:
        raise InputError(f"no item has a score; the responses are in {run}/samples.jsonl")
    on_rank_0(
        lambda: write_json(
            run / "results.json",
            {
                "task": config.task,
                "settings": settings(config, decoding, prompts),
                "metrics": table,
                "averages": task.averages(),
                "truncated": float(np.mean([record["truncated"] for record in samples])),
                "judge": report,
                "versions": versions(),
            },
        )
    )
    return table


def main(config: EvalConfig) -> None:
    device = join()
    config = config.model_copy(update={"date": today(config.date)})
    name = config.name or f"eval-{Path(config.task).stem}-{time.strftime('%m%d-%H%M%S')}"
    with make_run(name, "step-*" if config.policies else None) as run:
        tables = evaluate(config, run, device)
    if RANK == 0 and config.policies:
        print_policies(tables)
        print(f"\n{run}: step-N/results.json, step-N/samples.jsonl")
    elif RANK == 0:
        for metric, values in tables[run].items():
            print(f"{metric:>45}  {values['mean']:.3f} ({values['stderr']:.3f})  n={values['n']}")
        print(f"\n{run}: results.json, samples.jsonl")


def print_policies(tables: dict[Path, dict[str, dict[str, float]]]) -> None:
    """A line a step. BEST: the highest mean of the first metric, the earliest of equal ones. FINAL: the last step."""
    names = [*dict.fromkeys(name for table in tables.values() for name in table)]
    first = {path: table[names[0]]["mean"] for path, table in tables.items() if names[0] in table}
    best, final = max(first, key=first.get), [*tables][-1]
    print(f"{'':>10}  {'':>11}  " + "  ".join(f"{name:>14}" for name in names))
    for path, table in tables.items():
        mark = " ".join(
            word for word, marked in (("BEST", best), ("FINAL", final)) if marked == path
        )
        cells = [
            f"{table[name]['mean']:.3f} ({table[name]['stderr']:.3f})" if name in table else "-"
            for name in names
        ]
        print(
            f"{path.name:>10}  {mark:>11}  "
            + "  ".join(
                f"{cell:>{max(14, len(name))}}" for name, cell in zip(names, cells, strict=True)
            )
        )
    print(f"BEST: by {names[0]}, chosen on the items that measure it, so it is biased upwards")


if __name__ == "__main__":
    run_program(main, CONFIG)
