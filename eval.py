"""Evaluate a model on a task, or every policy that a run has kept, or compare two evaluations.

    python eval.py --task bfcl --model runs/NAME              # a run, a directory, a hub id
    torchrun --nproc_per_node=8 eval.py --task healthbench --model Qwen/Qwen2.5-7B \\
        --judge-url https://api.openai.com/v1 --judge-model gpt-4.1-2025-04-14
    python eval.py --task bfcl --model runs/NAME --policies   # of train.py --keep-policies
    python eval.py compare runs/A runs/B                      # two evaluations

Writes runs/NAME/results.json (every metric's mean and bootstrap standard error, the settings) and samples.jsonl (one
line an item, with its scores), and prints the table. --policies writes both into runs/NAME/step-N/ for each policy, and
goes on, with the same --name, where it broke off.
"""

import sys

from pydantic import Field

from config import Shared, TaskOptions, parse
from ranks import RANK, InputError, join, on_rank_0, run_program


class EvalConfig(Shared):
    """The options of eval.py."""

    limit: int | None = Field(None, ge=1, description="only the first rows (bfcl: of each category)")
    subset: str = Field("full", description="of healthbench: full, hard or consensus")
    repeats: int = Field(4, ge=1, le=1000, description="of gpqa: answers a question, its choices in another order each")
    temperature: float | None = Field(None, ge=0, le=100, description="of sampling; default: the task's own")
    max_tokens: int | None = Field(None, ge=1, description="longest response; default: the task's own")
    policies: bool = Field(False, description="each policy in runs/NAME/policies, of the run that --model names")
    gpu_memory: float = Field(0.9, ge=0.01, le=1, description="share of a GPU's memory that vLLM may take")

    def task_options(self) -> TaskOptions:
        return TaskOptions(self.task, None, self.data, self.judge_options(), subset=self.subset, repeats=self.repeats,
                           seed=self.seed)


try:  # before torch is imported: a wrong option must not wait for it
    CONFIG = parse(EvalConfig, __doc__) if __name__ == "__main__" and sys.argv[1:2] != ["compare"] else None
except InputError as error:
    sys.exit(f"error: {error}")

import json
import math
import time
from pathlib import Path

import numpy as np
import torch

import model
import policy
import rewards
import rollout
from checkpoint import RunLog, by_step, make_run, versions, write_json

RESAMPLES, PAIRED_RESAMPLES = 1_000, 10_000
UNCOMPARED = {"model", "engine"}  # two evaluations may differ in these
OF_SOME_MODELS = {"date", "enable_thinking"}  # one may lack these: its chat template does not ask


def metrics(samples: list[dict], averages: dict[str, dict[str, float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{metric: (values (N,), weights (N,))} over all items; the metric is their weighted mean, NaN where an item has no
    such score. averages: {name: {group: weight}} of the score "correct", which is then also given for each group."""
    groups = np.array([sample["group"] for sample in samples])
    values = {name: np.array([sample["scores"].get(name) for sample in samples], dtype=float)  # None becomes NaN
              for name in dict.fromkeys(name for sample in samples for name in sample["scores"])}
    out = {}
    for name, weight in averages.items() if "correct" in values else ():
        sizes = {group: (groups == group).sum() for group in weight}
        out[name] = values["correct"], np.array([weight.get(g, 0.0) / sizes.get(g, 1) for g in groups])
    for group in dict.fromkeys(groups) if averages else []:
        out[str(group)] = np.where(groups == group, values["correct"], np.nan), np.ones(len(groups))
    return out | {name: (x, np.ones(len(x))) for name, x in values.items() if not (averages and name == "correct")}


def resample(values: np.ndarray, weights: np.ndarray, groups: np.ndarray, n: int, seed: int) -> np.ndarray:
    """(n,): the weighted mean of n bootstrap samples of the items, drawn within each group."""
    rng, out = np.random.default_rng(seed), np.zeros(n)
    part = values * weights / weights.sum()
    for group in np.unique(groups):
        members = part[groups == group]
        for chunk in np.array_split(np.arange(n), max(1, n * len(members) // 1_000_000)):  # in bounded memory
            out[chunk] += members[rng.integers(len(members), size=(len(chunk), len(members)))].sum(1)
    return out


def summarize(samples: list[dict], averages: dict, clip: bool, seed: int) -> dict[str, dict[str, float]]:
    """{metric: {mean, stderr, n}}. stderr: the standard deviation of bootstrapped means. clip: both to [0, 1]."""
    groups, out = np.array([sample["group"] for sample in samples]), {}
    for name, (values, weights) in metrics(samples, averages).items():
        has = ~np.isnan(values) & (weights > 0)
        if has.any():
            means = resample(values[has], weights[has], groups[has], RESAMPLES, seed)
            mean = np.average(values[has], weights=weights[has])
            low, high = (0, 1) if clip else (-np.inf, np.inf)
            out[name] = {"mean": float(np.clip(mean, low, high)), "stderr": float(np.clip(means, low, high).std()),
                         "n": int(has.sum())}
    return out


def _read(file: Path) -> tuple[dict, list[dict]]:
    """What two evaluations must share, and the items by id."""
    try:
        results = json.loads(file.read_text())
        samples = [json.loads(line) for line in (file.parent / "samples.jsonl").read_text().splitlines()]
        settings = {"task": results["task"], "averages": results["averages"], **results["settings"]}
        samples.sort(key=lambda sample: sample["id"])
        values = [x for sample in samples for x in sample["scores"].values() if x is not None]
        if len({(sample["id"], str(sample["group"])) for sample in samples}) < max(1, len(samples)):
            raise ValueError("no items, or one of them twice")
        if not all(type(x) in (int, float) and abs(x) < math.inf for x in values):
            raise ValueError("a score that is no number")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file} and the samples.jsonl beside it cannot be read as eval.py writes them: "
                         f"{type(error).__name__} {error}") from error
    return settings, samples


def holm(p: list[float]) -> list[float]:
    """p-values, corrected for being several (Holm 1979)."""
    order, out, largest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        out[i] = largest
    return out


def compare(first: Path, second: Path) -> list[dict]:
    """Second minus first, paired by item: a 95% bootstrap interval and the two-sided p-value of a sign-flip permutation
    test, for every metric that both have. All but the first are also corrected together by Holm. Nothing is clipped.
    Raises InputError for different items or settings."""
    (a, a_samples), (b, b_samples) = _read(first), _read(second)
    if a.get("items") != b.get("items") or [(s["id"], s["group"]) for s in a_samples] != [
            (s["id"], s["group"]) for s in b_samples]:
        raise InputError("the two evaluations cannot be compared: they are of different items")
    for key in sorted((a.keys() | b.keys()) - UNCOMPARED):
        x, y = a.get(key), b.get(key)
        if x != y and not (key in OF_SOME_MODELS and None in (x, y)):
            raise InputError(f"the two evaluations cannot be compared: {key} is {x} in {first}, and {y} in {second}")
    groups, rows = np.array([sample["group"] for sample in a_samples]), []
    of_b = metrics(b_samples, b["averages"])
    for name, (x, weights) in metrics(a_samples, a["averages"]).items():
        has = ~np.isnan(x) & ~np.isnan(of_b.get(name, [x * np.nan])[0]) & (weights > 0)
        if not has.any():
            continue
        weights, x, y = weights[has] / weights[has].sum(), x[has], of_b[name][0][has]
        difference = float(weights @ (y - x))
        low, high = np.quantile(resample(y - x, weights, groups[has], PAIRED_RESAMPLES, 0), [0.025, 0.975])
        rng, part, extreme = np.random.default_rng(0), weights * (y - x), 0
        for chunk in np.array_split(np.arange(PAIRED_RESAMPLES), max(1, PAIRED_RESAMPLES * len(part) // 1_000_000)):
            flipped = (rng.integers(2, size=(len(chunk), len(part))) * 2 - 1) @ part
            extreme += int((np.abs(flipped) >= abs(difference) - 1e-12).sum())
        rows.append({"metric": name, "first": float(weights @ x), "second": float(weights @ y),
                     "difference": difference, "low": float(low), "high": float(high),
                     "p": (1 + extreme) / (1 + PAIRED_RESAMPLES), "n": len(x)})
    if not rows:
        raise InputError(f"{first} and {second} have no metric in common")
    for row, p in zip(rows[1:], holm([row["p"] for row in rows[1:]]), strict=True):
        row["p_holm"] = p
    return rows


def load_engine(config: EvalConfig, path: Path, decoding: rollout.Decoding, max_len: int, device: torch.device):
    """Of the checkpoint as it is; with --policies, the first's, into which `push` puts the weights of each. max_len:
    prompt and response. Raises InputError."""
    model.announce(config.model)
    with model.readable(config.model):
        if config.engine == "vllm":
            return rollout.VLLMEngine(path, decoding, max_len, config.gpu_memory, fixed=not config.policies)
        from local import hf

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return hf.HFEngine(hf.load(path, device, dtype), decoding)


def records(task: rewards.Task, groups: list[rollout.Group]) -> list[dict]:
    """The lines of samples.jsonl. Examples with one id are one item: its scores are the means of theirs that are not
    missing, NaN if all are."""
    items: dict[tuple[str, str], list[rollout.Group]] = {}
    for i, group in enumerate(groups):
        example = group.prompt.example
        items.setdefault((example.id or str(i), example.group), []).append(group)
    out = []
    for (name, category), members in items.items():
        responses = [group.responses[0] for group in members]
        results = [task.result(group.prompt.example, response.text, group.rewards[0].numpy())
                   for group, response in zip(members, responses, strict=True)]
        values: dict[str, list[float]] = {}
        for score, value in (pair for scores, _ in results for pair in scores.items()):
            values.setdefault(score, []).extend([] if math.isnan(value) else [value])
        out.append({"id": name, "group": category,
                    "scores": {score: float(np.mean(x)) if x else math.nan for score, x in values.items()},
                    "truncated": float(np.mean([response.finish == "length" for response in responses])),
                    "tokens": sum(len(response.tokens) for response in responses),
                    "responses": [more for _, more in results]})
    return out


def kept_policies(config: EvalConfig) -> list[Path]:
    """The policies that --model has kept, in the order of their steps. Weights are not loaded. Raises InputError."""
    paths = by_step(Path(config.model).expanduser() / "policies")
    if not paths:
        raise InputError(f"--policies: {config.model}/policies has no step-N: name a run of train.py --keep-policies, "
                         "such as --model runs/NAME")
    for path in paths:
        with model.readable(str(path)):
            model.refuse_quantized(model.resolve(str(path)))
    return paths


def evaluate(config: EvalConfig, run: Path, device: torch.device) -> dict[Path, dict[str, dict[str, float]]]:
    """Everything. Returns {the folder with the results: metrics}, which is `run`, or run/step-N of each policy. Raises
    InputError."""
    paths = kept_policies(config) if config.policies else []
    task = rewards.load_task(config.task_options())
    _, examples = rewards.load_prompts(task, config.task, 0, config.limit)
    if not examples:
        raise InputError(f"{config.data or config.task}: no rows to evaluate on")
    task.try_out(examples[0])  # a faulty reward is found now, and not after all is sampled
    temperature = task.temperature if config.temperature is None else config.temperature
    max_tokens = config.max_tokens or task.max_tokens
    known = model.describe(str(paths[0]) if paths else config.model, max_tokens)
    prompts = model.encode(known.tokenizer, examples, known.room, known.embeddings, config.date,
                           config.enable_thinking)
    max_len = max(len(prompt.ids) for prompt in prompts) + max_tokens
    decoding = rollout.Decoding(known.tokenizer, known.stops, temperature, max_tokens)
    tables = {run / kept.name: table for kept in paths if (table := measured(
        run / kept.name, settings(config.model_copy(update={"model": str(kept)}), decoding, prompts)))}
    if paths and len(tables) == len(paths):
        return tables
    engine = load_engine(config, known.path, decoding, max_len, device)
    sampler = rollout.Sampler(engine, task, config.seed)
    if not paths:
        return {run: measure(config, sampler, prompts, run)}
    for kept in paths:
        if run / kept.name in tables:
            continue
        with model.readable(str(kept)):
            weights = policy.load(kept, torch.device("cpu"), dtype=engine.dtype, trained=False)
            engine.sleep()  # as in training: what takes the weights over needs some of the KV cache's memory
            engine.push(policy.full_weights(weights, engine.dtype))
        del weights
        of_kept = config.model_copy(update={"model": str(kept)})
        tables[run / kept.name] = measure(of_kept, sampler, prompts, run / kept.name)
    return {run / kept.name: tables[run / kept.name] for kept in paths}


def settings(config: EvalConfig, decoding: rollout.Decoding, prompts: list[model.Prompt]) -> dict:
    """What decides the results, for results.json. What matters to some models only: of those."""
    examples, tokenizer = [prompt.example for prompt in prompts], decoding.tokenizer
    found = {"items": rewards.digest(examples), "model": config.model, "engine": config.engine,
             "temperature": decoding.temperature, "max_tokens": decoding.max_tokens, "seed": config.seed}
    if model.dated(tokenizer, examples, config.date, config.enable_thinking):
        found["date"] = config.date
    if model.may_think(tokenizer):
        thinks = config.enable_thinking
        found["enable_thinking"] = "default" if thinks is None else thinks
    return found | ({"judge_model": config.judge_model, "judge_mode": config.judge_mode} if config.judge_model else {})


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
        raise InputError(f"{file} cannot be read: {type(error).__name__} {error}; delete it, or choose another "
                         "--name") from error
    if other:
        raise InputError(f"{file} is of another evaluation: {other[0]} is {found.get(other[0])} there, and "
                         f"{wanted[other[0]]} now; choose another --name")
    return table


def measure(config: EvalConfig, sampler: rollout.Sampler, prompts: list[model.Prompt],
            run: Path) -> dict[str, dict[str, float]]:
    """Of the weights that the engine has. Writes results.json and samples.jsonl into `run`. Returns the metrics. Raises
    InputError if the judge fails too often, with samples.jsonl written."""
    task, decoding = sampler.task, sampler.engine.decoding
    groups = sampler.score(prompts, sampler.sample(prompts, 1, "eval"))  # one response a prompt
    samples = records(task, groups)
    on_rank_0(lambda: (run.mkdir(exist_ok=True), (run / "samples.jsonl").unlink(missing_ok=True)))  # of a killed one
    RunLog(run).samples(samples)
    report = task.report([group.rewards.numpy() for group in groups])
    task.check(report)
    table = summarize(samples, task.averages(), task.clip, config.seed)
    if not table:
        raise InputError(f"no item has a score; the responses are in {run}/samples.jsonl")
    on_rank_0(lambda: write_json(run / "results.json", {
        "task": config.task, "settings": settings(config, decoding, prompts), "metrics": table,
        "averages": task.averages(), "truncated": float(np.mean([record["truncated"] for record in samples])),
        "judge": report, "versions": versions()}))
    return table


def main(config: EvalConfig) -> None:
    device = join()
    config = config.model_copy(update={"date": model.today(config.date)})
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
        mark = " ".join(word for word, marked in (("BEST", best), ("FINAL", final)) if marked == path)
        cells = [f"{table[name]['mean']:.3f} ({table[name]['stderr']:.3f})" if name in table else "-" for name in names]
        print(f"{path.name:>10}  {mark:>11}  "
              + "  ".join(f"{cell:>{max(14, len(name))}}" for name, cell in zip(names, cells, strict=True)))
    print(f"BEST: by {names[0]}, chosen on the items that measure it, so it is biased upwards")


def find_results(name: str) -> Path:
    """The results.json of an evaluation, which is named by its directory or by this file. Raises
    InputError."""
    path = Path(name)
    file = path / "results.json" if path.is_dir() else path
    if file.is_file():
        return file
    if policies := by_step(path):
        raise InputError(f"{name} holds evaluations of several policies: name one, such as "
                         f"{policies[-1]}")
    if (path / "metrics.jsonl").is_file():
        raise InputError(f"{name} is a run of train.py, which compare cannot read: evaluate it "
                         f"first, with python eval.py --model {name} --task ..., and name the directory "
                         "that this prints")
    raise InputError(f"{name}: no results of eval.py are there; name its directory, such as "
                     "runs/NAME")


def print_comparison(names: list[str]) -> None:
    if len(names) != 2:
        raise InputError("usage: python eval.py compare runs/A runs/B, each a directory that "
                         "eval.py wrote")
    rows = compare(*[find_results(name) for name in names])
    for letter, name in zip("AB", names, strict=True):
        print(f"{letter}: {name}")
    print(f"{'':>45}       A       B    B - A  [   95% interval ]       p  Holm's p      n")
    for row in rows:
        corrected = f"{row['p_holm']:.4f}" if "p_holm" in row else ""
        print(f"{row['metric']:>45}  {row['first']:6.3f}  {row['second']:6.3f}  {row['difference']:+7.3f}  "
              f"[{row['low']:+7.3f}, {row['high']:+7.3f}]  {row['p']:6.4f}  {corrected:>8}  {row['n']:5}")


if __name__ == "__main__":
    if CONFIG:
        run_program(main, CONFIG)
    run_program(print_comparison, sys.argv[2:])
