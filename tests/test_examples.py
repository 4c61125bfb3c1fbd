"""A task of one's own; tests/test_docs.py trains and evaluates it by README's commands."""

import numpy as np
from conftest import ROOT

import tasks
from config import TrainConfig

POLITE = ROOT / "examples" / "polite.py"


def test_polite_is_a_whole_task():
    assert len(POLITE.read_text().splitlines()) <= 30
    task = tasks.load_task(TrainConfig(task=str(POLITE), weights="short=0.5"))
    train, held_out = task.prompts(None, None)
    assert len(train) == 6 and len(held_out) == 2
    assert not {str(e) for e in train} & {str(e) for e in held_out}
    assert [len(part) for part in task.prompts(4, 1)] == [4, 1]
    assert [len(part) for part in task.prompts(0, 1)] == [0, 1]
    channels = [(channel.name, channel.weight) for channel in task.channels(train[0])]
    assert channels == [("polite", 2), ("short", 0.5)]
    rewards = task.start(train[0], ["A map, Please!", "please " * 20, ""])()
    np.testing.assert_array_equal(rewards, [[1, 1], [1, 0], [0, 1]])
