"""An evaluation's numbers: every metric's mean over the items, and its standard error.

An item is a line of samples.jsonl: {"id", "category", "scores": {name: number or None}}. None says
that a score is missing. The standard error is bootstrapped: the items of each category are drawn
again, with replacement.
"""

from collections import Counter

import numpy as np

Table = dict[str, dict[str, float]]  # {metric: {"mean", "stderr", "n"}}
Averages = dict[str, dict[str, float]]  # {metric: {category: weight}}, see rewards.Task.averages

RESAMPLES = 1_000
DRAWS_AT_A_TIME = 1_000_000  # bounds the memory


def summarize(samples: list[dict], averages: Averages, clip: bool, seed: int) -> Table:
    """The table of an evaluation, without metrics that no item has.

    The standard error is the standard deviation of bootstrapped means. clip: the mean and each
    bootstrapped mean are clipped to [0, 1].
    """
    categories = np.array([sample["category"] for sample in samples])
    table = {}
    for name, (values, weights) in metrics(samples, averages).items():
        present = ~np.isnan(values) & (weights > 0)
        if not present.any():
            continue
        values, weights = values[present], weights[present]
        mean = np.average(values, weights=weights)
        means = resample(values, weights, categories[present], RESAMPLES, seed)
        if clip:
            mean = np.clip(mean, 0, 1)
            means = np.clip(means, 0, 1)
        table[name] = {"mean": float(mean), "stderr": float(means.std()), "n": len(values)}
    return table


def metrics(samples: list[dict], averages: Averages) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{metric: (values (N,), weights (N,))} of all N items.

    A metric is the weighted mean of its values; NaN says that the item lacks the score. If there
    are averages, the score "correct" is replaced by them and by a metric for each category.
    """
    names = dict.fromkeys(name for sample in samples for name in sample["scores"])
    values = {name: _column(samples, name) for name in names}
    weighted = {}
    if averages and "correct" in values:
        weighted = _by_category(samples, values.pop("correct"), averages)
    for name, column in values.items():
        weighted[name] = column, np.ones(len(column))
    return weighted


def _column(samples: list[dict], name: str) -> np.ndarray:
    scores = [sample["scores"].get(name) for sample in samples]
    return np.array(scores, dtype=float)  # None becomes NaN


def _by_category(
    samples: list[dict], correct: np.ndarray, averages: Averages
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The benchmark's averages and each category. Items share the weight of their category."""
    categories = [sample["category"] for sample in samples]
    sizes = Counter(categories)
    weighted = {}
    for name, weight in averages.items():
        shares = [weight.get(category, 0.0) / sizes[category] for category in categories]
        weighted[name] = correct, np.array(shares)
    for category in sizes:
        inside = np.array(categories) == category
        weighted[category] = np.where(inside, correct, np.nan), np.ones(len(correct))
    return weighted


def resample(
    values: np.ndarray, weights: np.ndarray, categories: np.ndarray, n: int, seed: int
) -> np.ndarray:
    """(n,): the weighted means of n bootstrap samples of the items, drawn within each category."""
    rng = np.random.default_rng(seed)
    means = np.zeros(n)
    shares = values * weights / weights.sum()
    for category in np.unique(categories):
        members = shares[categories == category]
        for chunk in chunks(n, len(members)):
            drawn = rng.integers(len(members), size=(len(chunk), len(members)))
            means[chunk] += members[drawn].sum(1)
    return means


def chunks(n: int, items: int) -> list[np.ndarray]:
    """0 to n - 1 in chunks: of one chunk's samples about DRAWS_AT_A_TIME items are drawn."""
    return np.array_split(np.arange(n), max(1, n * items // DRAWS_AT_A_TIME))
