"""Are two evaluations different? Paired by item, with intervals and p-values.

python tools/compare.py runs/A runs/B
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import numpy as np

from eval import PAIRED_RESAMPLES, metrics, resample
from infra.ranks import InputError, run_program
from infra.run_directory import by_step
from tools.stats import holm

UNCOMPARED = {"model", "engine"}  # two evaluations may differ in these
OF_SOME_MODELS = {"date", "enable_thinking"}  # one may lack these: its chat template does not ask


def _read(file: Path) -> tuple[dict, list[dict]]:
    """What two evaluations must share, and the items by id."""
    try:
        results = json.loads(file.read_text())
        samples = [
            json.loads(line) for line in (file.parent / "samples.jsonl").read_text().splitlines()
        ]
        settings = {"task": results["task"], "averages": results["averages"], **results["settings"]}
        samples.sort(key=lambda sample: sample["id"])
        values = [x for sample in samples for x in sample["scores"].values() if x is not None]
        if len({(sample["id"], str(sample["category"])) for sample in samples}) < max(1, len(samples)):
            raise ValueError("no items, or one of them twice")
        if not all(type(x) in (int, float) and abs(x) < math.inf for x in values):
            raise ValueError("a score that is no number")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} and the samples.jsonl beside it cannot be read as eval.py writes them: "
            f"{type(error).__name__} {error}"
        ) from error
    return settings, samples


def compare(first: Path, second: Path) -> list[dict]:
    """Second minus first, paired by item: a 95% bootstrap interval and the two-sided p-value of a sign-flip permutation
    test, for every metric that both have. All but the first are also corrected together by Holm. Nothing is clipped.
    Raises InputError for different items or settings."""
    (a, a_samples), (b, b_samples) = _read(first), _read(second)
    if a.get("items") != b.get("items") or [(s["id"], s["category"]) for s in a_samples] != [
        (s["id"], s["category"]) for s in b_samples
    ]:
        raise InputError("the two evaluations cannot be compared: they are of different items")
    for key in sorted((a.keys() | b.keys()) - UNCOMPARED):
        x, y = a.get(key), b.get(key)
        if x != y and not (key in OF_SOME_MODELS and None in (x, y)):
            raise InputError(
                f"the two evaluations cannot be compared: {key} is {x} in {first}, and {y} in {second}"
            )
    groups, rows = np.array([sample["category"] for sample in a_samples]), []
    of_b = metrics(b_samples, b["averages"])
    for name, (x, weights) in metrics(a_samples, a["averages"]).items():
        has = ~np.isnan(x) & ~np.isnan(of_b.get(name, [x * np.nan])[0]) & (weights > 0)
        if not has.any():
            continue
        weights, x, y = weights[has] / weights[has].sum(), x[has], of_b[name][0][has]
        difference = float(weights @ (y - x))
        low, high = np.quantile(
            resample(y - x, weights, groups[has], PAIRED_RESAMPLES, 0), [0.025, 0.975]
        )
        rng, part, extreme = np.random.default_rng(0), weights * (y - x), 0
        for chunk in np.array_split(
            np.arange(PAIRED_RESAMPLES), max(1, PAIRED_RESAMPLES * len(part) // 1_000_000)
        ):
            flipped = (rng.integers(2, size=(len(chunk), len(part))) * 2 - 1) @ part
            extreme += int((np.abs(flipped) >= abs(difference) - 1e-12).sum())
        rows.append(
            {
                "metric": name,
                "first": float(weights @ x),
                "second": float(weights @ y),
                "difference": difference,
                "low": float(low),
                "high": float(high),
                "p": (1 + extreme) / (1 + PAIRED_RESAMPLES),
                "n": len(x),
            }
        )
    if not rows:
        raise InputError(f"{first} and {second} have no metric in common")
    for row, p in zip(rows[1:], holm([row["p"] for row in rows[1:]]), strict=True):
        row["p_holm"] = p
    return rows


def find_results(name: str) -> Path:
    """The results.json of an evaluation, which is named by its directory or by this file. Raises
    InputError."""
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


def print_comparison(names: list[str]) -> None:
    if len(names) != 2:
        raise InputError(
            "usage: python tools/compare.py runs/A runs/B, each a directory that eval.py wrote"
        )
    rows = compare(*[find_results(name) for name in names])
    for letter, name in zip("AB", names, strict=True):
        print(f"{letter}: {name}")
    print(f"{'':>45}       A       B    B - A  [   95% interval ]       p  Holm's p      n")
    for row in rows:
        corrected = f"{row['p_holm']:.4f}" if "p_holm" in row else ""
        print(
            f"{row['metric']:>45}  {row['first']:6.3f}  {row['second']:6.3f}  {row['difference']:+7.3f}  "
            f"[{row['low']:+7.3f}, {row['high']:+7.3f}]  {row['p']:6.4f}  {corrected:>8}  {row['n']:5}"
        )


if __name__ == "__main__":
    run_program(print_comparison, sys.argv[1:])
