"""BFCL v3, single turn (github ShishirPatil/gorilla), in ToolRL's prompt format.

Rows, answers and checker come from the package bfcl-eval.
"""

import collections
import copy
import functools
import importlib.util
import json
import sys
import types
import unittest.mock
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from infra.ranks import InputError
from rewards import Channel, Example, Task
from tasks import rows
from tasks.rlla import format_reward

OPTIONS = ()
NON_LIVE = (
    "simple",
    "java",
    "javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
)
LIVE = (
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)

# The system prompt of ToolRL's training data (arXiv 2504.13958): a policy trained on it knows these
# words.
SYSTEM = """\
You are a helpful multi-turn dialogue assistant capable of leveraging tool calls to solve user \
tasks and provide structured chat responses.

**Available Tools**
In your response, you can use the following tools:
{tools}

**Steps for Each Turn**
1. **Think:** Recall relevant context and analyze the current user goal.
2. **Decide on Tool Usage:** If a tool is needed, specify the tool and its parameters.
3. **Respond Appropriately:** If a response is needed, generate one while maintaining consistency \
across user queries.

**Output Format**
```plaintext
<think> Your thoughts and reasoning </think>
<tool_call>
{{"name": "Tool name", "parameters": {{"Parameter name": "Parameter content", \
"... ...": "... ..."}}}}
{{"name": "... ...", "parameters": {{"... ...": "... ...", "... ...": "... ..."}}}}
...
</tool_call>
<response> AI's final response </response>
```

**Important Notes**
1. You must always include the `<think>` field to outline your reasoning. Provide at least one of \
`<tool_call>` or `<response>`. Decide whether to use `<tool_call>` (possibly multiple times), \
`<response>`, or both.
2. You can invoke multiple tool calls simultaneously in the `<tool_call>` fields. Each tool call \
should be a JSON object with a "name" field and an "parameters" field containing a dictionary of \
parameters. If no parameters are needed, leave the "parameters" field an empty dictionary.
3. Refer to the previous dialogue records in the history, including the user's queries, previous \
`<tool_call>`, `<response>`, and any tool feedback noted as `<obs>` (if exists)."""
# In BFCL only.
REFUSAL = (
    "\n4. If none of the tools fits the request, make no tool call and say so in `<response>`."
)
# What a response may hold, as references of format_reward.
FORMS = ["<tool_call>", "<response>", "<tool_call> <response>"]


class BFCL(Task):
    def __init__(self, config):
        super().__init__(
            rows.only_evaluated(self.load),
            [Channel("correct", correct), Channel("format", right_format)],
        )
        self.rows = {category: read(category) for category in NON_LIVE + LIVE}

    def load(self, n: int | None) -> list[Example]:
        """The first n of each category."""
        return [example for examples in self.rows.values() for example in examples[:n]]

    def result(
        self, example: Example, response: str, rewards: np.ndarray
    ) -> tuple[dict[str, float], dict]:
        scores = dict(zip(("correct", "format"), rewards.tolist(), strict=True))
        return scores, {"response": response, "calls": calls(response)}

    def averages(self) -> dict[str, dict[str, float]]:
        """v3's own averages, without multi-turn, which runs simulators and is not here.

        Non-live: simple, the mean of three languages, is one of five. Live: weighted by rows. AST:
        without (ir)relevance, so that simple is one of four. v3's overall is the mean of non-live,
        live and multi-turn.
        """
        sizes = {category: len(examples) for category, examples in self.rows.items()}
        non_live = dict.fromkeys(NON_LIVE, 1 / 5)
        non_live |= dict.fromkeys(("simple", "java", "javascript"), 1 / 15)
        live = shares(sizes, LIVE)
        both = non_live | live
        live_ast = [category for category in LIVE if "relevance" not in category]
        non_live_ast = [category for category in NON_LIVE if "relevance" not in category]
        return {
            "v3 without multi-turn (live, non-live)": {c: both[c] / 2 for c in both},
            "single turn (mean of all rows)": shares(sizes, NON_LIVE + LIVE),
            "non-live": non_live,
            "live": live,
            "non-live AST": {c: non_live[c] * 5 / 4 for c in non_live_ast},
            "live AST": shares(sizes, live_ast),
        }


def shares(sizes: dict[str, int], categories: Sequence[str]) -> dict[str, float]:
    """The weight of each category if all of their rows weigh the same."""
    total = sum(sizes[category] for category in categories)
    return {category: sizes[category] / total for category in categories}


def task(config) -> Task:
    return BFCL(config)


# Rewards


def correct(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [*map(_correct, responses, references)]


def _correct(response: str, reference: str) -> float:
    """1 or 0, by the checker; (ir)relevance by whether there is a call."""
    category, functions, answer = json.loads(reference)
    if "relevance" in category:
        return float(bool(calls(response)) != ("irrelevance" in category))
    language = {"java": "Java", "javascript": "JavaScript"}.get(category, "Python")
    try:
        result = package().check(functions, calls(response), answer, language, category, "rvpo")
    # On what the checker does not foresee.
    except (TypeError, ValueError, LookupError, AttributeError, NotImplementedError):
        return 0.0
    return float(result["valid"])


def calls(response: str) -> list[dict]:
    """[{name: parameters}] of the last tool_call block; lines that are no call are skipped.

    As in ToolRL's handler a block in the thoughts counts, if no other follows.
    """
    _, tag, rest = response.rpartition("<tool_call>")
    block, _, _ = rest.partition("</tool_call>")
    if not tag:
        return []
    found = []
    for line in block.split("\n"):
        try:
            call = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(call, dict):
            continue
        name, parameters = call.get("name"), call.get("parameters")
        if isinstance(name, str) and isinstance(parameters, dict):
            found.append({name: parameters})
    return found


def right_format(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [max(format_reward([], [response] * len(FORMS), FORMS)) for response in responses]


# Rows


def read(category: str) -> list[Example]:
    """All rows of a category.

    The reference holds what `correct` asks for, the functions with Java's own types.
    """
    file = f"BFCL_v3_{category}.json"
    answers = {}
    if "relevance" not in category:
        for row in rows.read_rows(str(package().data / "possible_answer" / file)):
            answers[row["id"]] = row["ground_truth"]
    examples = []
    for row in rows.read_rows(str(package().data / file)):
        functions = package().hint(copy.deepcopy(row["function"]), category)
        (turn,) = row["question"]
        reference = json.dumps([category, row["function"], answers.get(row["id"])])
        chat = messages(functions, turn)
        examples.append(Example(chat, reference, id=row["id"], category=category))
    return examples


def messages(functions: list[dict], turn: list[dict]) -> list[dict]:
    """ToolRL's prompt for a row. As in its handler, the data set's system messages are dropped."""
    tools = [
        f"{i}. Name: {function['name']}\nDescription: {function['description']}\n"
        f"Parameters: {json.dumps(function['parameters']['properties'])}"
        for i, function in enumerate(functions, start=1)
    ]
    tags = {"user": "user", "assistant": "response"}
    history = []
    for message in turn:
        if message["role"] in tags:
            tag = tags[message["role"]]
            history.append(f"<{tag}> {message['content']} </{tag}>")
    system = SYSTEM.format(tools="\n".join(tools)) + REFUSAL
    user = "**Dialogue Records History**\n" + "\n\n".join(history)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


@functools.cache
def package() -> types.SimpleNamespace:
    """What is used of bfcl-eval. Raises InputError if it is missing.

    data: the folder. check: the checker of calls. hint: names the programming language in the
    functions' descriptions.
    """
    spec = importlib.util.find_spec("bfcl_eval")
    data = Path(spec.origin).parent / "data" if spec else Path()
    if not (data / "BFCL_v3_simple.json").is_file():
        raise InputError(
            "--task bfcl takes v3's rows and checker from a package: pip install --no-deps "
            "bfcl-eval==2025.8.6.2 (its own dependencies conflict with vLLM's, and are not needed)"
        )
    # Imported beside the two functions, and not needed: retries, parsers, and a table of all model
    # handlers with the libraries of all vendors, in which the checker looks one flag up.
    table = collections.defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
    stubs = {
        "tenacity": unittest.mock.MagicMock(),
        "bfcl_eval.model_handler.parser.java_parser": unittest.mock.MagicMock(),
        "bfcl_eval.model_handler.parser.js_parser": unittest.mock.MagicMock(),
        "bfcl_eval.constants.model_config": types.SimpleNamespace(MODEL_CONFIG_MAPPING=table),
    }
    with unittest.mock.patch.dict(sys.modules, stubs):
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
        from bfcl_eval.model_handler.utils import func_doc_language_specific_pre_processing
    return types.SimpleNamespace(
        data=data, check=ast_checker, hint=func_doc_language_specific_pre_processing
    )
