"""The task `reply`: its channels by hand, its prompts; a reply can satisfy all channels."""

import numpy as np
import pytest

import rewards
import tasks
from config import TrainConfig
from tasks import reply


def of(name: str) -> rewards.Task:
    return tasks.load_task(TrainConfig(task=name))


@pytest.mark.parametrize(
    "response, expected",
    [
        ("Sorry Anna, we will send you a new lamp.", [1, 1, 1 / 3, 1 / 3, 1 / 3, 1 / 3]),
        ("", [1, 0, 0, 0, 0, 0]),
        ("Thank you, thank you. We're sorry! Please, Anna? I'll help.", [1, 1, 1, 2 / 3, 2 / 3, 1]),
        # A name's case counts, and a point within a word is no end:
        ("your yours you YOU v1.5 anna", [1, 0, 0, 1, 0, 0]),
        ("word " * 26, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_channels(response, expected):
    task = of("reply-25")
    example = task.prompts(1, 1)[0][0]._replace(reference="Anna")
    got = rewards.score(task.channels(example), example, [response])[0]
    np.testing.assert_allclose(got, expected)
    assert rewards.satisfied(task.channels(example), got) == (
        response.startswith(("Sorry", "Thank"))
    )


def test_thoughts_are_no_part_of_a_reply():
    task, example = of("reply-25"), of("reply").prompts(1, 1)[0][0]._replace(reference="Anna")
    reply = "Sorry Anna, we will send you a new lamp."
    plain, thought, cut_off = rewards.score(
        task.channels(example),
        example,
        [reply, f"<think>{'sorry ' * 40}</think>\n{reply}", f"<think>{reply}"],
    )
    np.testing.assert_array_equal(plain, thought)
    np.testing.assert_array_equal(cut_off, [1, 0, 0, 0, 0, 0])


def test_the_limits_differ():
    limits = {name: reply.LIMITS[name] for name in ("reply", "reply-25")}
    for name, limit in limits.items():
        channel, *_ = of(name).channels(None)
        assert channel.name == "short"
        assert channel.fn([""] * 2, ["w " * limit, "w " * (limit + 1)], ["A"] * 2) == [1, 0]


def test_capped():
    """Satisfied by the same replies; more than one of a kind is paid nothing."""
    task, plain = of("reply-capped"), of("reply")
    example = plain.prompts(1, 1)[0][0]._replace(reference="Anna")
    for response, expected in (
        ("Thanks Anna, you and we.", [1] * 6),
        ("Thank you, please Anna! We, we, you, you. Sorry.", [1] * 6),
        ("Anna", [1, 1, 0, 0, 0, 0]),
    ):
        got = rewards.score(task.channels(example), example, [response])
        np.testing.assert_allclose(got[0], expected)
        uncapped = rewards.score(plain.channels(example), example, [response])
        satisfied = rewards.satisfied(plain.channels(example), uncapped)
        assert rewards.satisfied(task.channels(example), got) == satisfied


def test_prompts_are_disjoint_and_the_same_each_time():
    train, test = of("reply").prompts(300, None)
    seen = {str(x.messages) for x in train}
    assert len(test) == 200 and not seen & {str(x.messages) for x in test}
    assert train[:5] == of("reply").prompts(5, 1)[0]
    for example in test:
        *_, before, last = example.messages
        assert example.reference in last["content"] and before["role"] == "assistant"
