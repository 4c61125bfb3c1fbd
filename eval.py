"""Evaluate a model on a benchmark, or compare two evaluations.

    python eval.py --task bfcl --model runs/NAME              # a run, a directory, a hub id
    torchrun --nproc_per_node=8 eval.py --task healthbench --model Qwen/Qwen2.5-7B \\
        --judge-url https://api.openai.com/v1 --judge-model gpt-4.1-2025-04-14
    python eval.py compare runs/A/results.json runs/B/results.json

Writes runs/NAME/results.json (every metric's mean and bootstrap standard error, the settings) and samples.jsonl (one
line an item, with its scores), and prints the table.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import benchmarks
import data
import model
import rollout
from files import make_run, write
from judge import check_missing, connect, total_counts
from options import check_eval_args, parse_eval_args, versions
from rewards import InputError
from rollout import RANK, gather

RESAMPLES, PAIRED_RESAMPLES = 1_000, 10_000
UNCOMPARED = {"model", "engine"}  # two evaluations may differ in these


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
        own = part[groups == group]
        for some in np.array_split(np.arange(n), max(1, n * len(own) // 1_000_000)):  # in bounded memory
            out[some] += own[rng.integers(len(own), size=(len(some), len(own)))].sum(1)
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
        if x != y:
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
        for some in np.array_split(np.arange(PAIRED_RESAMPLES), max(1, PAIRED_RESAMPLES * len(part) // 1_000_000)):
            flipped = (rng.integers(2, size=(len(some), len(part))) * 2 - 1) @ part
            extreme += int((np.abs(flipped) >= abs(difference) - 1e-12).sum())
        rows.append({"metric": name, "first": float(weights @ x), "second": float(weights @ y),
                     "difference": difference, "low": float(low), "high": float(high),
                     "p": (1 + extreme) / (1 + PAIRED_RESAMPLES), "n": len(x)})
    if not rows:
        raise InputError(f"{first} and {second} have no metric in common")
    for row, p in zip(rows[1:], holm([row["p"] for row in rows[1:]]), strict=True):
        row["p_holm"] = p
    return rows


def evaluate(args, run: Path) -> dict[str, dict[str, float]]:
    """Everything. Returns the metrics. Raises InputError if the judge fails too often, with samples.jsonl written."""
    judge = connect(args, explain=True) if args.task == "healthbench" else None
    items = benchmarks.load(args)
    averages = benchmarks.bfcl_averages() if args.task == "bfcl" else {}
    path, tokenizer, stops, _, room = model.describe(args.model, args.max_tokens)
    chats = data.encode(tokenizer, [example for item in items for example in item.examples], room)
    device = rollout.join_ranks()
    with model.readable(args.model):
        if args.engine == "vllm":
            longest = max(len(ids) for ids, _ in chats) + args.max_tokens
            engine = rollout.VLLMEngine(path, tokenizer, stops, longest, args.temperature, args.max_tokens, args.seed,
                                        args.gpu_memory, fixed=True)
        else:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            lm = model.load(path, device, dtype)
            engine = rollout.HFEngine(lm, tokenizer, stops, args.temperature, args.max_tokens)
    sampled = rollout.sample(engine, judge.start if judge else lambda example, texts: lambda: None, chats, 1, args.seed,
                             "eval")
    answers = gather([(responses[0], verdicts()) for responses, verdicts in sampled])

    samples, at = [], 0
    for item in items:
        own = answers[at:at + len(item.examples)]
        at += len(item.examples)
        scores, more = item.score([response.text for response, _ in own], own[0][1])
        samples.append({"id": item.id, "group": item.group, "scores": scores,
                        "truncated": np.mean([response.finish == "length" for response, _ in own]),
                        "tokens": sum(len(response.tokens) for response, _ in own), **more})
    write(run / "samples.jsonl", *samples)
    counts = total_counts(judge, [verdicts for _, verdicts in answers]) if judge else {}
    if judge:  # a row without all of its verdicts has no score
        counts["rows_missing"] = np.mean([np.isnan(verdicts).any() for _, verdicts in answers])
        check_missing(counts, counts["rows_missing"], "the rows have a verdict", args.judge_max_missing)
    table = summarize(samples, averages, args.task == "healthbench", args.seed)
    if not table:
        raise InputError(f"no item has a score; the responses are in {run}/samples.jsonl")
    items_seen = [[item.id, item.group, item.examples] for item in items]
    results = {
        "task": args.task,
        "settings": {"items": hashlib.sha256(json.dumps(items_seen).encode()).hexdigest(), "model": args.model,
                     "engine": args.engine, "temperature": args.temperature, "max_tokens": args.max_tokens,
                     "seed": args.seed, **({"judge_model": args.judge_model, "judge_mode": args.judge_mode,
                                            "judge_max_tokens": args.judge_max_tokens} if judge else {})},
        "metrics": table,
        "averages": averages,
        "truncated": float(np.mean([sample["truncated"] for sample in samples])),
        "judge": counts,
        "versions": versions(),
    }
    if RANK == 0:
        (run / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return table


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        if len(sys.argv) != 4:
            raise InputError("usage: python eval.py compare A/results.json B/results.json")
        print(f"{'':>45}   first  second    B - A  [   95% interval ]       p  Holm's p      n")
        for row in compare(Path(sys.argv[2]), Path(sys.argv[3])):
            corrected = f"{row['p_holm']:.4f}" if "p_holm" in row else ""
            print(f"{row['metric']:>45}  {row['first']:6.3f}  {row['second']:6.3f}  {row['difference']:+7.3f}  "
                  f"[{row['low']:+7.3f}, {row['high']:+7.3f}]  {row['p']:6.4f}  {corrected:>8}  {row['n']:5}")
        return
    args = parse_eval_args(__doc__)
    check_eval_args(args)
    with make_run(args.name) as run:
        table = evaluate(args, run)
    if RANK == 0:
        for name, metric in table.items():
            print(f"{name:>45}  {metric['mean']:.3f} ({metric['stderr']:.3f})  n={metric['n']}")
        print(f"\n{run}: results.json, samples.jsonl")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
