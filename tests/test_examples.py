"""A task of one's own; tests/test_docs.py trains and evaluates it by README's commands."""

import numpy as np
import pytest
from conftest import ROOT

import tasks
from config import TrainConfig

POLITE = ROOT / "examples" / "polite.py"


@pytest.fixture
def polite():
    config = TrainConfig(task=str(POLITE), weights="short=0.5")
    return tasks.load_task(config)


def test_polite_is_short():
    lines = POLITE.read_text().splitlines()
    assert len(lines) <= 30


def test_polite_has_prompts_to_train_on_and_others_to_hold_out(polite):
    train, held_out = polite.prompts(None, None)
    assert len(train) == 6
    assert len(held_out) == 2
    assert not {str(e) for e in train} & {str(e) for e in held_out}
    for sizes in ((4, 1), (0, 1)):
        train, held_out = polite.prompts(*sizes)
        assert (len(train), len(held_out)) == sizes


def test_polite_has_channels_and_rewards(polite):
    (example,), _ = polite.prompts(1, 0)
    channels = [(channel.name, channel.weight) for channel in polite.channels(example)]
    assert channels == [("polite", 2), ("short", 0.5)]
    responses = ["A map, Please!", "please " * 20, ""]
    rewards = polite.start(example, responses)()
    np.testing.assert_array_equal(rewards, [[1, 1], [1, 0], [0, 1]])
