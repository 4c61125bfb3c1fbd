"""Are two evaluations different? Paired by item, with intervals and p-values.

    python tools/compare.py runs/A runs/B

A and B are directories that eval.py wrote, or their results.json. A policy's of eval.py --policies
is runs/NAME/step-N.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import numpy as np

from infra.bootstrap import chunks, metrics, resample
from infra.ranks import InputError, run_program
from infra.run_directory import by_step
from tools.stats import holm

RESAMPLES = 10_000
UNCOMPARED = {"model", "engine"}  # two evaluations may differ in these
OF_SOME_MODELS = {"date", "enable_thinking"}  # one may lack these: its chat template does not ask


class Evaluation(NamedTuple):
    file: Path  # its results.json
    settings: dict  # what two evaluations must share
    samples: list[dict]  # the items, by id

    def items(self) -> list[tuple]:
        return [(sample["id"], sample["category"]) for sample in self.samples]


def main(argv: list[str]) -> None:
    args = parse(argv)
    rows = compare(find_results(args.first), find_results(args.second))
    print(f"A: {args.first}")
    print(f"B: {args.second}")
    print(f"{'':>45}       A       B    B - A  [   95% interval ]       p  Holm's p      n")
    for row in rows:
        corrected = f"{row['p_holm']:.4f}" if "p_holm" in row else ""
        print(
            f"{row['metric']:>45}  {row['first']:6.3f}  {row['second']:6.3f}  "
            f"{row['difference']:+7.3f}  [{row['low']:+7.3f}, {row['high']:+7.3f}]  "
            f"{row['p']:6.4f}  {corrected:>8}  {row['n']:5}"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    def fail(message: str) -> NoReturn:
        raise InputError(
            "usage: python tools/compare.py runs/A runs/B, each a directory that eval.py wrote"
        )

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    return parser.parse_args(argv)


def find_results(name: str) -> Path:
    """The results.json of an evaluation, which is named by its directory or by this file.

    Raises InputError.
    """
    path = Path(name)
    file = path / "results.json" if path.is_dir() else path
    if file.is_file():
        return file
    if policies := by_step(path):
        raise InputError(
            f"{name} holds evaluations of several policies: name one, such as {policies[-1]}"
        )
    if (path / "metrics.jsonl").is_file():
        raise InputError(
            f"{name} is a run of train.py, which compare cannot read: evaluate it "
            f"first, with python eval.py --model {name} --task ..., and name the directory "
            "that this prints"
        )
    raise InputError(
        f"{name}: no results of eval.py are there; name its directory, such as runs/NAME"
    )


def compare(first: Path, second: Path) -> list[dict]:
    """Second minus first, paired by item, for every metric that both have. Nothing is clipped.

    first, second: results.json files. p is of a two-sided sign-flip permutation test; low and high
    are a 95% bootstrap interval. p_holm corrects all metrics except the first together.
    Raises InputError for different items or settings.
    """
    a, b = read(first), read(second)
    check_comparable(a, b)
    categories = np.array([sample["category"] for sample in a.samples])
    second_metrics = metrics(b.samples, b.settings["averages"])
    rows = []
    for name, (first_values, weights) in metrics(a.samples, a.settings["averages"]).items():
        if name not in second_metrics:
            continue
        second_values, _ = second_metrics[name]
        both = ~np.isnan(first_values) & ~np.isnan(second_values) & (weights > 0)
        if both.any():
            pairs = first_values[both], second_values[both]
            rows.append({"metric": name, **paired(*pairs, weights[both], categories[both])})
    if not rows:
        raise InputError(f"{first} and {second} have no metric in common")
    others = rows[1:]
    for row, p in zip(others, holm([row["p"] for row in others]), strict=True):
        row["p_holm"] = p
    return rows


def paired(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, categories: np.ndarray
) -> dict[str, float]:
    """The comparison of one metric. All are (N,): an entry for each item that both have."""
    weights = weights / weights.sum()
    difference = float(weights @ (second - first))
    means = resample(second - first, weights, categories, RESAMPLES, seed=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "first": float(weights @ first),
        "second": float(weights @ second),
        "difference": difference,
        "low": float(low),
        "high": float(high),
        "p": permutation_test(weights * (second - first), difference),
        "n": len(first),
    }


def permutation_test(shares: np.ndarray, difference: float) -> float:
    """The two-sided p-value of the difference: how often random signs make one as large.

    shares (N,): what each item contributes to it.
    """
    rng = np.random.default_rng(0)
    extreme = 0
    for chunk in chunks(RESAMPLES, len(shares)):
        signs = rng.integers(2, size=(len(chunk), len(shares))) * 2 - 1
        extreme += int((np.abs(signs @ shares) >= abs(difference) - 1e-12).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def read(file: Path) -> Evaluation:
    """Raises InputError for anything that eval.py does not write."""
    try:
        results = json.loads(file.read_text())
        settings = {"task": results["task"], "averages": results["averages"], **results["settings"]}
        lines = (file.parent / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        samples.sort(key=lambda sample: sample["id"])
        evaluation = Evaluation(file, settings, samples)
        check_samples(evaluation)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} and the samples.jsonl beside it cannot be read as eval.py writes them: "
            f"{type(error).__name__} {error}"
        ) from error
    return evaluation


def check_samples(evaluation: Evaluation) -> None:
    """Raises ValueError, or what a malformed line raises."""
    names = {(name, str(category)) for name, category in evaluation.items()}
    if len(names) < max(1, len(evaluation.samples)):
        raise ValueError("no items, or one of them twice")
    for sample in evaluation.samples:
        for score in sample["scores"].values():
            if score is not None and not (type(score) in (int, float) and abs(score) < math.inf):
                raise ValueError("a score that is no number")


def check_comparable(a: Evaluation, b: Evaluation) -> None:
    """Raises InputError."""
    if a.settings.get("items") != b.settings.get("items") or a.items() != b.items():
        raise InputError("the two evaluations cannot be compared: they are of different items")
    for key in sorted((a.settings.keys() | b.settings.keys()) - UNCOMPARED):
        in_a, in_b = a.settings.get(key), b.settings.get(key)
        if key in OF_SOME_MODELS and None in (in_a, in_b):
            continue
        if in_a != in_b:
            raise InputError(
                f"the two evaluations cannot be compared: {key} is {in_a} in {a.file}, and {in_b} "
                f"in {b.file}"
            )


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
