"""Whatever a policy, a judge or a data file may say, values are in their range and no time is lost.

Nothing is raised except InputError."""

import functools
import json
import random
import time
from collections.abc import Callable

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import rewards
from config import TrainConfig
from infra.ranks import InputError
from tasks import rlla, rows, rubrics, tools
from tasks.verdicts import judge_prompt, parse_verdicts

RESPONSES, LONG = 40_000, 250  # one in LONG has about a megabyte
SECONDS = 0.25  # a busy, slow machine needed 0.053 for a megabyte
TAGS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<response>",
    "</response>",
    "\n",
    "<think> </think>\n<tool_call>\n",
    "\n</tool_call>",
    "```json",
)
SCALARS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e-999",
    "9" * 400,
    "9" * 5000,
    "-0",
    "0.1",
    "true",
    "null",
    '""',
    '"\\ud800"',
    '"\ud800"',
    '"Paris"',
    '"\\u0000"',
    "7",
    "[]",
    "{}",
    "'x'",
    "tru",
    '"name"',
)
LETTERS = ["a", " ", "\n", "é", "\ud800", "\U0001f600", "\x00", "\u2028", *'<>{["\\']
KEYS = (
    '"name"',
    '"parameters"',
    '"city"',
    '"days"',
    '"criterion_1"',
    '"criterion_2"',
    '"explanation"',
    '"\ud834"',
    "1",
    '""',
)
TRUE = (
    "<think> t </think>\n<tool_call>\n"
    '{"name": "get_weather", "parameters": {"city": "Paris", "days": 7}}\n'
    "</tool_call>",
    "<think> t </think>\n<tool_call>\n"
    '{"name": "a", "parameters": {}}\n'
    '{"name": "a", "parameters": {"x": [1, {"y": null}]}}\n'
    "</tool_call>\n<response> r </response>",
    "<think> t </think>\n<response> yes </response>",
)


def nested(rng: random.Random, depth: int) -> str:
    """JSON, or nearly."""
    kind = rng.random()
    if depth == 0 or kind < 0.4:
        return rng.choice(SCALARS)
    inner = [nested(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if kind < 0.6:
        return "[" + ",".join(inner) + rng.choice(["]", "]", "]", ",]", ""])
    pairs = [f"{rng.choice(KEYS)}: {value}" for value in inner]
    return "{" + ", ".join(pairs) + rng.choice(["}", "}", "}", "}}", ""])


def call(rng: random.Random) -> str:
    name = rng.choice(['"get_weather"', '"a"', nested(rng, 1)])
    form = rng.choice(
        ['{"name": %s, "parameters": %s}', '{"parameters": %s, "name": %s}', '{"name": %s}%.0s']
    )
    return form % (name, nested(rng, 3))


def text(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(0, 20)))


def tag(rng: random.Random) -> str:
    return rng.choice(TAGS)


def deep(rng: random.Random) -> str:
    return nested(rng, 4)


def piece(rng: random.Random) -> str:
    return rng.choice((tag, text, call, deep))(rng)


def response(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:  # a call with something around it
        calls = "\n".join(call(rng) for _ in range(rng.randint(0, 3)))
        before = rng.choice(["", text(rng)])
        answer = f"<think>{text(rng)}</think>\n<tool_call>\n{calls}\n</tool_call>"
        return before + answer + rng.choice(["", text(rng)])
    if kind < 0.5:  # something that a judge may say
        pairs = []
        for _ in range(rng.randint(0, 3)):
            name = f"criterion_{rng.randint(1, 3)}"
            pairs.append(f'"{name}": {rng.choice(["true", "false", nested(rng, 1)])}')
        before = rng.choice(["", "<think>x</think>", "```json\n", text(rng)])
        return before + "{" + ", ".join(pairs) + "}" + rng.choice(["", "```", text(rng)])
    return "".join(piece(rng) for _ in range(rng.randint(0, 8)))


def long(rng: random.Random) -> str:
    """About a megabyte, or nested far deeper than a parser can follow."""
    units = [*TAGS, "[", '{"a":', "</think>\n", '{"name": "a"}\n']
    units += ['{"name": "a", "parameters": {}}\n', "9", " ", "\\", '"', "\ud800"]
    units += [call(rng) + "\n", piece(rng)]
    unit = rng.choice(units) or " "
    many = unit * (1_000_000 // len(unit))
    return rng.choice(
        [
            many,
            f"<think> t </think>\n<tool_call>\n{many}\n</tool_call>",
            f"<think>{many}</think>\n<tool_call>\n{call(rng)}\n</tool_call>",
            '<tool_call>{"name": "a", "parameters": ' + many + "</tool_call>",
            '{"criterion_1": ' + many,
        ]
    )


TOOLS, RLLA = (module.task(TrainConfig(task="x")).channels(None) for module in (tools, rlla))


def score(channels: list[rewards.Channel], said: str, reference: str) -> np.ndarray:
    example = rewards.Example([{"role": "user", "content": "p"}], reference)
    (scores,) = rewards.score(channels, example, [said])
    return scores


def verdicts(message: str) -> dict[str, float]:
    try:
        return parse_verdicts(message, ("criterion_1", "criterion_2"))
    except ValueError:
        return {}


def quickly(work: Callable, what: str):
    """What work() returns. Fails if it is slow three times: the machine may be busy once."""
    for _ in range(3):
        began = time.thread_time()
        result = work()
        took = time.thread_time() - began
        if took < SECONDS:
            return result
    pytest.fail(f"{took:.3f} s for {len(what)} characters: {what[:300]!a}")


def test_rewards_of_anything():
    rng, seen, hits = random.Random(0), 0, set()
    for number in range(RESPONSES):
        said = long(rng) if number % LONG == 0 else response(rng)
        reference = TRUE[number % 3]

        def both(said=said, reference=reference):
            tools.values.cache_clear()
            return score(TOOLS, said, TRUE[0]), score(RLLA, said, reference), verdicts(said)

        values, (form, correct), verdict = quickly(both, said)
        prompt = judge_prompt([], said, {"criterion_1": "c"}, False)
        in_range = values.min() >= 0 and values.max() <= 1 and form in (0, 1)
        assert in_range and -3 <= correct <= 3, ascii(said[:300])
        assert set(verdict.values()) <= {0.0, 1.0}
        _, shown = prompt.split("Response to grade:\n")
        assert "<" not in shown
        seen += 1
        hits |= {
            ("tools", *np.round(values[:2])),
            ("correct", correct > -3),
            ("verdicts", len(verdict)),
            ("form", form),
        }
    assert seen == RESPONSES and len(hits) >= 9, hits  # the generator reaches right answers, too


def content(rng: random.Random) -> list:
    """Rows of a data file: right ones, and ones that are not."""
    good = {
        "prompt": [{"role": "user", "content": "hi"}],
        "reward_model": {"ground_truth": rng.choice(TRUE)},
        "rubric": [{"description": "d", "weight": 1}],
    }
    made = []
    for _ in range(rng.randint(0, 4)):
        if rng.random() < 0.9:
            row = dict(good)
            for _ in range(rng.randint(0, 2)):
                row[rng.choice([*good, "question", "x"])] = odd(rng)
            made.append(row)
        else:
            made.append(odd(rng))
    return made


def odd(rng: random.Random):
    """A value that may not belong there."""
    weight = rng.choice([1, -1, 0, "1", 1e9, None, True])
    truth = rng.choice([*TRUE, response(rng), None, 3])
    chats = [[{"role": "user", "content": text}] for text in ("hi", None)]
    plain = [None, 1, 1e300, True, "", "x", [], {}, [1], {"role": "user"}]
    rubric = [{"description": "d", "weight": weight}]
    return rng.choice([*plain, *chats, rubric, {"ground_truth": truth}])


def write_parquet(path, made: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)


NO_TABLE = (  # what pyarrow raises for columns of several types
    pyarrow.ArrowInvalid,
    pyarrow.ArrowTypeError,
    pyarrow.ArrowNotImplementedError,
    UnicodeError,
)
READERS = (
    rlla.from_row,
    functools.partial(rubrics.from_row, by_title=True),
    functools.partial(rubrics.from_row, by_title=False),
)


def broken(rng: random.Random, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice([0, 0, 1, 3])):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.choice([len(content), len(content), rng.randint(0, len(content))])])


def test_data_files_of_anything(tmp_path):
    rng, read, refused = random.Random(0), 0, 0
    for number in range(1_500):
        made, kind = content(rng), rng.choice(["json", "jsonl", "csv", "parquet"])
        path = tmp_path / f"{number % 10}.{kind}"
        if kind == "parquet":
            try:
                write_parquet(path, [row for row in made if isinstance(row, dict)])
            except NO_TABLE:
                continue
            path.write_bytes(broken(rng, path.read_bytes()))
        else:
            lines = [json.dumps(row) if rng.random() < 0.95 else response(rng) for row in made]
            whole = "[" + ",".join(lines) + "]" if kind == "json" else "\n".join(lines)
            path.write_bytes(broken(rng, whole.encode(errors="surrogatepass")))
        for from_row in READERS:
            try:
                examples = rows.read(str(path), from_row)
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
            else:
                assert all(example.messages for example in examples)
                read += bool(examples)
    assert read > 100 and refused > 500


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"prompt": None},
            'row 2 has no prompt: it must be a list of {"role": ..., "content": ...}',
        ),
        (
            {"prompt": [{"role": "user", "content": None}]},
            "row 2 has no content in message 0: it must be a text",
        ),
        (
            {"reward_model": {"ground_truth": None}},
            'row 2 has no reference answer: reward_model must have a text "ground_truth"',
        ),
        (
            {"reward_model": {"ground_truth": "<tool_call>{</tool_call>"}},
            "row 2 has a reference answer that cannot be parsed",
        ),
    ],
)
def test_a_parquet_file_with_a_broken_row(tmp_path, wrong, message):
    good = {
        "prompt": [{"role": "user", "content": "hi"}],
        "reward_model": {"ground_truth": TRUE[0]},
    }
    path = tmp_path / "a.parquet"
    write_parquet(path, [good, good, {**good, **wrong}, good])
    with pytest.raises(InputError) as error:
        rows.read(str(path), rlla.from_row)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)
