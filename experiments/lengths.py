"""How long the prompts are that policies and judges get.

The lengths of the paper's data are recorded here; those of a user's file are counted.
"""

import functools
import math
import statistics
import sys
from typing import NamedTuple

import tasks
from config import EvalConfig
from infra.ranks import InputError
from rewards import Example
from tasks import rows
from tasks.verdicts import judge_prompt

EXPLAINED = ("healthbench",)  # tasks whose judge gives a reason before each verdict
ROWS = 500  # of a file, evenly spaced, are counted


class Lengths(NamedTuple):
    """Mean tokens. A judge's prompt is counted without its chat template (10 to 30 a request)."""

    source: str
    prompt: float  # the policy's, with its chat template
    criteria: float = 0.0  # K
    begin: float = 0.0  # the judge's prompt until the response
    middle: float = 0.0  # between the response and the first criterion's text
    item: float = 0.0  # this criterion, and what follows it
    more: float = 0.0  # each further criterion, where one request has all


# Counted with Qwen2.5's tokenizer. Of RaR's data only the number of criteria was known
# (arXiv 2507.17746).
_RAR = "RaR's number of criteria; all else HealthBench's, though RaR's prompts are single questions"
LENGTHS = {
    "rlla": Lengths("399 of the training rows", 760),
    "bfcl": Lengths("all rows", 883),
    "gpqa": Lengths(
        "83 are the wording's own, 217 assumed for question and choices: the data are gated", 300
    ),
    "rar-medicine": Lengths(_RAR, 241, 9.6, 282, 67, 75, 70),
    "rar-science": Lengths(_RAR, 241, 7.5, 282, 67, 75, 70),
    "healthbench": Lengths("40 of the rows", 241, 10.95, 282, 67, 92, 78),
}


def read_examples(task: str, path: str) -> list[Example]:
    """By the task's own reader. Raises InputError."""
    module = tasks.task_module(task)
    if task == "gpqa":
        return module.task(EvalConfig(task=task, eval_data=path)).load(None)
    if not hasattr(module, "from_row"):
        raise InputError(
            f"--eval-data {path}: the rows of {task} come from a package, and are counted already"
        )
    extra = {"by_title": False} if task.startswith("rar-") else {}
    return rows.read(path, functools.partial(module.from_row, **extra))


def count(task: str, path: str, tokenizer) -> Lengths:
    """Of a file in the task's schema. Raises InputError."""
    from infra import prompts

    examples = read_examples(task, path)
    examples = examples[:: max(1, math.ceil(len(examples) / ROWS))]
    if not examples:
        raise InputError(f"{path} has no rows")
    encoded = prompts.encode(tokenizer, examples, sys.maxsize)
    prompt = statistics.fmean(len(prompt.ids) for prompt in encoded)
    source = f"{len(examples)} rows of {path}"
    if not examples[0].criteria:
        return Lengths(source, prompt)
    judged = [count_judged(task, example, tokenizer) for example in examples]
    return Lengths(source, prompt, *map(statistics.fmean, zip(*judged, strict=True)))


def count_judged(task: str, example: Example, tokenizer) -> tuple[float, ...]:
    """(criteria, begin, middle, item, more) of Lengths, of one example."""

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    def ask(items: dict[str, str]) -> str:
        return judge_prompt(example.messages, "", items, explain=task in EXPLAINED)

    texts = tasks.task_module(task).judged_items(example)
    items = {f"criterion_{k}": text for k, text in enumerate(texts, 1)}
    whole = ask(items)
    # Quoted messages have no line breaks, so the first match is the prompt's own.
    start = end_of('\nResponse to grade:\n"', whole, 0)
    end = end_of("\ncriterion_1: ", whole, start)
    rests = []
    for name, text in items.items():
        alone = ask({name: text})
        rests.append(tokens(alone[end_of(f"\n{name}: ", alone, start) :]))
    item = statistics.fmean(rests)
    more = (tokens(whole[end:]) - item) / (len(items) - 1) if len(items) > 1 else item
    return len(items), tokens(whole[:start]), tokens(whole[start:end]), item, more


def end_of(part: str, text: str, start: int) -> int:
    return text.index(part, start) + len(part)
