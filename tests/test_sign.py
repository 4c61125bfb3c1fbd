"""The sign rule: its closed form, by hand and by sampling; what follows; the log's `credit`."""

import math
import sys

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


LARGEST_BETAS = [(method, betas[-1]) for method, betas in sign.METHODS.items()]


@pytest.mark.parametrize("p", [0.3, 0.8])
@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("method, beta", [*LARGEST_BETAS, ("rvpo", 2.0)])
def test_the_closed_form_is_what_sampling_gives(method, beta, pull, p):
    """By rvpo.py's own functions, in 50 groups of 400. The difference has a standard error of about
    .01 standard deviations of the scores."""
    constraint = (torch.arange(400) < 400 * p).double().expand(50, -1)
    scores = sign.scores(method, beta, constraint, pull, K)
    difference = scores[constraint == 1].mean() - scores[constraint == 0].mean()
    exact = sign.credit(method, beta, p, pull, K, 400)
    assert exact == pytest.approx(difference.item(), abs=0.05 * scores.std().item())


@pytest.mark.parametrize("method, beta", [("rvpo", 2.0), ("gdpo", 0.0), ("explicit", 1.0)])
def test_it_holds_in_small_groups(method, beta):
    """G = 8: a channel is z-scored over few, and how many keep the constraint is a binomial's."""
    for p in (0.2, 0.5, 0.9):
        exact = sign.covariance(method, beta, p, 1.0, K, 8)
        sampled = sign.sampled(method, beta, p, 1.0, K, 8)
        assert exact == pytest.approx(sampled, abs=0.015) and abs(exact) > 0.02


def test_exact_where_nothing_is_random():
    """A constraint alone with constant channels: rvpo's own scores of one group."""
    rewards = torch.tensor([[1.0], [1.0], [1.0], [0.0]]).double()
    z = rvpo.zscore(rewards, eps=0.0)
    exact = sign.credit("gdpo", 0.0, 0.75, 0.0, 1, group=4)
    assert z[0].item() - z[3].item() == pytest.approx(exact)
    assert sign.mean_log(2.0, torch.ones(200).numpy(), 3) == pytest.approx(math.log(5.0), abs=1e-6)
    mean_of_min = -1 / math.sqrt(2 * math.pi)  # E min(0, X)
    assert sign.mean_min(0.0, sign.NODES, 1) == pytest.approx(mean_of_min, abs=1e-3)


def test_where_credit_turns():
    """Under conflict z-scored soft minima reward a constraint only while well over half keep it."""
    for beta in (2.0, 10.0):
        assert sign.turn("rvpo", beta, 0.0, K) == 0.0  # no conflict: always
        assert 0.55 < sign.turn("rvpo", beta, 1.0, K) < 0.7
    assert sign.turn("gdpo", 0.0, 1.0, K) > 0.9 and sign.turn("gdpo", 0.0, 2.0, K) == 1.0
    assert sign.turn("geometric", 0.0, 1.0, K) == 0.0 and sign.turn("grpo", 0.0, 2.0, K) == 1.0


@pytest.mark.parametrize("pull", [0.0, 1.0, 2.0])
def test_the_closed_form_of_explicit(pull):
    """Its turn from the correlation at that rate is the turn that is found by search."""
    p = sign.turn("explicit", 1.0, pull, K)
    kept, broken = sign.others(pull)
    gap = (kept - broken) @ sign.WEIGHTS
    spread = kept**2 @ sign.WEIGHTS - (kept @ sign.WEIGHTS) ** 2
    correlation = gap * math.sqrt(p * (1 - p)) / math.sqrt(spread + p * (1 - p) * gap**2)
    assert sign.explicit_turn(1.0, K, correlation) == pytest.approx(p, abs=0.01)
    # Here the mean is indifferent: the variance alone decides.
    assert sign.explicit_turn(1.0, K, -1 / (K - 1)) == 0.5


def group_of(names: str, rewards: list, advantages: list) -> Group:
    rewards, advantages = torch.tensor(rewards).double(), torch.tensor(advantages).double()
    return Group(None, [Channel(name) for name in names], [], rewards, advantages)


def test_credit_of_a_batch():
    """Correlation within groups, by hand. A missing reward is left out, and another prompt's level
    does not matter."""
    rewards = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [math.nan, 0.5, 1.0]]
    first = group_of("abc", rewards, [1.0, -1.0, 5.0])
    second = group_of("ab", [[9.0, 3.0], [9.0, 3.0]], [2.0, 2.0])
    found = credit([first, second])
    assert found["a"] == pytest.approx(1.0) and math.isnan(found["c"])
    centred = torch.tensor([1.0, -1.0, 5.0]).double() - 5 / 3
    covariance = (-0.5 * centred[0] + 0.5 * centred[1]).item()
    assert found["b"] == pytest.approx(covariance / (0.5**0.5 * centred.norm().item()))
