"""HealthBench (github openai/simple-evals; arXiv 2505.08775).

Medical conversations, each with criteria for a judge. The prompt to the judge is our own.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from config import JudgeOptions
from infra import chats
from infra.ranks import InputError
from rewards import Channel, Example, Task
from tasks import rows
from tasks.rubrics import Judged

OPTIONS = "eval_data", "subset", *JudgeOptions.model_fields
_BLOB = "https://openaipublic.blob.core.windows.net/simple-evals/healthbench/"
SUBSETS = {
    "full": _BLOB + "2025-05-07-06-14-12_oss_eval.jsonl",
    "hard": _BLOB + "hard_2025-05-08-21-00-10.jsonl",
    "consensus": _BLOB + "consensus_2025-05-09-20-00-46.jsonl",
}


class Item(NamedTuple):
    """A criterion. text: what the judge decides. tags: each "axis:..." is a score of its own."""

    text: str
    points: float  # negative: meeting it is bad
    tags: tuple[str, ...]


def score(points: list[float], met: np.ndarray) -> float:
    """Points of the items that are met, over the sum of the positive points; not clipped.

    NaN if no points are positive, or if a verdict is missing.
    """
    points = np.array(points)
    possible = points[points > 0].sum()
    return float((points * met).sum() / possible) if possible > 0 else float("nan")


def from_row(row: dict, where: str) -> Example:
    """One row in HealthBench's schema. Raises InputError."""
    messages = chats.chat(row.get("prompt"), where)
    tools = chats.tools(row.get("tools"), where)
    rubrics = row.get("rubrics")
    if (
        not isinstance(rubrics, list)
        or not all(map(_is_rubric, rubrics))
        or not any(rubric["points"] > 0 for rubric in rubrics)
    ):
        raise InputError(
            f'{where} has no rubrics: a list of {{"criterion": text, "points": number, '
            '"tags": [...]}, one of them with positive points'
        )
    themes = [tag for tag in _tags(row, "example_tags", where) if tag.startswith("theme:")]
    items = []
    for rubric in rubrics:
        points = rubric["points"]
        text = f"[{points:g}] {rubric['criterion']}"
        items.append(Item(text, points, tuple(_tags(rubric, "tags", where))))
    name = str(row.get("prompt_id") or where)
    return Example(messages, json.dumps(themes), tuple(items), name, tools=tools)


def _is_rubric(rubric: object) -> bool:
    if not isinstance(rubric, dict) or not isinstance(rubric.get("criterion"), str):
        return False
    points = rubric.get("points")
    return type(points) in (int, float) and abs(points) <= 1e6


def _tags(holder: dict, key: str, where: str) -> list[str]:
    tags = holder.get(key) or []
    if not isinstance(tags, list) or not all(
        isinstance(tag, str) and tag.isprintable() for tag in tags
    ):
        raise InputError(f"{where} has tags that are no list of texts: {str(tags)[:40]!r}")
    return tags


def judged_items(example: Example) -> list[str]:
    """What the judge decides."""
    return [item.text for item in example.criteria]


class HealthBench(Judged):
    """A prompt's K channels are its criteria, met or not. The reference holds its themes."""

    temperature, max_tokens, clip = 0.5, 2048, True
    limited = "rows_missing", "the rows have a verdict"

    def __init__(self, config):
        if config.subset not in SUBSETS:
            raise InputError(f"--subset {config.subset}: choose one of {', '.join(SUBSETS)}")
        self.path = config.eval_data or SUBSETS[config.subset]
        self.prompts = rows.only_evaluated(self.load)
        super().__init__(config, explain=True)

    def load(self, n: int | None) -> list[Example]:
        examples = rows.read(self.path, from_row)[:n]
        rows.check_ids([example.id for example in examples], self.path)
        return examples

    def channels(self, example: Example) -> list[Channel]:
        return [Channel(item.text) for item in example.criteria]

    def start(self, example: Example, responses: list[str]) -> Callable[[], np.ndarray]:
        return self.ask(example, responses, judged_items(example))

    def result(
        self, example: Example, response: str, rewards: np.ndarray
    ) -> tuple[dict[str, float], dict]:
        """Scores: of all criteria, once more as each theme's, and of the criteria of each axis."""
        items = example.criteria
        points = [item.points for item in items]
        overall = score(points, rewards)
        scores = {"overall": overall} | dict.fromkeys(json.loads(example.reference), overall)
        tags = {tag for item in items for tag in item.tags}
        for axis in sorted(tag for tag in tags if tag.startswith("axis:")):
            of_axis = [i for i, item in enumerate(items) if axis in item.tags]
            scores[axis] = score([points[i] for i in of_axis], rewards[of_axis])
        return scores, {"response": response, "met": rewards.tolist()}

    def report(self, rewards: list[np.ndarray]) -> dict:
        """rows_missing: the share of rows that lack a verdict, and so have no score."""
        rows_missing = np.mean([np.isnan(of_row).any() for of_row in rewards])
        return super().report(rewards) | {"rows_missing": rows_missing}


def task(config) -> Task:
    return HealthBench(config)
