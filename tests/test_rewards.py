"""ToolRL's rewards against figures obtained by running the public code, the channels of `tools`, and bad rewards."""

import json
import math

import numpy as np
import pytest

import rewards
from data import tools
from rewards import InputError, Reward

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
    assert rewards.toolrl_correctness([""], [response], [answer(F, G)]) == [pytest.approx(expected)]


def test_toolrl_correctness_without_a_call_in_the_reference():
    assert rewards.toolrl_correctness(["", ""], [answer(F), ""], ["<think> t </think>\n<response> r </response>"] * 2) == [0, 0]


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
    assert rewards.toolrl_format([""], [response], [reference]) == [expected]


def test_format_takes_linear_time():
    soup = "<think>" * 50_000 + "</think>\n<tool_call>\n" + "</think>\n" * 50_000 + "</tool_call>"
    assert rewards.toolrl_format([""], [soup], [CALL]) == [1] and rewards.tools_channels(soup, CALL)["format"] == 0


NAMES = [reward.name for reward in rewards.TASKS["tools"]]


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
    got = rewards.score("tools", [""], [response], [answer(F)])[0]
    expected = {**dict.fromkeys(NAMES, 1.0), **changed}
    assert dict(zip(NAMES, got, strict=True)) == {name: pytest.approx(value) for name, value in expected.items()}
    assert rewards.satisfied("tools", got) == all(value == 1 for value in expected.values())


def test_reference_answers_satisfy_every_channel():
    for task in ("tools", "rlla"):
        examples = tools(200, "test")
        answers = [example.reference for example in examples]
        assert rewards.satisfied(task, rewards.score(task, [""] * 200, answers, answers)).all()


@pytest.mark.parametrize("values", [[1.0], [1.0, None], [1.0, "1"], [1.0, math.inf], [1.0, 10**400], [1.0, np.float32(math.inf)], [1.0, 1j], [[1.0], [1.0]], None, 1.0])
def test_a_bad_reward_is_named(monkeypatch, values):
    monkeypatch.setitem(rewards.TASKS, "tools", [Reward("mine", lambda prompts, responses, references: values)])
    with pytest.raises(InputError, match="reward 'mine' returned"):
        rewards.score("tools", ["", ""], ["", ""], ["", ""])


def test_reward_names_are_their_own(monkeypatch):
    constant = lambda p, r, ref: [0.0] * len(r)  # noqa: E731
    for names in (["a", "a"], ["joint"]):
        monkeypatch.setitem(rewards.TASKS, "tools", [Reward(name, constant) for name in names])
        with pytest.raises(InputError, match="a name of its own"):
            rewards.score("tools", [""], [""], [""])


def test_missing_rewards(monkeypatch):
    one, two = Reward("one", lambda p, r, ref: [math.nan, 1.0, np.float32(1)]), Reward("two", lambda p, r, ref: [math.nan, True, math.nan])
    monkeypatch.setitem(rewards.TASKS, "tools", [one, two])
    values = rewards.score("tools", [""] * 3, [""] * 3, [""] * 3)
    np.testing.assert_array_equal(values, [[math.nan, math.nan], [1, 1], [1, math.nan]])
    assert np.array_equal(rewards.satisfied("tools", values), [np.nan, 1, 1], equal_nan=True)
