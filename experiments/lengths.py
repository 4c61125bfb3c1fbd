"""How long the prompts are that policies and judges get: recorded, and counted in a file of the user's."""

import functools
import math
import statistics
import sys
from types import SimpleNamespace
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
    """Mean tokens. Those of a judge's prompt are without its chat template, which adds 10 to 30 a request."""

    source: str
    prompt: float  # the policy's, with its chat template
    criteria: float = 0.0  # K
    begin: float = 0.0  # the judge's prompt until the response
    middle: float = 0.0  # between the response and the first criterion's text
    item: float = 0.0  # this criterion, and what follows it
    more: float = 0.0  # each further criterion, where one request has all


# Counted with Qwen2.5's tokenizer. Of RaR's data only the number of criteria was known (arXiv 2507.17746).
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


def judged(task: str, example: Example) -> list[str]:
    """The items that the task would have a judge decide."""
    module, items = tasks.task_module(task), []
    kind = module.HealthBench if task == "healthbench" else module.Rubrics
    task = SimpleNamespace(ask=lambda example, responses, texts: items.extend(texts))
    kind.start(task, example, [])
    return items


def count(task: str, path: str, tokenizer) -> Lengths:
    """Of a file in the task's schema. Raises InputError."""
    from infra import prompts

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    found, parts = read_examples(task, path), []
    found = found[:: max(1, math.ceil(len(found) / ROWS))]
    if not found:
        raise InputError(f"{path} has no rows")
    prompt = statistics.fmean(len(x.ids) for x in prompts.encode(tokenizer, found, sys.maxsize))
    for example in found if found[0].criteria else ():
        items = {f"criterion_{k}": text for k, text in enumerate(judged(task, example), 1)}
        ask = functools.partial(judge_prompt, example.messages, "", explain=task in EXPLAINED)
        whole, response, label = ask(items), 'Response to grade:\n"', "\ncriterion_1: "
        start = (
            whole.index("\n" + response) + 1 + len(response)
        )  # quoted messages have no line breaks
        end = whole.index(label, start) + len(label)
        item = statistics.fmean(
            tokens(text[text.index(f"\n{name}: ", start) + len(name) + 3 :])
            for name, text in ((name, ask({name: items[name]})) for name in items)
        )
        more = (tokens(whole[end:]) - item) / (len(items) - 1) if len(items) > 1 else item
        parts.append((len(items), tokens(whole[:start]), tokens(whole[start:end]), item, more))
    return Lengths(
        f"{len(found)} rows of {path}", prompt, *map(statistics.fmean, zip(*parts, strict=True))
    )
