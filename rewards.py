"""Rewards: functions from (prompts, responses, references) to one number each. A task is a named list of them, or one
of JUDGED, see judge.py.

    def polite(prompts, responses, references):  # lists of str, one entry a response
        return [float("please" in response.lower()) for response in responses]

    TASKS["tools"].append(Reward("polite", polite))

NaN says that a reward is missing for a response; it is left out, never counted as 0. Model output is data: it is
parsed, never run.
"""

import functools
import json
import re
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence that says what, and what to do."""


class Reward(NamedTuple):
    """One channel. fn: (prompts, responses, references) -> one float or NaN each. full: the value that satisfies it.
    bounds: its worst and its best value, which only --agg softmin asks for."""

    name: str
    fn: Callable[[list[str], list[str], list[str]], list[float]]
    full: float = 1.0
    bounds: tuple[float, float] = (0.0, 1.0)


LONGEST = 100_000  # characters of calls: a megabyte of them would take a tenth of a second to parse


def tool_calls(text: str) -> list[dict]:
    """The first <tool_call> block, one JSON object with a "name" a line. Raises ValueError for anything else."""
    if "<tool_call>" not in text or "</tool_call>" not in text:
        raise ValueError("no <tool_call> block")
    block = text.split("<tool_call>")[1].split("</tool_call>")[0].strip()
    if len(block) > LONGEST:
        raise ValueError(f"a <tool_call> block of more than {LONGEST} characters")
    try:
        calls = [json.loads(line) for line in block.split("\n")]
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError('a line of the <tool_call> block is no JSON object with a "name"')
    return calls


# ToolRL (arXiv 2504.13958; github qiancheng0/ToolRL). The two rewards are independent of each other.


def toolrl_format(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    """0 or 1: the blocks that the reference has, in order, one newline apart, and nothing around them. The tags of
    tool_call and response occur once each; think tags are not counted."""
    out = []
    for response, reference in zip(responses, references, strict=True):
        pattern, once = r"<think>.*?</think>", []
        if "<tool_call>" in reference:
            pattern += r"\n<tool_call>\n.*?\n</tool_call>"
            once += ["<tool_call>", "</tool_call>"]
        if "<response>" in reference:
            pattern += r"\n<response>.*?</response>"
            once += ["<response>", "</response>"]
        # Counted first: with each tag there once the lazy pattern cannot backtrack more than linearly.
        well_formed = all(response.count(tag) == 1 for tag in once)
        out.append(float(well_formed and re.fullmatch(pattern, response.strip(), re.DOTALL) is not None))
    return out


def _overlap(a: list, b: list) -> float:
    """ToolRL's similarity of two lists as multisets: 1 if equal, 0 if one is empty, else intersection over union."""
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    both = (Counter(a) & Counter(b)).total()
    return both / (len(a) + len(b) - both)


def _toolrl_score(true: list[dict], predicted: list[dict]) -> float:
    """-3 to 3. Raises what a malformed call raises: "parameters" missing, or no object."""
    if true == predicted:
        return 3.0
    score = _overlap([call["name"] for call in true], [call["name"] for call in predicted])
    unused = list(predicted)
    for call in true:
        best, match = 0.0, None
        for candidate in unused:
            if candidate["name"] != call["name"]:
                continue
            want, got = call["parameters"], candidate["parameters"]
            total = _overlap(list(want.keys()), list(got.keys())) + sum(k in got and got[k] == want[k] for k in want)
            if total > best:
                best, match = total, candidate
        if match is not None:
            unused = [c for c in unused if c is not match]
            score += best
    best_possible = 1 + sum(1 + len(call["parameters"]) for call in true)
    return 6 * score / best_possible - 3


def toolrl_correctness(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    """-3 to 3: names, parameter names and values against the reference's calls; 0 where the reference has no call.

    Values are compared as Python compares them (1 == 1.0 == true, as in the public code)."""
    out = []
    for response, reference in zip(responses, references, strict=True):
        if "<tool_call>" not in reference:
            out.append(0.0)
            continue
        true = tool_calls(reference)
        try:
            out.append(_toolrl_score(true, tool_calls(response)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            out.append(-3.0)
    return out


# The built-in task `tools`: one call, in ToolRL's format, split into channels between 0 and 1.

BLOCKS = re.compile(r"<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>", re.DOTALL)
TAGS = "<think>", "</think>", "<tool_call>", "</tool_call>"
BRIEF = 200  # characters: enough for a short thought and any call of the task


def _call(text: str) -> tuple[str, dict] | None:
    """(name, parameters) of the first call, None if there is none that can be parsed."""
    try:
        call = tool_calls(text)[0]
    except ValueError:
        return None
    return (call["name"], call["parameters"]) if isinstance(call.get("parameters"), dict) else None


@functools.lru_cache(256)  # every channel of a response asks for all
def tools_channels(response: str, reference: str) -> dict[str, float]:
    """Every channel of the task `tools`. A response without a call has 0 in the four that are about the call."""
    call, (true_name, true) = _call(response), _call(reference)
    name, parameters = call or (None, {})
    blocks = BLOCKS.search(response) if all(response.count(tag) == 1 for tag in TAGS) else None
    right = [key for key in true if key in parameters and parameters[key] == true[key]
             and type(parameters[key]) is type(true[key])]
    return {
        "format": float(blocks is not None),  # think, newline, tool_call, each tag once; `clean` sees to text around
        "tool": float(name == true_name),
        "arg_names": sum(key in parameters for key in true) / len(true),
        "arg_values": len(right) / len(true),
        "no_invented": (call is not None) - sum(key not in true for key in parameters) / max(1, len(parameters)),
        "clean": len(blocks.group() if blocks else "") / max(1, len(response.strip())),  # share that is in the blocks
        "brief": min(1.0, max(0.0, 2 - len(response) / BRIEF)),  # falls to 0 at twice BRIEF
    }


def _tools_reward(name: str) -> Reward:
    return Reward(name, lambda prompts, responses, references: [
        tools_channels(response, reference)[name] for response, reference in zip(responses, references, strict=True)])


TOOLS_CHANNELS = "format", "tool", "arg_names", "arg_values", "no_invented", "clean", "brief"
TASKS: dict[str, list[Reward]] = {
    "tools": [_tools_reward(name) for name in TOOLS_CHANNELS],
    "rlla": [Reward("format", toolrl_format), Reward("correctness", toolrl_correctness, 3.0, (-3.0, 3.0))],
}
JUDGED = "rar-medicine", "rar-science", "rubric"  # their rewards are a judge's verdicts on each prompt's own criteria


def _is_number(value: object) -> bool:
    """NaN is one. Beyond 1e100 squares overflow, and the channel would lose its signal without a word."""
    if isinstance(value, int):  # also True and False
        return abs(value) <= 10**100
    return isinstance(value, (float, np.integer, np.floating, np.bool_)) and not abs(float(value)) > 1e100


def score(task: str, prompts: list[str], responses: list[str], references: list[str]) -> np.ndarray:
    """(N, K) float64, one row a response, one column a reward of the task. Raises InputError naming a reward that fails
    or does not return one number or NaN for each response."""
    names = ["joint", *(reward.name for reward in TASKS[task])]  # "joint" is what evaluation calls all of them
    if len(set(names)) < len(names):
        raise InputError(f"task {task}: each reward needs a name of its own, other than 'joint', got {names[1:]}")
    columns = []
    for name, fn, *_ in TASKS[task]:
        try:
            values = fn(prompts, responses, references)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(f"reward '{name}' raised {type(error).__name__}: {' '.join(str(error).split())} "
                             f"({Path(at.filename).name}, line {at.lineno})") from error
        if not isinstance(values, (list, tuple, np.ndarray)):
            raise InputError(f"reward '{name}' returned {str(values)[:40]}: return a list, one number a response")
        if len(values) != len(responses):
            raise InputError(f"reward '{name}' returned {len(values)} values for {len(responses)} responses")
        for i, value in enumerate(values):
            if not _is_number(value):
                raise InputError(f"reward '{name}' returned {value!r} for response {i}: return a finite number, or NaN "
                                 "if it is missing")
        columns.append(np.asarray(values, dtype=np.float64))
    return np.stack(columns, axis=-1).reshape(len(responses), len(columns))


def satisfied(task: str, rewards: np.ndarray) -> np.ndarray:
    """(..., K) -> (...), 1.0 if every reward that is present has its full value, else 0.0; NaN if none is present."""
    full = 1.0 if task in JUDGED else np.array([reward.full for reward in TASKS[task]])
    missing = np.isnan(rewards)
    return np.where(missing.all(-1), np.nan, (missing | (rewards >= full - 1e-6)).all(-1))


def unit(task: str, rewards: torch.Tensor) -> torch.Tensor:
    """(..., K) -> (..., K): each channel 0 at its worst and 1 at its best. A judge's verdicts are so already."""
    if task in JUDGED:
        return rewards
    worst, best = torch.tensor([reward.bounds for reward in TASKS[task]], dtype=rewards.dtype).T
    return (rewards - worst) / (best - worst)


def start(task: str, example, responses: list[str]) -> Callable[[], np.ndarray]:
    """A function that returns the rewards (G, K) of G responses to a data.Example, as judge.Judge.start does."""
    prompts, references = [example.messages[-1]["content"]] * len(responses), [example.reference] * len(responses)
    return functools.partial(score, task, prompts, responses, references)
