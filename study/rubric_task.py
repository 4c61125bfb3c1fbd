"""A task in the regime of rubrics: a reply to a customer is judged by 7 to 17 binary criteria.

The prompts are those of the task `reply`. Each draws its own criteria of 20, which the policy does
not see. Three are in every prompt: they keep a reply short, and most others want something said. A
program is the judge. As in HealthBench a criterion has points, and one with negative points is a
mistake. A reward is 1 for a criterion met or a mistake avoided, and all count alike in training.
--data names a harder variant, `exclusive` or `noisy`.
"""

import functools
import hashlib
import random
import re
from collections.abc import Callable

import numpy as np

from infra.ranks import InputError
from rewards import Channel, Example, Task, asked
from tasks import reply
from tasks.healthbench import Item, score
from tasks.tools import examples

OPTIONS = ("data",)
VARIANTS = (
    "plain",
    "exclusive",  # `long` is in every prompt, too: no reply meets both `long` and `short`
    "noisy",  # the judge inverts its verdict on `short` for WRONG of the replies
)
WRONG = 0.3
FEWEST, MOST = 7, 17  # criteria of a prompt
CONSTRAINTS = "short", "two sentences", "finished"  # in every prompt
POINTS = {
    "short": 10,  # at most 30 words
    "two sentences": 5,  # at most
    "finished": 8,  # it ends as a sentence does
    "name": 6,
    "item": 7,
    "fault": 7,
    "day": 3,
    "sorry": 8,
    "thanks": 4,
    "please": 2,
    "you": 2,
    "we": 2,
    "remedy": 9,
    "when": 6,
    "contact": 5,
    "greeting": 3,
    "help": 4,
    "question": -3,
    "number": -5,
    "refusal": -6,
}
LONG = Item("long", 4, ())  # more than 40 words
WORDS = {  # a reply that has one of them meets the criterion
    "sorry": "sorry apologize apologise apologies apology",
    "thanks": "thank thanks",
    "please": "please",
    "you": "you your",
    "we": "we our us we'll",
    "remedy": "refund replace replacement send repair exchange",
    "when": "today tomorrow soon immediately within shortly hours days week",
    "contact": "call email phone contact reach",
    "help": "help assist support",
    "refusal": "unfortunately cannot can't unable don't didn't not",
}
FAULT_WORDS = {
    "arrived broken": "broken damaged",
    "never arrived": "arrive arrived delivery delivered",
    "has the wrong color": "color colour",
    "stopped working": "working work",
    "is missing a part": "missing part",
    "is too small": "small size",
    "makes a strange noise": "noise",
    "arrived late": "late delay delayed",
    "was charged twice": "charged charge twice",
    "has no manual": "manual",
}
COMPLAINT = re.compile(r"Hi, I am (\w+)\. The (\w+) that I ordered on (\w+) (.+)\.")


def example(rng: random.Random, exclusive: bool) -> Example:
    """A prompt of `reply` with criteria. The reference is what the customer wrote."""
    prompt = reply.example(rng)
    others = [criterion for criterion in POINTS if criterion not in CONSTRAINTS]
    drawn = rng.sample(others, rng.randint(FEWEST, MOST) - len(CONSTRAINTS))
    items = [Item(criterion, POINTS[criterion], ()) for criterion in (*CONSTRAINTS, *drawn)]
    if exclusive:
        items[-1] = LONG
    return prompt._replace(reference=asked(prompt.messages), criteria=tuple(items))


# The judge


@functools.lru_cache(256)  # an evaluation asks twice
def verdicts(response: str, complaint: str) -> dict[str, bool]:
    """Whether a reply meets each criterion."""
    name, item, day, fault = COMPLAINT.fullmatch(complaint).groups()
    words = re.findall(r"[a-z']+", response.lower())
    length = len(response.split())
    wanted = {**WORDS, "fault": FAULT_WORDS[fault]}
    met = {criterion: not {*some.split()}.isdisjoint(words) for criterion, some in wanted.items()}
    return met | {
        "short": length <= 30,
        "long": length > 40,
        "two sentences": len(re.findall(r"[.!?](?=\s|$)", response)) <= 2,
        "finished": response.rstrip().endswith((".", "!", "?")),
        "name": name in response,
        "item": item in response.lower(),
        "day": day in response,
        "greeting": response.strip().lower().startswith(("dear", "hi", "hello")),
        "question": "?" in response,
        "number": re.search(r"\d", response) is not None,
    }


def verdicts_on(example: Example, response: str) -> np.ndarray:
    """(K,) bool: whether the reply meets each criterion of its prompt."""
    met = verdicts(response, example.reference)
    return np.array([met[item.text] for item in example.criteria])


def rewards_of(example: Example, met: np.ndarray) -> np.ndarray:
    """(K,): 1 for a criterion met or a mistake avoided, else 0."""
    mistakes = np.array([item.points < 0 for item in example.criteria])
    return (met != mistakes).astype(float)


def misjudged(response: str, seed: int) -> bool:
    """Whether a noisy judge errs on this reply: always or never, so that a run can be repeated."""
    digest = hashlib.sha256(f"{seed}/{response}".encode()).digest()
    return int.from_bytes(digest[:4]) < WRONG * 2**32


# The task


class Rubric(Task):
    """The K channels of a prompt are its criteria. Rewards are what the judge says, and an
    evaluation counts what is true."""

    temperature, max_tokens = 1.0, 64  # of eval.py

    def __init__(self, variant: str, seed: int):
        """variant: of VARIANTS. seed: of a noisy judge's errors."""
        self.variant = variant
        self.seed = seed

    def prompts(self, n_train: int, n_test: int | None) -> tuple[list[Example], list[Example]]:
        draw = functools.partial(example, exclusive=self.variant == "exclusive")
        test = examples(200 if n_test is None else n_test, "test", draw=draw)
        return examples(n_train, "train", draw=draw), test

    def channels(self, example: Example) -> list[Channel]:
        names = [f"no {item.text}" if item.points < 0 else item.text for item in example.criteria]
        return [Channel(name) for name in names]

    def start(self, example: Example, responses: list[str]) -> Callable[[], np.ndarray]:
        rewards = np.array([self.judge(example, response) for response in responses])
        return lambda: rewards

    def judge(self, example: Example, response: str) -> np.ndarray:
        """Rewards (K,)."""
        met = verdicts_on(example, response)
        if self.variant == "noisy" and misjudged(response, self.seed):
            short, *_ = CONSTRAINTS
            met ^= np.array([item.text == short for item in example.criteria])
        return rewards_of(example, met)

    def try_out(self, example: Example) -> None:
        """Does nothing: no reward is a user's."""

    def result(
        self, example: Example, response: str, rewards: np.ndarray
    ) -> tuple[dict[str, float], dict]:
        """Adds `score`, as HealthBench counts it, and `kept`: whether all constraints are met."""
        met = verdicts_on(example, response)
        scores, more = super().result(example, response, rewards_of(example, met))
        scores["score"] = score([item.points for item in example.criteria], met)
        scores["kept"] = float(met[: len(CONSTRAINTS)].all())
        return scores, more


def task(config) -> Rubric:
    variant = config.data or "plain"
    if variant not in VARIANTS:
        raise InputError(f"--data {variant}: choose one of {', '.join(VARIANTS)}")
    return Rubric(variant, config.seed)
