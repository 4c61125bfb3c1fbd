"""ToolRL (arXiv 2504.13958; github qiancheng0/ToolRL): its data set and its two rewards.

The data set is rlla_4k, in its public schema. The two rewards are independent of each other.
"""

import re
from collections import Counter

from infra import chats
from infra.ranks import InputError
from rewards import Channel, Example, Task
from tasks import rows
from tasks.tools import tool_calls

OPTIONS = "data", "eval_data"
# 3,920 + 80 rows.
PUBLIC = "https://raw.githubusercontent.com/qiancheng0/ToolRL/main/dataset/rlla_4k/{split}.parquet"


def task(config) -> Task:
    return Task(
        rows.prompts(config, PUBLIC, from_row),
        [
            Channel("format", format_reward, help="ToolRL's format"),
            Channel("correctness", correctness, 3.0, (-3.0, 3.0), help="the calls, -3 to 3"),
        ],
    )


def from_row(row: dict, where: str) -> Example:
    """One row: prompt [{role, content}], reward_model {ground_truth}."""
    messages = chats.chat(row.get("prompt"), where)
    reward_model = row.get("reward_model")
    reference = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if not isinstance(reference, str) or not reference.strip():
        raise InputError(
            f'{where} has no reference answer: reward_model must have a text "ground_truth"'
        )
    # Only the answer counts: in the distilled variant of the data one thought in twenty talks about
    # <tool_call> tags.
    _, _, reference = reference.rpartition("</think>")
    reference = reference.strip()
    if "<tool_call>" in reference:
        try:
            calls = tool_calls(reference)
        except ValueError as error:
            raise InputError(
                f"{where} has a reference answer that cannot be parsed: {error}"
            ) from error
        if not all(isinstance(call.get("parameters"), dict) for call in calls):
            raise InputError(f'{where} has a reference call without an object "parameters"')
    return Example(messages, reference, tools=chats.tools(row.get("tools"), where))


def format_reward(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    """0 or 1: the blocks that the reference has, in order, one newline apart, nothing around them.

    The tags of tool_call and response occur once each; think tags are not counted.
    """
    pairs = zip(responses, references, strict=True)
    return [float(_well_formed(*pair)) for pair in pairs]


def _well_formed(response: str, reference: str) -> bool:
    pattern = r"<think>.*?</think>"
    tags = []
    if "<tool_call>" in reference:
        pattern += r"\n<tool_call>\n.*?\n</tool_call>"
        tags += ["<tool_call>", "</tool_call>"]
    if "<response>" in reference:
        pattern += r"\n<response>.*?</response>"
        tags += ["<response>", "</response>"]
    # Counted first: with each tag there once the lazy pattern backtracks only linearly.
    if any(response.count(tag) != 1 for tag in tags):
        return False
    return re.fullmatch(pattern, response.strip(), re.DOTALL) is not None


def correctness(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    """-3 to 3: names, parameters' names and their values against the reference's calls.

    0 where the reference has no call. Values are compared as Python does it (1 == 1.0 == true), as
    in the public code.
    """
    pairs = zip(responses, references, strict=True)
    return [_correctness(*pair) for pair in pairs]


def _correctness(response: str, reference: str) -> float:
    if "<tool_call>" not in reference:
        return 0.0
    true = tool_calls(reference)
    try:
        return _score(true, tool_calls(response))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return -3.0


def _overlap(a: list, b: list) -> float:
    """ToolRL's similarity of two lists as multisets: their intersection over their union.

    1 if both are empty.
    """
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    both = (Counter(a) & Counter(b)).total()
    return both / (len(a) + len(b) - both)


def _score(true: list[dict], predicted: list[dict]) -> float:
    """-3 to 3. Raises what a malformed call raises: "parameters" missing, or no object."""
    if true == predicted:
        return 3.0
    score = _overlap([call["name"] for call in true], [call["name"] for call in predicted])
    unused = list(predicted)
    for call in true:
        best = 0.0
        match = None
        for candidate in unused:
            if candidate["name"] != call["name"]:
                continue
            want, got = call["parameters"], candidate["parameters"]
            total = _overlap(list(want.keys()), list(got.keys()))
            total += sum(key in got and got[key] == want[key] for key in want)
            if total > best:
                best, match = total, candidate
        if match is not None:
            unused = [c for c in unused if c is not match]
            score += best
    best_possible = 1 + sum(1 + len(call["parameters"]) for call in true)
    return 6 * score / best_possible - 3
