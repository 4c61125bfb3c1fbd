"""GPQA-Diamond (arXiv 2311.12022), by the protocol of simple-evals, with a prompt of our own.

Only letters and ids are written in plain text: the authors ask not to publish the questions, and a
response may quote them.
"""

import base64
import random
import re

import numpy as np

from infra.ranks import InputError
from rewards import Channel, Example, Task, answer
from tasks import rows

OPTIONS = "eval_data", "repeats"
URL = "https://openaipublic.blob.core.windows.net/simple-evals/gpqa_diamond.csv"
PROMPT = """\
Choose the right answer to this question. Reason step by step first. Then end with a line \
'Answer: $LETTER' (no quotes),
in which LETTER is A, B, C or D.

{question}

A) {choices[0]}
B) {choices[1]}
C) {choices[2]}
D) {choices[3]}"""
CHOICES = "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"


def check_row(row: dict, where: str) -> None:
    for name in ("Question", *CHOICES):
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"{where} lacks a column: Question, {', '.join(CHOICES)} must be texts"
            )


def letter(response: str) -> str | None:
    """The answer of a response. Thoughts do not count: simple-evals' samplers leave them out."""
    found = re.search(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?", answer(response))
    return found and found[1].upper()


def accuracy(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    pairs = zip(responses, references, strict=True)
    return [float(letter(response) == truth) for response, truth in pairs]


def answered(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [float(letter(response) is not None) for response in responses]


class GPQA(Task):
    temperature, max_tokens = 0.5, 2048
    shows_prompts = False  # the authors ask not to publish the items

    def __init__(self, config):
        super().__init__(
            rows.only_evaluated(self.load),
            [Channel("accuracy", accuracy), Channel("answered", answered)],
        )
        self.path = config.eval_data or URL
        self.repeats = config.repeats
        self.seed = config.seed

    def load(self, n: int | None) -> list[Example]:
        """A row's examples, one after another.

        As in simple-evals the rows are repeated, and then each gets its permutation from one
        generator, in order: example k of row i has permutation k * number of rows + i.
        """
        questions = rows.read_rows(self.path)
        for i, row in enumerate(questions):
            check_row(row, f"{self.path}: row {i}")
        questions = questions[:n]
        ids = [str(row.get("Record ID") or i) for i, row in enumerate(questions)]
        rows.check_ids(ids, self.path)
        rng = random.Random(self.seed)
        orders = [rng.sample(range(4), 4) for _ in range(self.repeats * len(questions))]
        examples = []
        for i, row in enumerate(questions):
            for order in orders[i :: len(questions)]:
                choices = [row[CHOICES[k]] for k in order]
                text = PROMPT.format(question=row["Question"], choices=choices)
                right = "ABCD"[order.index(0)]
                examples.append(Example([{"role": "user", "content": text}], right, id=ids[i]))
        return examples

    def result(
        self, example: Example, response: str, rewards: np.ndarray
    ) -> tuple[dict[str, float], dict]:
        scores = dict(zip(("accuracy", "answered"), rewards.tolist(), strict=True))
        encoded = base64.b64encode(response.encode()).decode()
        letters = {"letter": letter(response), "correct": example.reference}
        return scores, letters | {"base64": encoded}


def task(config) -> Task:
    return GPQA(config)
