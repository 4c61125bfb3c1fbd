"""ToolRL's rewards against figures obtained by running the public code, the channels of `tools`, and bad rewards."""

import itertools
import json
import math

import numpy as np
import pytest

import rewards
from config import JudgeOptions, TaskOptions
from ranks import InputError
from rewards import Channel, Example, Task
from tasks import rlla, tools

F, G = {"name": "f", "parameters": {"x": 1, "y": "b"}}, {"name": "g", "parameters": {}}


def answer(*calls: dict | str, think: str = "<think> t </think>\n") -> str:
    lines = "\n".join(call if isinstance(call, str) else json.dumps(call) for call in calls)
    return f"{think}<tool_call>\n{lines}\n</tool_call>"


def f(**parameters) -> dict:
    return {"name": "f", "parameters": {**F["parameters"], **parameters}}


@pytest.mark.parametrize(("response", "expected"), [
    (answer(F, G), 3), (answer(G, F), 3),
    (answer(F), 1.2),
    (answer(F, G, {"name": "h", "parameters": {}}), 2.6), (answer(F, G, G), 2.6),
    (answer(f(y="c"), G), 1.8), (answer(f(x="1"), G), 1.8),
    (answer(f(x=1.0), G), 3), (answer(f(x=True), G), 3),
    (answer(f(z=0), G), 2.6),
    (answer({"name": "a", "parameters": {}}, {"name": "b", "parameters": {}}), -3),
    (answer('{"name": "f", '), -3), (answer(json.dumps([F, G])), -3), (answer(F, "", G), -3), (answer(""), -3),
    (answer({"name": "f", "arguments": {"x": 1, "y": "b"}}, G), -3),
    ("no tool call", -3), ("", -3), (answer({"name": "f", "parameters": None}, G), -3), (answer({"name": ["f"]}, G), -3),
    (answer("[" * 100_000), -3), (answer("1" * 5000), -3), ("</tool_call>" + answer(F, G), 3),
    # the first block counts, and the format does not
    (answer(F, G) + "\n" + answer(F), 3), (answer(F, G, think=""), 3), (answer(F, G) + " trailing", 3),
])
def test_toolrl_correctness(response, expected):
    assert rlla.correctness([""], [response], [answer(F, G)]) == [pytest.approx(expected)]


def test_toolrl_correctness_without_a_call_in_the_reference():
    assert rlla.correctness(["", ""], [answer(F), ""], ["<think> t </think>\n<response> r </response>"] * 2) == [0, 0]


CALL, REPLY = answer(F), "<think> t </think>\n<response> r </response>"
BOTH = CALL + "\n<response> r </response>"


@pytest.mark.parametrize(("reference", "response", "expected"), [
    (CALL, CALL, 1), (REPLY, REPLY, 1), (BOTH, BOTH, 1), ("<think> t </think>", "<think> t </think>", 1),
    (CALL, f"  {CALL}\n\n", 1), (CALL, "<think> <think> </think> t </think>\n" + answer(F, think=""), 1),
    (REPLY, "<think> two\nlines </think>\n<response>\n</response>", 1),
    (CALL, REPLY, 0), (CALL, BOTH, 0), (REPLY, BOTH, 0), (BOTH, CALL, 0), (CALL, "", 0),
    (CALL, answer(F, think=""), 0), (CALL, CALL.replace("</think>\n", "</think>"), 0), (CALL, CALL + " more", 0),
    (CALL, "more " + CALL, 0), (CALL, CALL + "\n" + answer(F, think=""), 0), (CALL, CALL.replace("\n</tool_call>", "</tool_call>"), 0),
    (REPLY, REPLY + "\n<response> r </response>", 0),
])
def test_toolrl_format(reference, response, expected):
    assert rlla.format_reward([""], [response], [reference]) == [expected]


def test_format_takes_linear_time():
    soup = "<think>" * 50_000 + "</think>\n<tool_call>\n" + "</think>\n" * 50_000 + "</tool_call>"
    assert rlla.format_reward([""], [soup], [CALL]) == [1] and tools.values(soup, CALL)["format"] == 0


CHANNELS = {name: module.task(TaskOptions(name, None, None, JudgeOptions())).channels(None) for name, module in (("tools", tools), ("rlla", rlla))}
NAMES = [channel.name for channel in CHANNELS["tools"]]
QUESTION = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(("response", "changed"), [
    (answer(F), {}),
    (answer({"name": "g", "parameters": F["parameters"]}), {"tool": 0}),
    (answer({"name": "f", "parameters": {"x": 1}}), {"arg_names": 0.5, "arg_values": 0.5}),
    (answer(f(y="c")), {"arg_values": 0.5}), (answer(f(x=True)), {"arg_values": 0.5}), (answer(f(x="1")), {"arg_values": 0.5}),
    (answer(f(z=1, w=2)), {"no_invented": 0.5}),
    (answer(F) + "x" * len(answer(F)), {"clean": 0.5}),
    (answer(F, think="<think>" + "t" * 250 + "</think>\n"), {"brief": 2 - len(answer(F, think="<think>" + "t" * 250 + "</think>\n")) / 200}),
    (answer(F, think=""), {"format": 0, "clean": 0}),
    ("", {name: 0 for name in NAMES if name != "brief"}),
    ("<think> t </think>", {name: 0 for name in NAMES if name != "brief"}),
    (answer('{"name": "f", "parameters": [1]}'), {"tool": 0, "arg_names": 0, "arg_values": 0, "no_invented": 0}),
])
def test_channels_of_tools(response, changed):
    got = rewards.score(CHANNELS["tools"], Example(QUESTION, answer(F)), [response])[0]
    expected = {**dict.fromkeys(NAMES, 1.0), **changed}
    assert dict(zip(NAMES, got, strict=True)) == {name: pytest.approx(value) for name, value in expected.items()}
    assert rewards.satisfied(CHANNELS["tools"], got) == all(value == 1 for value in expected.values())


def test_reference_answers_satisfy_every_channel():
    for channels, example in itertools.product(CHANNELS.values(), tools.examples(200, "test")):
        assert rewards.satisfied(channels, rewards.score(channels, example, [example.reference])).all()


@pytest.mark.parametrize("values", [[1.0], [1.0, None], [1.0, "1"], [1.0, math.inf], [1.0, 10**400], [1.0, np.float32(math.inf)], [1.0, 1j], [[1.0], [1.0]], None, 1.0])
def test_a_bad_reward_is_named(values):
    with pytest.raises(InputError, match="reward 'mine' returned"):
        rewards.score([Channel("mine", lambda prompts, responses, references: values)], Example(QUESTION), ["", ""])


@pytest.mark.parametrize("names", [["a", "a"], ["joint"], []])
def test_reward_names_are_their_own(names):
    with pytest.raises(InputError, match="a name of its own"):
        Task(None, [Channel(name) for name in names])


def test_missing_rewards():
    channels = [Channel("one", lambda p, r, ref: [math.nan, 1.0, np.float32(1)]), Channel("two", lambda p, r, ref: [math.nan, True, math.nan])]
    values = rewards.score(channels, Example(QUESTION), [""] * 3)
    np.testing.assert_array_equal(values, [[math.nan, math.nan], [1, 1], [1, math.nan]])
    assert np.array_equal(rewards.satisfied(channels, values), [np.nan, 1, 1], equal_nan=True)
    assert np.array_equal(rewards.satisfied([channels[0]._replace(weight=0), channels[1]], values), [np.nan, 1, np.nan], equal_nan=True)


def test_weights():
    task = Task(None, [Channel("a"), Channel("b"), Channel("c", weight=3)])
    task.weigh("b=0.5,a=0")
    assert [channel.weight for channel in task.channels(None)] == [0, 0.5, 3]
    for text, message in [("d=1", "one of a, b, c"), ("a", "NAME=NUMBER"), ("a=x", "NAME=NUMBER"), ("a=-1", "NAME=NUMBER"), ("a=nan", "NAME=NUMBER"),
                          ("a=0,b=0,c=0", "nothing to learn from")]:
        with pytest.raises(InputError, match=message):
            task.weigh(text)


@pytest.mark.parametrize(("code", "message"), [
    ("", "function `task"), ("1 +", "cannot be imported: SyntaxError"), ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
    ("def task(options):\n    return 3", "must return a rewards.Task"),
])
def test_a_bad_task_file_is_named(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(InputError, match=f"--task .*mine.py.*{message}"):
        rewards.load_task(TaskOptions(str(tmp_path / "mine.py"), None, None, JudgeOptions()))


def test_bounds_are_worst_and_best():
    with pytest.raises(InputError, match="channel b: bounds must be worst, best"):
        Task(None, [Channel("a"), Channel("b", bounds=(1.0, 1.0))])


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [0.0, 0.0], [float("inf")], [float("nan"), 1.0]])
def test_a_task_needs_weights(weights):
    with pytest.raises(InputError, match="a weight of at least 0, not all 0"):
        rewards.Task(None, [rewards.Channel(str(i), weight=weight) for i, weight in enumerate(weights)])
