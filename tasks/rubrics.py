"""Rubrics: criteria for each prompt, which a judge decides, each a channel of its own.

The data are RaR-Medicine and RaR-Science (Rubrics as Rewards, arXiv 2507.17746), and files in their
schema.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from config import JudgeOptions
from infra import chats
from infra.ranks import InputError
from rewards import Channel, Example, Task, answer
from tasks import rows
from tasks.judge import Judge

OPTIONS = "data", "eval_data", *JudgeOptions.model_fields
PUBLIC = {  # 17,926 + 2,242 and 18,333 + 2,292 rows
    "rar-medicine": "hf://anisha2102/RaR-Medicine/{split}",
    "rar-science": "hf://anisha2102/RaR-Science/{split}",
}
# RaR's categories, with the weights of its explicit aggregation.
CATEGORIES = {"essential": 1.0, "important": 0.7, "optional": 0.3, "pitfall": 0.9}
PREFIX = re.compile(rf"\s*({'|'.join(CATEGORIES)}) criteria:\s*", re.IGNORECASE)
WEIGHTS = "uniform", "category", "row"

# Most pitfalls of RaR-Medicine are worded as the mistake ("Fails to mention ..."), most of
# RaR-Science as avoiding it. Neither sign is right for both, so one fixed question is asked, and
# its verdict is inverted.
PITFALL = "The response makes this mistake (the text names the mistake, or how to avoid it): "


class Criterion(NamedTuple):
    text: str  # the item that the judge decides; of a pitfall the mistake: meeting it is bad
    label: str  # criteria with the same label are one line in the logs
    category: str  # of CATEGORIES
    weight: float = 1.0  # the row's, without its sign


def criterion(item: object, where: str, by_title: bool) -> Criterion:
    """One item of a rubric: {description, weight?, title?}. by_title: the title is its label.

    Raises InputError.
    """
    item = item if isinstance(item, dict) else {}
    text, weight, title = item.get("description"), item.get("weight"), item.get("title")
    prefix = PREFIX.match(text) if isinstance(text, str) else None
    if prefix:
        text = text[prefix.end() :]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where} has an item of its rubric without a text "description"')
    if weight is not None and not (type(weight) in (int, float) and 1e-6 <= abs(weight) <= 1e6):
        raise InputError(
            f"{where} has an item with weight {str(weight)[:40]!r}: it must be a number up to 1e6, "
            "other than 0, negative for a pitfall"
        )
    category = category_of(weight or 5)
    if prefix and category != "pitfall":
        category = prefix[1].lower()
    label = title if by_title and title is not None else category
    if not _is_label(label):
        raise InputError(
            f"{where} has an item with title {label!r}: it must be one line of text, and not "
            "'joint', the logs' name for all together"
        )
    return Criterion(text.strip(), label, category, abs(weight or 1.0))


def category_of(weight: float) -> str:
    """Of an item that lacks the prefix of its category."""
    if weight >= 5:
        return "essential"
    if weight >= 3:
        return "important"
    return "optional" if weight >= 0 else "pitfall"


def _is_label(label: object) -> bool:
    if not isinstance(label, str) or label == "joint":
        return False
    return bool(label.strip()) and label.isprintable()


def from_row(row: dict, where: str, by_title: bool) -> Example:
    """One row in RaR's schema: question (or prompt), rubric [{description, weight, title}].

    The prompt is a text or a chat.
    """
    prompt = row.get("prompt")
    if prompt is None:  # two data sets in one table have both columns
        prompt = row.get("question")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = chats.chat(prompt, where)
    items = row.get("rubric")
    if not isinstance(items, list) or not items:
        raise InputError(
            f'{where} has no rubric: it must be a list of {{"description": ..., "weight": ...}}'
        )
    return Example(
        messages,
        criteria=tuple(criterion(item, where, by_title) for item in items),
        tools=chats.tools(row.get("tools"), where),
    )


class Judged(Task):
    """Its rewards are the verdicts of a judge."""

    # What --judge-max-missing limits: a share in the report, and what it is of.
    limited = "missing", "the judge's verdicts are"

    def __init__(self, config, explain: bool = False):
        """explain: the judge gives a reason before each verdict."""
        if not re.match(r"https?://[^/\s]+", config.judge_url or ""):
            raise InputError(
                f"--judge-url {config.judge_url}: --task {config.task} needs a judge; name an "
                "OpenAI-compatible endpoint, such as http://localhost:8000/v1"
            )
        if not config.judge_model:
            raise InputError("--judge-model: name the judge's model as its endpoint calls it")
        self.judge = Judge(config, explain)
        self.max_missing = config.judge_max_missing

    def try_out(self, example: Example) -> None:
        """Raises InputError if the judge does not answer a question."""
        self.judge.check()

    def ask(
        self, example: Example, responses: list[str], items: list[str]
    ) -> Callable[[], np.ndarray]:
        """As Judge.start, without the thoughts of the responses.

        Each response begins with the assistant's message at the end of the chat, if there is one.
        """
        messages, opening = example.messages, ""
        last = messages[-1]
        if last["role"] == "assistant" and not last.get("tool_calls"):
            messages, opening = messages[:-1], last["content"]
        answers = [answer(opening + response) for response in responses]
        return self.judge.start(messages, answers, items)

    def report(self, rewards: list[np.ndarray]) -> dict:
        """missing: the share of verdicts that could not be had."""
        missing = np.isnan(np.concatenate([array.ravel() for array in rewards])).mean()
        return self.judge.take_counts() | {"missing": float(missing)}

    def check(self, report: dict) -> None:
        name, what = self.limited
        if report[name] > self.max_missing:
            raise InputError(
                f"{report[name]:.0%} of {what} missing, more than --judge-max-missing "
                f"{self.max_missing:g} allows; the last reason was: {report['last_error']}"
            )


def judged_items(example: Example) -> list[str]:
    """What the judge decides."""
    return [PITFALL + c.text if c.category == "pitfall" else c.text for c in example.criteria]


class Rubrics(Judged):
    """The K channels of a prompt are its criteria, in their order.

    A reward is 1 for a criterion met or a pitfall avoided, 0 otherwise.
    """

    weights = "uniform"  # or each category's, or each row's

    def __init__(self, config):
        by_title = config.task not in PUBLIC  # RaR's titles are others in every row
        read_row = functools.partial(from_row, by_title=by_title)
        self.prompts = rows.prompts(config, PUBLIC.get(config.task), read_row)
        super().__init__(config)

    def weigh(self, text: str) -> None:
        if text not in WEIGHTS:
            raise InputError(f"--weights {text}: of rubrics, choose one of {', '.join(WEIGHTS)}")
        self.weights = text

    def channels(self, example: Example) -> list[Channel]:
        return [
            Channel(c.label, weight=self.weight(c), help=" ".join(c.text.split()))
            for c in example.criteria
        ]

    def weight(self, criterion: Criterion) -> float:
        if self.weights == "category":
            return CATEGORIES[criterion.category]
        return criterion.weight if self.weights == "row" else 1.0

    def start(self, example: Example, responses: list[str]) -> Callable[[], np.ndarray]:
        pitfalls = np.array([c.category == "pitfall" for c in example.criteria])  # (K,)
        verdicts = self.ask(example, responses, judged_items(example))

        def rewards() -> np.ndarray:
            met = verdicts()  # (G, K)
            return np.where(pitfalls, 1 - met, met)

        return rewards

    def result(
        self, example: Example, response: str, rewards: np.ndarray
    ) -> tuple[dict[str, float], dict]:
        scores, _ = super().result(example, response, rewards)
        texts = [f"{k} {c.text}" for k, c in enumerate(example.criteria, start=1)]
        by_text = dict(zip(texts, rewards.tolist(), strict=True))
        return scores, {"response": response, "rewards": by_text}


def task(config) -> Task:
    return Rubrics(config)
