"""BFCL v3, single turn (github ShishirPatil/gorilla), in ToolRL's prompt format. Rows, answers and checker are those of
the package bfcl-eval."""

import collections
import copy
import functools
import importlib.util
import json
import sys
import types
import unittest.mock
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

# The system prompt of ToolRL's training data (arXiv 2504.13958): a policy trained on it knows these words.
SYSTEM = """\
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
FORMS = (
    "<tool_call>",
    "<response>",
    "<tool_call> <response>",
)  # references of format_reward: what a response may hold


@functools.cache
def package() -> types.SimpleNamespace:
    """What is used of bfcl-eval: data, the folder; check, the checker of calls; hint, which tells in the functions'
    descriptions which language they are of. Raises InputError if it is missing."""
    spec = importlib.util.find_spec("bfcl_eval")
    if (
        spec is None
        or not (data := Path(spec.origin).parent / "data").joinpath("BFCL_v3_simple.json").is_file()
    ):
        raise InputError(
            "--task bfcl takes v3's rows and checker from a package: pip install --no-deps "
            "bfcl-eval==2025.8.6.2 (its own dependencies conflict with vLLM's, and are not needed)"
        )
    # Imported beside the two functions, and not needed: retries, parsers, and a table of all model handlers with the
    # libraries of all vendors, in which the checker looks one flag up.
    stubs = {
        name: unittest.mock.MagicMock()
        for name in (
            "tenacity",
            "bfcl_eval.model_handler.parser.java_parser",
            "bfcl_eval.model_handler.parser.js_parser",
        )
    }
    table = collections.defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
    stubs["bfcl_eval.constants.model_config"] = types.SimpleNamespace(MODEL_CONFIG_MAPPING=table)
    with unittest.mock.patch.dict(sys.modules, stubs):
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
        from bfcl_eval.model_handler.utils import func_doc_language_specific_pre_processing
    return types.SimpleNamespace(
        data=data, check=ast_checker, hint=func_doc_language_specific_pre_processing
    )


def messages(functions: list[dict], turn: list[dict]) -> list[dict]:
    """ToolRL's prompt for a row of BFCL; as in its handler the system messages of the data set are dropped."""
    tools = "\n".join(
        f"{i}. Name: {f['name']}\nDescription: {f['description']}\n"
        f"Parameters: {json.dumps(f['parameters']['properties'])}"
        for i, f in enumerate(functions, 1)
    )
    tags = {"user": "user", "assistant": "response"}
    said = [(tags[m["role"]], m["content"]) for m in turn if m["role"] in tags]
    history = "\n\n".join(f"<{tag}> {content} </{tag}>" for tag, content in said)
    return [
        {"role": "system", "content": SYSTEM.format(tools=tools) + REFUSAL},
        {"role": "user", "content": "**Dialogue Records History**\n" + history},
    ]


def read(category: str) -> list[Example]:
    """All rows of a category. The reference holds what `correct` asks for, the functions with Java's own types."""

    def lines(folder: Path) -> list[dict]:
        return rows.read_rows(str(folder / f"BFCL_v3_{category}.json"))

    entries, answers = lines(package().data), {}
    if "relevance" not in category:
        answers = {
            row["id"]: row["ground_truth"] for row in lines(package().data / "possible_answer")
        }
    return [
        Example(
            messages(
                package().hint(copy.deepcopy(entry["function"]), category), entry["question"][0]
            ),
            json.dumps([category, entry["function"], answers.get(entry["id"])]),
            id=entry["id"],
            category=category,
        )
        for entry in entries
    ]


def calls(response: str) -> list[dict]:
    """[{name: parameters}] of the last tool_call block; lines that are no call are skipped. As in
    ToolRL's handler a block in the thoughts counts, if no other follows."""
    _, tag, rest = response.rpartition("<tool_call>")
    found = []
    for line in rest.partition("</tool_call>")[0].split("\n") if tag else []:
        try:
            call = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(call, dict)
            and isinstance(call.get("name"), str)
            and isinstance(call.get("parameters"), dict)
        ):
            found.append({call["name"]: call["parameters"]})
    return found


def _correct(response: str, reference: str) -> float:
    """1 or 0, by the checker; (ir)relevance by whether there is a call."""
    category, functions, answer = json.loads(reference)
    if "relevance" in category:
        return float(bool(calls(response)) != ("irrelevance" in category))
    language = {"java": "Java", "javascript": "JavaScript"}.get(category, "Python")
    try:
        result = package().check(functions, calls(response), answer, language, category, "rvpo")
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        NotImplementedError,
    ):  # on what it does not foresee
        return 0.0
    return float(result["valid"])


def correct(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [
        _correct(response, reference)
        for response, reference in zip(responses, references, strict=True)
    ]


def right_format(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [max(format_reward([], [response] * len(FORMS), list(FORMS))) for response in responses]


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
        """Non-live: simple, the mean of three languages, is one of five; live: weighted by rows. AST: without
        (ir)relevance, so that simple is one of four. The overall of v3 is the mean of non-live, live and multi-turn;
        multi-turn runs simulators and is not here."""
        sizes = {category: len(examples) for category, examples in self.rows.items()}
        non_live = {c: 1 / 15 if c in ("simple", "java", "javascript") else 1 / 5 for c in NON_LIVE}
        live = {c: sizes[c] / sum(sizes[c] for c in LIVE) for c in LIVE}
        ast = {c: weight * 5 / 4 for c, weight in non_live.items() if "relevance" not in c}
        live_ast = {c: sizes[c] for c in LIVE if "relevance" not in c}
        return {
            "v3 without multi-turn (live, non-live)": {
                c: w / 2 for c, w in (non_live | live).items()
            },
            "single turn (mean of all rows)": {
                c: size / sum(sizes.values()) for c, size in sizes.items()
            },
            "non-live": non_live,
            "live": live,
            "non-live AST": ast,
            "live AST": {c: size / sum(live_ast.values()) for c, size in live_ast.items()},
        }


def task(config) -> Task:
    return BFCL(config)
