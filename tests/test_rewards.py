"""ToolRL's rewards against figures of the public code, the channels of `tools`, and bad rewards."""

import contextlib
import itertools
import json
import math
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

import rewards
import tasks
from config import TrainConfig
from infra.ranks import InputError
from rewards import Channel, Example, Task
from tasks import rlla, tools

F, G = {"name": "f", "parameters": {"x": 1, "y": "b"}}, {"name": "g", "parameters": {}}


def answer(*calls: dict | str, think: str = "<think> t </think>\n") -> str:
    lines = "\n".join(call if isinstance(call, str) else json.dumps(call) for call in calls)
    return f"{think}<tool_call>\n{lines}\n</tool_call>"


def f(**parameters) -> dict:
    return {"name": "f", "parameters": {**F["parameters"], **parameters}}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (answer(F, G), 3),
        (answer(G, F), 3),
        (answer(F), 1.2),
        (answer(F, G, {"name": "h", "parameters": {}}), 2.6),
        (answer(F, G, G), 2.6),
        (answer(f(y="c"), G), 1.8),
        (answer(f(x="1"), G), 1.8),
        (answer(f(x=1.0), G), 3),
        (answer(f(x=True), G), 3),
        (answer(f(z=0), G), 2.6),
        (answer({"name": "a", "parameters": {}}, {"name": "b", "parameters": {}}), -3),
        (answer('{"name": "f", '), -3),
        (answer(json.dumps([F, G])), -3),
        (answer(F, "", G), -3),
        (answer(""), -3),
        (answer({"name": "f", "arguments": {"x": 1, "y": "b"}}, G), -3),
        ("no tool call", -3),
        ("", -3),
        (answer({"name": "f", "parameters": None}, G), -3),
        (answer({"name": ["f"]}, G), -3),
        (answer("[" * 100_000), -3),
        (answer("1" * 5000), -3),
        ("</tool_call>" + answer(F, G), 3),
        # the first block counts, and the format does not
        (answer(F, G) + "\n" + answer(F), 3),
        (answer(F, G, think=""), 3),
        (answer(F, G) + " trailing", 3),
    ],
)
def test_toolrl_correctness(response, expected):
    assert rlla.correctness([""], [response], [answer(F, G)]) == [pytest.approx(expected)]


def test_toolrl_correctness_without_a_call_in_the_reference():
    assert rlla.correctness(
        ["", ""], [answer(F), ""], ["<think> t </think>\n<response> r </response>"] * 2
    ) == [0, 0]


CALL, REPLY = answer(F), "<think> t </think>\n<response> r </response>"
BOTH = CALL + "\n<response> r </response>"


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        (CALL, CALL, 1),
        (REPLY, REPLY, 1),
        (BOTH, BOTH, 1),
        ("<think> t </think>", "<think> t </think>", 1),
        (CALL, f"  {CALL}\n\n", 1),
        (CALL, "<think> <think> </think> t </think>\n" + answer(F, think=""), 1),
        (REPLY, "<think> two\nlines </think>\n<response>\n</response>", 1),
        (CALL, REPLY, 0),
        (CALL, BOTH, 0),
        (REPLY, BOTH, 0),
        (BOTH, CALL, 0),
        (CALL, "", 0),
        (CALL, answer(F, think=""), 0),
        (CALL, CALL.replace("</think>\n", "</think>"), 0),
        (CALL, CALL + " more", 0),
        (CALL, "more " + CALL, 0),
        (CALL, CALL + "\n" + answer(F, think=""), 0),
        (CALL, CALL.replace("\n</tool_call>", "</tool_call>"), 0),
        (REPLY, REPLY + "\n<response> r </response>", 0),
    ],
)
def test_toolrl_format(reference, response, expected):
    assert rlla.format_reward([""], [response], [reference]) == [expected]


def test_format_takes_linear_time():
    soup = "<think>" * 50_000 + "</think>\n<tool_call>\n" + "</think>\n" * 50_000 + "</tool_call>"
    assert (
        rlla.format_reward([""], [soup], [CALL]) == [1] and tools.values(soup, CALL)["format"] == 0
    )


CHANNELS = {
    name: module.task(TrainConfig(task=name)).channels(None)
    for name, module in (("tools", tools), ("rlla", rlla))
}
NAMES = [channel.name for channel in CHANNELS["tools"]]
QUESTION = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("response", "changed"),
    [
        (answer(F), {}),
        (answer({"name": "g", "parameters": F["parameters"]}), {"tool": 0}),
        (answer({"name": "f", "parameters": {"x": 1}}), {"arg_names": 0.5, "arg_values": 0.5}),
        (answer(f(y="c")), {"arg_values": 0.5}),
        (answer(f(x=True)), {"arg_values": 0.5}),
        (answer(f(x="1")), {"arg_values": 0.5}),
        (answer(f(z=1, w=2)), {"no_invented": 0.5}),
        (answer(F) + "x" * len(answer(F)), {"clean": 0.5}),
        (
            answer(F, think="<think>" + "t" * 250 + "</think>\n"),
            {"brief": 2 - len(answer(F, think="<think>" + "t" * 250 + "</think>\n")) / 200},
        ),
        (answer(F, think=""), {"format": 0, "clean": 0}),
        ("", {name: 0 for name in NAMES if name != "brief"}),
        ("<think> t </think>", {name: 0 for name in NAMES if name != "brief"}),
        (
            answer('{"name": "f", "parameters": [1]}'),
            {"tool": 0, "arg_names": 0, "arg_values": 0, "no_invented": 0},
        ),
    ],
)
def test_channels_of_tools(response, changed):
    got = rewards.score(CHANNELS["tools"], Example(QUESTION, answer(F)), [response])[0]
    expected = {**dict.fromkeys(NAMES, 1.0), **changed}
    assert dict(zip(NAMES, got, strict=True)) == {
        name: pytest.approx(value) for name, value in expected.items()
    }
    assert rewards.satisfied(CHANNELS["tools"], got) == all(
        value == 1 for value in expected.values()
    )


def test_reference_answers_satisfy_every_channel():
    for channels, example in itertools.product(CHANNELS.values(), tools.examples(200, "test")):
        assert rewards.satisfied(
            channels, rewards.score(channels, example, [example.reference])
        ).all()


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [1.0, None],
        [1.0, "1"],
        [1.0, math.inf],
        [1.0, 10**400],
        [1.0, np.float32(math.inf)],
        [1.0, 1j],
        [[1.0], [1.0]],
        None,
        1.0,
    ],
)
def test_a_bad_reward_is_named(values):
    with pytest.raises(InputError, match="reward 'mine' returned"):
        rewards.score(
            [Channel("mine", lambda prompts, responses, references: values)],
            Example(QUESTION),
            ["", ""],
        )


@pytest.mark.parametrize("names", [["a", "a"], ["joint"], []])
def test_reward_names_are_their_own(names):
    with pytest.raises(InputError, match="a name of its own"):
        Task(None, [Channel(name) for name in names])


def test_missing_rewards():
    channels = [
        Channel("one", lambda p, r, ref: [math.nan, 1.0, np.float32(1)]),
        Channel("two", lambda p, r, ref: [math.nan, True, math.nan]),
    ]
    values = rewards.score(channels, Example(QUESTION), [""] * 3)
    np.testing.assert_array_equal(values, [[math.nan, math.nan], [1, 1], [1, math.nan]])
    assert np.array_equal(rewards.satisfied(channels, values), [np.nan, 1, 1], equal_nan=True)
    assert np.array_equal(
        rewards.satisfied([channels[0]._replace(weight=0), channels[1]], values),
        [np.nan, 1, np.nan],
        equal_nan=True,
    )


def test_weights():
    task = Task(None, [Channel("a"), Channel("b"), Channel("c", weight=3)])
    task.weigh("b=0.5,a=0")
    assert [channel.weight for channel in task.channels(None)] == [0, 0.5, 3]
    for text, message in [
        ("d=1", "one of a, b, c"),
        ("a", "NAME=NUMBER"),
        ("a=x", "NAME=NUMBER"),
        ("a=-1", "NAME=NUMBER"),
        ("a=nan", "NAME=NUMBER"),
        ("a=0,b=0,c=0", "nothing to learn from"),
    ]:
        with pytest.raises(InputError, match=message):
            task.weigh(text)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "function `task"),
        ("1 +", "cannot be imported: SyntaxError"),
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("def task(options):\n    return 3", "must return a rewards.Task"),
    ],
)
def test_a_bad_task_file_is_named(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(InputError, match=f"--task .*mine.py.*{message}"):
        tasks.load_task(TrainConfig(task=str(tmp_path / "mine.py")))


OWN = """
import collections
from dataclasses import dataclass

import numpy as np
from rewards import Channel, Example, Task

@dataclass
class Counted:
    text: str

def length(prompts, responses, references):
    return [float(len(response)) for response in responses]

async def later(prompts, responses, references):
    return length(prompts, responses, references)

CHAT = [{"role": "user", "content": "u"}]
GOOD = Example(CHAT, "r")

def task(options):
    return Task(lambda n_train, n_test: PROMPTS, CHANNELS)
"""


def of_own(
    tmp_path,
    prompts: str = "([GOOD], [])",
    channels: str = "[Channel('a', length)]",
    name: str = "mine.py",
) -> tuple[Task, tuple]:
    """A task of this file, and its prompts."""
    path = tmp_path / name
    path.write_text(OWN.replace("PROMPTS", prompts).replace("CHANNELS", channels))
    task = tasks.load_task(TrainConfig(task=str(path)))
    return task, tasks.load_prompts(task, path.name, 4, 2)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            "([GOOD, Example('u')], [])",
            'training example 1 has no prompt: it must be a list of {"role": ..., "content": ...}',
        ),
        ("([], [Example([])])", "held-out example 0 has no prompt: it must be a list of"),
        (
            "([Example([{'role': 'user', 'content': None}])], [])",
            "training example 0 has no content in message 0",
        ),
        (
            "([Example(CHAT, np.int64(3))], [])",
            "training example 0: its reference is no text, but np.int64(3) (int64): "
            "make it one, with str or json.dumps",
        ),
        (
            "([Example(CHAT, None)], [])",
            "training example 0: its reference is no text, but None (NoneType)",
        ),
        ("([Example(CHAT, id=7)], [])", "training example 0: its id is no text, but 7 (int)"),
        (
            "([Example(CHAT, criteria=('says so',))], [])",
            "training example 0 has a criterion without a text, see tasks/rubrics.py: 'says so'",
        ),
        (
            "([Example(CHAT, tools=(length,))], [])",
            "training example 0 has tools that are no list of JSON objects",
        ),
        (
            "([{'messages': CHAT}], [])",
            "training example 0 is a dict: it must be a rewards.Example, such as Example(",
        ),
        ("(['hello'], [])", "training example 0 is a str: it must be a rewards.Example"),
        (
            "[GOOD, GOOD]",
            "prompts(4, 2) must return two lists, of training and of held-out examples",
        ),
        ("[GOOD] * 8", "prompts(4, 2) must return two lists"),
        ("None", "prompts(4, 2) must return two lists"),
        (
            "((x for x in [GOOD]), [])",
            "prompts(4, 2): the training examples must be a list of rewards.Example, "
            "and not a generator",
        ),
        (
            "([GOOD], collections.deque())",
            "prompts(4, 2): the held-out examples must be a list of rewards.Example, "
            "and not a deque",
        ),
        ("1 / 0", "prompts(4, 2) raised ZeroDivisionError: division by zero (mine.py, line 22)"),
        ("exit('enough')", "prompts(4, 2) raised SystemExit: enough ("),
    ],
)
def test_mistakes_in_the_prompts_are_named(tmp_path, prompts, message):
    with pytest.raises(InputError) as error:
        of_own(tmp_path, prompts)
    assert str(error.value).startswith(f"--task mine.py: {message}") and "\n" not in str(
        error.value
    )


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (
            "[length]",
            "channel 0 of the task is a function: it must be a rewards.Channel, "
            "such as Channel('short', function)",
        ),
        ("length", "a task's channels must be a list of rewards.Channel, and not a function"),
        ("[Channel('a', length, weight='2')]", "channel a: weight must be a number, and not '2'"),
        ("[Channel('a', length, help=None)]", "channel a: help must be one line of text"),
        ("[Channel('a', length, help='x\\x1b[2J')]", "channel a: help must be one line of text"),
        ("[Channel('a', length, full='1')]", "channel a: full must be a number, and not '1'"),
        ("[Channel('a', length, full=None)]", "channel a: full must be a number, and not None"),
        (
            "[Channel('a', length, full=float('nan'))]",
            "channel a: full must be a number, and not nan",
        ),
        (
            "[Channel('a', length, bounds=1.0)]",
            "channel a: bounds must be worst, best, two numbers",
        ),
        (
            "[Channel('a', length, bounds=('0', '1'))]",
            "channel a: bounds must be worst, best, two numbers",
        ),
        (
            "[Channel('', length)]",
            "channel 0 of the task has the name '': it must be one line of text",
        ),
        ("[Channel(length)]", "channel 0 of the task has the name <function length at"),
        ("[Channel('a', 1.0)]", "channel a: fn must be a function, and not 1.0"),
        ("[Channel('a', later)]", "channel a: fn must not be async"),
    ],
)
def test_mistakes_in_the_channels_are_named(tmp_path, channels, message):
    with pytest.raises(InputError) as error:
        of_own(tmp_path, channels=channels)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_task_file_that_raises_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def task(config):\n    open('no data')")
    with pytest.raises(
        InputError,
        match=r"mine.py: task\(config\) raised FileNotFoundError: .*'no data' \(mine.py, line 2\)",
    ):
        tasks.load_task(TrainConfig(task=str(tmp_path / "mine.py")))


@pytest.mark.parametrize("name", ["rewards.py", "json.py", "torch.py", "local.py", "my-task.v2.py"])
def test_a_task_file_may_have_any_name(tmp_path, name):
    """It replaces no module, its dataclasses are made, and pickle finds what is in it."""
    before = sys.modules.get(name[:-3])
    task, (train, _) = of_own(tmp_path, name=name)
    (channel,) = task.channels(train[0])
    assert (
        sys.modules.get(name[:-3]) is before
        and pickle.loads(pickle.dumps(channel.fn)) is channel.fn
    )
    assert rewards.score([channel], train[0], ["abc"]).tolist() == [[3.0]]


def test_messages_of_a_task_file_are_read_as_those_of_rows(tmp_path):
    message = "{'role': 'user', 'content': [{'type': 'text', 'text': 'u'}], 'name': None}"
    _, (train, _) = of_own(tmp_path, f"((Example(({message},), 'r'),), [])")
    assert train == [Example([{"role": "user", "content": "u"}], "r")]


@pytest.mark.parametrize("change", [list.sort, list.clear, lambda texts: texts.__setitem__(0, "x")])
def test_a_reward_may_change_its_lists(change):
    def first(prompts, responses, references):
        n = len(responses)
        for texts in (prompts, responses, references):
            change(texts)
        return [0.0] * n

    seen = []
    channels = [
        Channel("first", first),
        Channel("second", lambda *lists: seen.append(lists) or [0.0, 0.0]),
    ]
    responses = ["b", "a"]
    rewards.score(channels, Example(QUESTION, "r"), responses)
    assert seen == [(["q", "q"], ["b", "a"], ["r", "r"])] and responses == ["b", "a"]


def test_a_reward_may_change_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "away").mkdir()
    for values in ([0.0], 1 / 2):
        with contextlib.suppress(InputError):
            rewards.score(
                [Channel("a", lambda p, r, ref, values=values: os.chdir("away") or values)],
                Example(QUESTION),
                ["x"],
            )
        assert Path.cwd() == tmp_path


def test_a_reward_is_given_the_last_message_that_is_not_the_assistants():
    seen = []
    chat = [
        {"role": "system", "content": "s"},
        *QUESTION,
        {"role": "assistant", "content": "It is"},
    ]
    rewards.score(
        [Channel("a", lambda prompts, responses, references: seen.append(prompts) or [0.0])],
        Example(chat),
        [" 2"],
    )
    assert seen == [["q"]]


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("plain", "plain"),
        ("", ""),
        ("<think> a </think> b", " b"),
        ("a</think>b", "b"),
        ("<think>a</think>b</think>c", "c"),
        ("<think> cut", ""),
        ("x <think> cut", ""),
        ("<think>a</think> b <think> again", ""),
    ],
)
def test_an_answer_is_what_follows_the_thoughts(response, said):
    assert rewards.answer(response) == said


def test_a_reward_without_a_function_is_named():
    with pytest.raises(
        InputError, match=r"reward 'a' has no function: write Channel\('a', function\)"
    ):
        Task(None, [Channel("a")]).try_out(Example(QUESTION))


def test_bounds_are_worst_and_best():
    with pytest.raises(InputError, match="channel b: bounds must be worst, best"):
        Task(None, [Channel("a"), Channel("b", bounds=(1.0, 1.0))])


@pytest.mark.parametrize(
    "weights", [[], [0.0], [1.0, -1.0], [0.0, 0.0], [float("inf")], [float("nan"), 1.0]]
)
def test_a_task_needs_weights(weights):
    with pytest.raises(InputError, match="a weight of at least 0, not all 0"):
        rewards.Task(
            None, [rewards.Channel(str(i), weight=weight) for i, weight in enumerate(weights)]
        )
