"""The benchmarks of eval.py: their items, and the scores of a response. Public protocols; the wording of the prompts to
judge and to ask GPQA is our own.

An item's scores are numbers by name ({"overall": 0.5, "axis:accuracy": 1.0}); its group is the category over which
averages are taken.
"""

import base64
import collections
import functools
import importlib.util
import json
import os
import random
import re
import sys
import tempfile
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import data
import rewards as scoring
from data import Criterion, Example
from rewards import InputError


class Item(NamedTuple):
    """score: (a response to each example, a judge's verdicts (1, K) or None) -> (scores, what else to write down)."""

    id: str
    group: str
    examples: list[Example]  # the chats to answer; more than one for repeats
    score: Callable[[list[str], np.ndarray | None], tuple[dict[str, float], dict]]


# HealthBench (github openai/simple-evals; arXiv 2505.08775)

_BLOB = "https://openaipublic.blob.core.windows.net/simple-evals/healthbench/"
SUBSETS = {"full": _BLOB + "2025-05-07-06-14-12_oss_eval.jsonl", "hard": _BLOB + "hard_2025-05-08-21-00-10.jsonl",
           "consensus": _BLOB + "consensus_2025-05-09-20-00-46.jsonl"}


def healthbench_score(points: list[float], met: np.ndarray) -> float:
    """Points of the items that are met, over the sum of the positive points; not clipped. NaN if there are none, or if
    a verdict is missing."""
    points = np.array(points)
    possible = points[points > 0].sum()
    return float((points * met).sum() / possible) if possible > 0 else float("nan")


def _healthbench_item(row: dict, where: str) -> Item:
    messages, rubrics, tags = data.chat(row.get("prompt"), where), row.get("rubrics"), row.get("example_tags") or []
    if not isinstance(rubrics, list) or not all(
            isinstance(r, dict) and isinstance(r.get("criterion"), str) and type(r.get("points")) in (int, float)
            and abs(r["points"]) <= 1e6 for r in rubrics) or not any(r["points"] > 0 for r in rubrics):
        raise InputError(f'{where} has no rubrics: a list of {{"criterion": text, "points": number, "tags": [...]}}, '
                         "one of them with positive points")
    for own in [tags, *(r.get("tags") or [] for r in rubrics)]:
        if not isinstance(own, list) or not all(isinstance(tag, str) and tag.isprintable() for tag in own):
            raise InputError(f"{where} has tags that are no list of texts: {str(own)[:40]!r}")
    criteria = tuple(Criterion(f"[{r['points']:g}] {r['criterion']}", "criteria") for r in rubrics)
    points = [r["points"] for r in rubrics]

    def score(responses: list[str], verdicts: np.ndarray) -> tuple[dict[str, float], dict]:
        met = verdicts[0]
        overall = healthbench_score(points, met)
        scores = {"overall": overall} | {tag: overall for tag in tags if tag.startswith("theme:")}
        for axis in sorted({tag for r in rubrics for tag in r.get("tags") or [] if tag.startswith("axis:")}):
            own = [i for i, r in enumerate(rubrics) if axis in (r.get("tags") or [])]
            scores[axis] = healthbench_score([points[i] for i in own], met[own])
        return scores, {"response": responses[0], "met": met.tolist()}

    return Item(str(row.get("prompt_id") or where), "", [Example(messages, criteria=criteria)], score)


def healthbench(args) -> list[Item]:
    path = args.data or SUBSETS[args.subset]
    return [_healthbench_item(row, f"{path}: row {i}") for i, row in enumerate(data.read_rows(path))]


# GPQA-Diamond (arXiv 2311.12022), by simple-evals' protocol

GPQA_URL = "https://openaipublic.blob.core.windows.net/simple-evals/gpqa_diamond.csv"
GPQA_PROMPT = """\
Choose the right answer to this question. Reason step by step first. Then end with a line 'Answer: $LETTER' (no quotes),
in which LETTER is A, B, C or D.

{question}

A) {choices[0]}
B) {choices[1]}
C) {choices[2]}
D) {choices[3]}"""
GPQA_CHOICES = "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"


def gpqa_letter(response: str) -> str | None:
    found = re.search(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?", response)
    return found and found[1].upper()


def gpqa(args) -> list[Item]:
    """The rows `repeats` times, and then a permutation for each from one generator, in order. Nothing but letters and
    ids is written in plain text: the authors ask not to publish the questions, and a response may quote them."""
    path, rng = args.data or GPQA_URL, random.Random(args.seed)
    rows = data.read_rows(path)
    for i, row in enumerate(rows):
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in ("Question", *GPQA_CHOICES)):
            raise InputError(f"{path}: row {i} lacks a column: Question, {', '.join(GPQA_CHOICES)} must be texts")
    rows = rows[:args.limit or None]
    orders = [rng.sample(range(4), 4) for _ in range(args.repeats * len(rows))]

    def item(i: int, row: dict) -> Item:
        own = orders[i::len(rows)]
        chats = [GPQA_PROMPT.format(question=row["Question"], choices=[row[GPQA_CHOICES[k]] for k in order])
                 for order in own]
        correct = ["ABCD"[order.index(0)] for order in own]

        def score(responses: list[str], verdicts: None) -> tuple[dict[str, float], dict]:
            letters = [gpqa_letter(response) for response in responses]
            right = [float(letter == truth) for letter, truth in zip(letters, correct, strict=True)]
            return ({"accuracy": float(np.mean(right)), "answered": float(np.mean([x is not None for x in letters]))},
                    {"letters": letters, "correct": correct,
                     "responses_base64": [base64.b64encode(response.encode()).decode() for response in responses]})

        examples = [Example([{"role": "user", "content": chat}], letter)
                    for chat, letter in zip(chats, correct, strict=True)]
        return Item(str(row.get("Record ID") or i), "", examples, score)

    return [item(i, row) for i, row in enumerate(rows)]


# BFCL v3, single turn (github ShishirPatil/gorilla), in ToolRL's prompt format; data and checker from bfcl-eval

NON_LIVE = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple",
            "irrelevance")
LIVE = "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance"

# The system prompt of ToolRL's training data (arXiv 2504.13958): a policy trained on it knows these words.
TOOLRL_SYSTEM = """\
You are a helpful multi-turn dialogue assistant capable of leveraging tool calls to solve user tasks and provide \
structured chat responses.

**Available Tools**
In your response, you can use the following tools:
{tools}

**Steps for Each Turn**
1. **Think:** Recall relevant context and analyze the current user goal.
2. **Decide on Tool Usage:** If a tool is needed, specify the tool and its parameters.
3. **Respond Appropriately:** If a response is needed, generate one while maintaining consistency across user queries.

**Output Format**
```plaintext
<think> Your thoughts and reasoning </think>
<tool_call>
{{"name": "Tool name", "parameters": {{"Parameter name": "Parameter content", "... ...": "... ..."}}}}
{{"name": "... ...", "parameters": {{"... ...": "... ...", "... ...": "... ..."}}}}
...
</tool_call>
<response> AI's final response </response>
```

**Important Notes**
1. You must always include the `<think>` field to outline your reasoning. Provide at least one of `<tool_call>` or \
`<response>`. Decide whether to use `<tool_call>` (possibly multiple times), `<response>`, or both.
2. You can invoke multiple tool calls simultaneously in the `<tool_call>` fields. Each tool call should be a JSON \
object with a "name" field and an "parameters" field containing a dictionary of parameters. If no parameters are \
needed, leave the "parameters" field an empty dictionary.
3. Refer to the previous dialogue records in the history, including the user's queries, previous `<tool_call>`, \
`<response>`, and any tool feedback noted as `<obs>` (if exists)."""
REFUSAL = "\n4. If none of the tools fits the request, make no tool call and say so in `<response>`."  # BFCL only
FORMS = "<tool_call>", "<response>", "<tool_call> <response>"  # references, for toolrl_format: what a response may hold


@functools.cache
def bfcl_package() -> types.SimpleNamespace:
    """What is used of bfcl-eval. Raises InputError if it is missing."""
    if importlib.util.find_spec("bfcl_eval") is None:
        raise InputError("--task bfcl takes its data and checker from a package: pip install --no-deps "
                         "bfcl-eval==2026.3.23 (its own dependencies conflict with vLLM's, and are not needed)")
    scratch = tempfile.TemporaryDirectory(prefix="bfcl")  # it makes folders when imported
    os.environ.setdefault("BFCL_PROJECT_ROOT", scratch.name)
    # The checker looks one flag up in a table of all model handlers, which imports the libraries of all vendors.
    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = collections.defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
    sys.modules.setdefault(table.__name__, table)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry

    return types.SimpleNamespace(entries=load_dataset_entry, truths=load_ground_truth_entry, check=ast_checker,
                                 language=Language, scratch=scratch)


def toolrl_messages(functions: list[dict], messages: list[dict]) -> list[dict]:
    """ToolRL's prompt for a BFCL entry; as in its handler the system messages of the data set are dropped."""
    tools = "\n".join(f"{i}. Name: {f['name']}\nDescription: {f['description']}\n"
                      f"Parameters: {json.dumps(f['parameters']['properties'])}" for i, f in enumerate(functions, 1))
    tags = {"user": "user", "assistant": "response"}
    turns = [(tags[m["role"]], m["content"]) for m in messages if m["role"] in tags]
    history = "\n\n".join(f"<{tag}> {content} </{tag}>" for tag, content in turns)
    return [{"role": "system", "content": TOOLRL_SYSTEM.format(tools=tools) + REFUSAL},
            {"role": "user", "content": "**Dialogue Records History**\n" + history}]


def bfcl_calls(response: str) -> list[dict]:
    """[{name: parameters}] of the last tool_call block; lines that are no call are skipped, as in ToolRL's handler."""
    _, tag, rest = response.rpartition("<tool_call>")
    calls = []
    for line in rest.partition("</tool_call>")[0].split("\n") if tag else []:
        try:
            call = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("parameters"), dict):
            calls.append({call["name"]: call["parameters"]})
    return calls


def bfcl_correct(package, category: str, functions: list[dict], truth: list | None, calls: list[dict]) -> float:
    """1 or 0, by bfcl-eval's checker; (ir)relevance by whether there is a call."""
    if "relevance" in category:
        return float(bool(calls) != ("irrelevance" in category))
    language = {"simple_java": "JAVA", "simple_javascript": "JAVASCRIPT"}.get(category, "PYTHON")
    try:
        result = package.check(functions, calls, truth, package.language[language], category, "rvpo")
    except (TypeError, ValueError, LookupError, AttributeError, NotImplementedError):  # on what it does not foresee
        return 0.0
    return float(result["valid"])


def bfcl(args) -> list[Item]:
    """The single-turn categories; with args.limit the first rows of each."""
    package, items = bfcl_package(), []
    for category in NON_LIVE + LIVE:
        entries = package.entries(category, include_language_specific_hint=True)
        checked = package.entries(category, include_language_specific_hint=False)  # with Java's own types
        truths = [None] * len(entries)
        if "relevance" not in category:
            truths = [row["ground_truth"] for row in package.truths(category)]
        for entry, original, truth in list(zip(entries, checked, truths, strict=True))[:args.limit or None]:
            def score(responses, verdicts, category=category, functions=original["function"], truth=truth):
                calls = bfcl_calls(responses[0])
                right_format = max(scoring.toolrl_format(list(FORMS), responses * len(FORMS), list(FORMS)))
                return ({"correct": bfcl_correct(package, category, functions, truth, calls), "format": right_format},
                        {"response": responses[0], "calls": calls})

            example = Example(toolrl_messages(entry["function"], entry["question"][0]), json.dumps(truth))
            items.append(Item(entry["id"], category, [example], score))
    return items


def bfcl_averages() -> dict[str, dict[str, float]]:
    """{name: {category: weight}}. Non-live: simple, the mean of its three languages, is one of five; live: weighted by
    rows. v3's overall is the mean of non-live, live and multi-turn; multi-turn runs simulators and is not here. The
    package's files are v4's: 884 and 16 rows of live (ir)relevance, where v3 had 882 and 18."""
    sizes = {category: len(bfcl_package().entries(category)) for category in NON_LIVE + LIVE}
    non_live = {c: 1 / 15 if c.startswith("simple") else 1 / 5 for c in NON_LIVE}
    live = {c: sizes[c] / sum(sizes[c] for c in LIVE) for c in LIVE}
    return {"v3 without multi-turn (live, non-live)": {c: w / 2 for c, w in (non_live | live).items()},
            "single turn (mean of all rows)": {c: size / sum(sizes.values()) for c, size in sizes.items()},
            "non-live": non_live, "live": live}


# The tasks of train.py: greedy answers to their held-out prompts


def trained_task(args) -> list[Item]:
    """rlla (its test file, or --data) and tools (generated, --limit of them, 200 by default)."""
    examples = (data.tools(args.limit or 200, "test") if args.task == "tools" else
                data.read("rlla", args.data or data.PUBLIC["rlla"].format(split="test")))

    def item(i: int, example: Example) -> Item:
        def score(responses: list[str], verdicts: None) -> tuple[dict[str, float], dict]:
            row = scoring.score(args.task, [example.messages[-1]["content"]], responses, [example.reference])
            scores = {reward.name: float(x) for reward, x in zip(scoring.TASKS[args.task], row[0], strict=True)}
            return ({"joint": float(scoring.satisfied(args.task, row)[0]), **scores},
                    {"response": responses[0], "reference": example.reference})

        return Item(str(i), "", [example], score)

    return [item(i, example) for i, example in enumerate(examples)]


LOADERS = {"healthbench": healthbench, "gpqa": gpqa, "bfcl": bfcl, "rlla": trained_task, "tools": trained_task}


def load(args) -> list[Item]:
    """The items of args.task; with args.limit only the first. Raises InputError."""
    if args.data and args.task in ("tools", "bfcl"):
        raise InputError(f"--data: the task {args.task} brings its own")
    items = LOADERS[args.task](args)
    items = items if args.task == "bfcl" else items[:args.limit or None]
    if not items:
        raise InputError(f"{args.data or args.task}: no rows to evaluate on")
    if len({item.id for item in items}) < len(items):
        raise InputError(f"{args.data or args.task}: two rows have the same id, and results go by it")
    return items
