"""The sign rule: its closed form, by hand and by sampling; what follows; the log's `credit`."""

import functools
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "study"))

import sign

import rvpo
from infra.statistics import credit
from rewards import Channel
from rollout import Group

K = 6
turn = functools.partial(sign.turn, k=K)
# Of every method the largest beta, and of rvpo another one.
CASES = [(method, betas[-1]) for method, betas in sign.METHODS.items()]
CASES.append(("rvpo", 2.0))


@pytest.mark.parametrize("p", [0.3, 0.8])
@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("method, beta", CASES)
def test_the_closed_form_is_what_sampling_gives(method, beta, pull, p):
    """By rvpo.py's own functions, in 50 groups of 400. The difference has a standard error of about
    .01 standard deviations of the scores."""
    keeps = torch.arange(400) < 400 * p
    constraint = keeps.double().expand(50, -1)
    scores = sign.scores(method, beta, constraint, pull, K)
    kept, broken = scores[:, keeps], scores[:, ~keeps]
    sampled = kept.mean() - broken.mean()
    exact = sign.credit(method, beta, p, pull, K, 400)
    tolerance = 0.05 * scores.std().item()
    assert exact == pytest.approx(sampled.item(), abs=tolerance)


@pytest.mark.parametrize("method, beta", [("rvpo", 2.0), ("gdpo", 0.0), ("explicit", 1.0)])
def test_it_holds_in_small_groups(method, beta):
    """G = 8: a channel is z-scored over few, and how many keep the constraint is a binomial's."""
    for p in (0.2, 0.5, 0.9):
        case = method, beta, p, 1.0, K, 8
        exact = sign.covariance(*case)
        sampled = sign.sampled(*case)
        assert exact == pytest.approx(sampled, abs=0.015)
        assert abs(exact) > 0.02


def test_exact_where_nothing_is_random():
    """A constraint alone with constant channels: rvpo's own scores of one group."""
    rewards = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    kept, _, _, broken = rvpo.zscore(rewards.double(), eps=0.0)
    exact = sign.credit("gdpo", 0.0, 0.75, 0.0, 1, group=4)
    assert kept.item() - broken.item() == pytest.approx(exact)


def test_the_quadratures():
    ones = torch.ones(200).numpy()
    of_a_constant = sign.mean_log(2.0, ones, 3)
    assert of_a_constant == pytest.approx(math.log(5.0), abs=1e-6)
    expected = -1 / math.sqrt(2 * math.pi)  # E min(0, X)
    lowest = sign.mean_min(0.0, sign.NODES, 1)
    assert lowest == pytest.approx(expected, abs=1e-3)


def test_where_credit_turns():
    """Under conflict z-scored soft minima reward a constraint only while well over half keep it."""
    for beta in (2.0, 10.0):
        assert turn("rvpo", beta, 0.0) == 0.0  # no conflict: always
        assert 0.55 < turn("rvpo", beta, 1.0) < 0.7
    assert turn("gdpo", 0.0, 1.0) > 0.9
    assert turn("gdpo", 0.0, 2.0) == 1.0
    assert turn("geometric", 0.0, 1.0) == 0.0
    assert turn("grpo", 0.0, 2.0) == 1.0


@pytest.mark.parametrize("pull", [0.0, 1.0, 2.0])
def test_the_closed_form_of_explicit(pull):
    """Its turn from the correlation at that rate is the turn that is found by search."""
    p = turn("explicit", 1.0, pull)
    kept, broken = sign.others(pull)
    gap = (kept - broken) @ sign.WEIGHTS
    mean = kept @ sign.WEIGHTS
    square = kept**2 @ sign.WEIGHTS
    spread = square - mean**2
    variance = p * (1 - p)  # of the constraint
    total = spread + variance * gap**2
    correlation = gap * math.sqrt(variance / total)
    found = sign.explicit_turn(1.0, K, correlation)
    assert found == pytest.approx(p, abs=0.01)
    # Here the mean is indifferent: the variance alone decides.
    indifferent = -1 / (K - 1)
    assert sign.explicit_turn(1.0, K, indifferent) == 0.5


def group_of(names: str, rewards: list, advantages: list) -> Group:
    return Group(
        prompt=None,
        channels=[Channel(name) for name in names],
        responses=[],
        rewards=torch.tensor(rewards).double(),
        advantages=torch.tensor(advantages).double(),
    )


def test_credit_of_a_batch():
    """Correlation within groups, by hand. A missing reward is left out, and another prompt's level
    does not matter."""
    rewards = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [math.nan, 0.5, 1.0]]
    advantages = [1.0, -1.0, 5.0]
    first = group_of("abc", rewards, advantages)
    second = group_of("ab", [[9.0, 3.0], [9.0, 3.0]], [2.0, 2.0])
    found = credit([first, second])
    assert found["a"] == pytest.approx(1.0)
    assert math.isnan(found["c"])
    mean = 5 / 3
    x, y, z = (advantage - mean for advantage in advantages)
    covariance = -0.5 * x + 0.5 * y
    norm = math.hypot(x, y, z)
    assert found["b"] == pytest.approx(covariance / (0.5**0.5 * norm))


def test_batches_are_steps_of_the_text_study_in_which_the_limit_varies():
    shares, credits = sign.batches("gdpo")
    assert shares.shape == credits.shape and len(shares) > 150
    assert ((shares > 0) & (shares < 1)).all() and (abs(credits) <= 1).all()
    short, _ = sign.batches("gdpo", steps=15)
    assert 0 < len(short) < len(shares)


def test_where_the_credit_of_runs_turns(monkeypatch):
    shares = np.arange(1, 16) / 16
    monkeypatch.setattr(sign, "batches", lambda method, steps: (shares, shares - 0.5))
    lines = sign.runs_table().splitlines()
    assert "| rvpo | 15 | 0.50 | -0.38 (3) | -0.28 (6) | +0.38 (3) |" in lines
    assert "| grpo, runs of 15 steps | 15 | 0.50 |" in lines[-1]
