"""The advantage against numbers worked out by hand, TRL's formula, and what the method promises."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import tensor
from torch.testing import assert_close

import rvpo
from config import parse_beta
from rvpo import EPS

NAN = math.nan
INF = math.inf


def rewards_strategy(missing: bool = False):
    """(P, G, K) rewards on a grid, so that ties and constant channels happen."""
    value = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    if missing:
        value = st.one_of(value, st.just(NAN))
    prompts = st.integers(1, 3)
    group = st.integers(2, 8)
    channels = st.integers(1, 6)
    shape = st.tuples(prompts, group, channels)
    return arrays("float64", shape, elements=value).map(torch.from_numpy)


def drawn(*shape: int) -> torch.Tensor:
    """Rewards in [0, 1), the same each time."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def scores_of(agg: str, rewards, beta: float = 1.0) -> torch.Tensor:
    return rvpo.AGGREGATIONS[agg](rewards, beta)


def assert_near(actual, expected, tolerance: float = 1e-9):
    assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def assert_zero(actual):
    assert (actual == 0).all()


def by_hand(actual, *expected: float):
    assert_close(actual, tensor(expected))


def test_by_hand():
    rewards = tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    # Each channel has mean 0.5 and unbiased std sqrt(1/3): z is a or -a.
    a = 0.5 / (math.sqrt(1 / 3) + EPS)
    # -1/beta log((e^(-beta a) + e^(beta a)) / 2), beta = 2:
    mixed = -math.log(math.cosh(2 * a)) / 2
    soft = rvpo.rvpo_advantage(rewards, 2.0)
    by_hand(soft, mixed, mixed, a, -a)
    by_hand(scores_of("gdpo", rewards), 0.0, 0.0, a, -a)
    by_hand(scores_of("hardmin", rewards), -a, -a, a, -a)
    penalized = -a * a / 2
    explicit = rvpo.explicit_advantage(rewards, 0.5)
    by_hand(explicit, penalized, penalized, a, -a)
    b = 1 / (math.sqrt(2 / 3) + EPS)  # sums 1, 1, 2, 0
    by_hand(rvpo.grpo_advantage(rewards), 0.0, 0.0, b, -b)


def test_missing_reward_by_hand():
    """Rollout 0 has no second reward, rollout 3 has none at all."""
    rewards = tensor([[1.0, NAN], [0.0, 1.0], [1.0, 0.0], [NAN, NAN]])
    # Channel 0 over rollouts 0 to 2: mean 2/3, std sqrt(1/3).
    p = (1 / 3) / (math.sqrt(1 / 3) + EPS)
    # Channel 1 over rollouts 1 and 2: mean 0.5, std sqrt(0.5).
    q = 0.5 / (math.sqrt(0.5) + EPS)
    mean_1, mean_2 = (-2 * p + q) / 2, (p - q) / 2
    by_hand(scores_of("gdpo", rewards), p, mean_1, mean_2, 0.0)
    by_hand(scores_of("hardmin", rewards), p, -2 * p, -q, 0.0)
    # grpo: a rollout counts as its mean over what it has, times two channels: 2, 1, 1.
    third = 1 / (math.sqrt(1 / 3) + EPS) / 3
    grpo = rvpo.grpo_advantage(rewards)
    by_hand(grpo, 2 * third, -third, -third, 0.0)


def test_a_rollout_without_any_reward_stays_out_of_whitening():
    rewards = tensor([[1.0, NAN], [0.0, 1.0], [1.0, 0.0], [NAN, NAN]])
    (whitened,) = rvpo.advantages(rewards[None], "rvpo", 2.0)
    others, without = whitened[:3], whitened[3]
    assert without == 0
    assert abs(others.mean()) < 1e-6
    assert abs(others.std() - 1) < 1e-3


@given(rewards_strategy(missing=True))
def test_gdpo_is_trl_normalize_then_sum(rewards):
    """As TRL's documentation has it: nanmean and nanstd (ddof 1) in the group, eps 1e-4, nansum
    over the channels, then whitening per sample.

    A sum and a mean whiten alike where nothing is missing."""
    rewards = rewards.nan_to_num(0.5)
    deviation = rewards - rewards.mean(1, keepdim=True)
    z = deviation / (rewards.std(1, keepdim=True) + 1e-4)
    scores = z.mean(-1)
    assert_near(scores_of("gdpo", rewards), scores)
    # TRL counts groups without signal in, we do not.
    signal = rvpo.has_signal(rewards)
    if signal.all() and scores.std() > 0.01:
        expected = (scores - scores.mean()) / (scores.std() + 1e-4)
        got = rvpo.advantages(rewards, "gdpo", 1.0)
        assert_near(got, expected, 1e-6)


@given(rewards_strategy(missing=True), st.sampled_from([0.0, 1e-6, 0.3, 1.0, 7.0, 1e3, INF]))
def test_float32_is_accurate_for_every_beta(rewards, beta):
    z = rvpo.zscore(rewards)
    got = rvpo.soft_min(z.float(), beta)
    assert got.isfinite().all()
    for row, score in zip(z.flatten(0, 1), got.flatten(), strict=True):
        values = row[~row.isnan()].tolist()
        if not values:
            assert score == 0
            continue
        mean = math.fsum(values) / len(values)
        exact = exact_soft_min(values, beta)
        assert abs(score.item() - exact) < 3e-6
        assert min(values) - 3e-6 <= score <= mean + 3e-6


def exact_soft_min(values: list[float], beta: float) -> float:
    n = len(values)
    mean = math.fsum(values) / n
    low, high = min(values), max(values)
    if beta == 0:
        return mean
    if beta == INF:
        return low
    if beta * (high - low) < 1e-3:  # the formula has lost its digits here: use the series
        squares = [(v - mean) ** 2 for v in values]
        return mean - beta / 2 * math.fsum(squares) / n
    exponentials = [math.exp(-beta * (v - low)) for v in values]
    return low - math.log(math.fsum(exponentials) / n) / beta


@given(rewards_strategy(), st.floats(1e-3, 5.0))
def test_taylor_bound(rewards, beta):
    """|soft-min - (mean - beta/2 var)| <= beta^2 r^3 / (36 sqrt 3), r the range of z."""
    z = rvpo.zscore(rewards)
    mean = z.mean(-1)
    variance = z.var(-1, unbiased=False)
    taylor = mean - beta / 2 * variance
    r = z.amax(-1) - z.amin(-1)
    bound = beta**2 * r**3 / (36 * math.sqrt(3))
    soft = rvpo.soft_min(z, beta)
    difference = (soft - taylor).abs()
    assert (difference <= bound + 1e-9).all()
    explicit = rvpo.explicit_advantage(rewards, beta / 2)
    assert_close(explicit, taylor)


@given(rewards_strategy(missing=True), st.floats(0.0, 20.0), st.randoms(use_true_random=False))
def test_order_of_rollouts_and_channels_does_not_matter(rewards, beta, rng):
    _, group, n_channels = rewards.shape
    rollouts = [*range(group)]
    rng.shuffle(rollouts)
    channels = [*range(n_channels)]
    rng.shuffle(channels)
    # A channel that nobody has: prompts with fewer channels are padded with it.
    nobody_s = torch.full_like(rewards[..., :1], NAN)
    padded = torch.cat([rewards, nobody_s], -1)
    for aggregate in rvpo.AGGREGATIONS.values():
        plain = aggregate(rewards, beta)
        other_channels = aggregate(rewards[:, :, channels], beta)
        assert_near(other_channels, plain)
        other_rollouts = aggregate(rewards[:, rollouts], beta)
        assert_near(other_rollouts, plain[:, rollouts])
        assert_near(aggregate(padded, beta), plain)


@given(rewards_strategy(), st.floats(0.0, 5.0), st.floats(-3, 3), st.floats(10, 1000))
def test_scale_and_shift_of_a_channel_do_not_matter(rewards, beta, shift, scale):
    """Up to eps = 1e-4, beside which the standard deviation is at least 0.08. For grpo they do."""
    changed = rewards.clone()
    changed[..., 0] *= scale
    changed[..., 0] += shift
    before = rvpo.rvpo_advantage(rewards, beta)
    after = rvpo.rvpo_advantage(changed, beta)
    assert_close(after, before, atol=2e-2, rtol=0)


@given(rewards_strategy(missing=True), st.sampled_from([*rvpo.AGGREGATIONS]), st.floats(0.1, 5.0))
def test_groups_without_signal_get_exactly_zero_and_stay_out(rewards, agg, beta):
    got = rvpo.advantages(rewards, agg, beta)
    signal = rvpo.has_signal(rewards)
    assert got.isfinite().all()
    assert_zero(got[~signal])
    constant = torch.full_like(rewards[:1], 0.1)
    with_constants = torch.cat([constant, rewards, 3 * constant])
    first, *more, last = rvpo.advantages(with_constants, agg, beta)
    assert_zero(first)
    assert_zero(last)
    assert_close(torch.stack(more), got)


def test_the_trap_of_whitening_soft_min():
    """8 prompts x 8 rollouts x 2 binary rewards, beta 1: constant groups would get about +0.2."""
    rewards = drawn(8, 8, 2).round()
    rewards[:3] = 1.0
    scores = rvpo.rvpo_advantage(rewards, 1.0)
    everything = torch.ones_like(scores, dtype=torch.bool)
    trapped = rvpo.whiten(scores, everything)
    assert trapped[:3].min() > 0.1
    whitened = rvpo.advantages(rewards, "rvpo", 1.0)
    assert_zero(whitened[:3])


@pytest.mark.parametrize("agg", [*rvpo.AGGREGATIONS])
def test_rounding_noise_in_one_channel_does_not_erase_the_others(agg):
    """A channel that varies by rounding alone counts as constant.

    NeMo-RL#4158: a variance as E[x^2] - E[x]^2 leaves 2e-7 of a constant 0.95, and z-scores of
    thousands, beside which whitening makes all others 0. Here it is 0."""
    rewards = drawn(6, 8, 3)
    rewards[..., 2] = 0.95
    exact = rvpo.advantages(rewards, agg, 2.0)
    assert exact.abs().max() > 1
    noisy = rewards.clone()
    upwards = tensor(1.0)
    noisy[:, ::2, 2] = torch.nextafter(noisy[:, ::2, 2], upwards)
    assert (noisy != rewards).any()
    got = rvpo.advantages(noisy, agg, 2.0)
    assert_near(got, exact, 1e-5)
    nothing_else = noisy[:1, :, 2:].expand(1, 8, 3)  # a group of noise alone
    with_noise = torch.cat([nothing_else, rewards])
    first, *others = rvpo.advantages(with_noise, agg, 2.0)
    assert_zero(first)
    assert_near(torch.stack(others), exact, 1e-5)


def test_a_channel_that_differs_once_has_no_larger_z_scores_than_any():
    """At most (G - 1) / sqrt(G)."""
    rewards = drawn(6, 8, 3).double()
    rewards[..., 2] = 0.95
    rewards[:, 0, 2] = 0.0  # [0, .95, .95, ...]
    z = rvpo.zscore(rewards)
    assert z[..., 2].abs().max() <= 7 / math.sqrt(8)


def test_a_rollout_whose_only_rewards_are_constant_has_no_signal():
    rewards = tensor([[1.0, 0.0], [1.0, 1.0], [1.0, NAN]])
    signal = rvpo.has_signal(rewards)
    assert signal.tolist() == [True, True, False]
    (whitened,) = rvpo.advantages(rewards[None], "rvpo", 2.0)
    assert whitened[2] == 0
    # Only the channel without weight varies.
    weights = tensor([1.0, 0.0])
    unweighted = rvpo.advantages(rewards[None], "rvpo", 2.0, weights)
    assert_zero(unweighted)


def test_opposed_rewards_cancel_in_the_mean_but_not_in_the_soft_min():
    r = tensor([1.0, 1.0, 0.0, 0.0])
    rewards = torch.stack([r, 1 - r], -1)
    mean = scores_of("gdpo", rewards)
    assert_zero(mean)
    a = 0.5 / (math.sqrt(1 / 3) + EPS)
    expected = -math.log(math.cosh(a))
    soft = rvpo.rvpo_advantage(rewards, 1.0)
    assert_close(soft, torch.full((4,), expected))


@pytest.mark.parametrize("agg", [*rvpo.AGGREGATIONS])
def test_weights(agg):
    """Only their ratios count; a channel without weight is left out; prompts may differ in them."""
    aggregate = rvpo.AGGREGATIONS[agg]
    rewards = drawn(2, 6, 3)
    same = aggregate(rewards, 2.0, tensor([7.0, 7.0, 7.0]))
    assert_close(same, aggregate(rewards, 2.0))
    dropped = aggregate(rewards, 2.0, tensor([1.0, 0.0, 1.0]))
    without = aggregate(rewards[..., [0, 2]], 2.0)
    assert_close(dropped, without, atol=2e-4, rtol=1e-3)
    by_prompt = aggregate(rewards, 2.0, tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
    assert_close(by_prompt, torch.stack([same[0], dropped[1]]))


def test_a_tiny_weight_by_hand():
    z = tensor([[-1.0, 0.0]]).double()
    weights = tensor([1e-8, 1.0])
    (score,) = rvpo.soft_min(z, 1e3, weights)
    expected = -1 - math.log(1e-8) / 1000
    assert score.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0])
def test_the_gradient_of_soft_min_is_each_channel_s_weight(beta):
    """As metrics.jsonl reports it: exp(-beta z) in shares. A missing channel has none."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    z[0, 2] = NAN
    z[3] = NAN
    shares = torch.exp(-beta * z).nan_to_num(0.0)
    sums = shares.sum(-1, keepdim=True)
    expected = shares / sums.clamp(min=1e-300)
    assert_close(gradient_of_soft_min(z, beta), expected)


def test_the_gradient_of_a_minimum_is_shared_by_the_lowest():
    z = tensor([[1.0, 0.0, 0.0]])
    gradient = gradient_of_soft_min(z, INF)
    assert gradient.tolist() == [[0.0, 0.5, 0.5]]


def gradient_of_soft_min(z: torch.Tensor, beta: float) -> torch.Tensor:
    z = z.clone().requires_grad_()
    rvpo.soft_min(z, beta).sum().backward()
    return z.grad


@pytest.mark.parametrize(
    "rewards",
    [torch.zeros(4), torch.zeros(1, 3), torch.zeros(2, 0), tensor([[1.0], [INF]])],
)
def test_bad_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards"):
        rvpo.rvpo_advantage(rewards, 1.0)


INTEGERS = tensor([[1, 0], [0, 1], [1, 1], [0, 0]])


def test_integer_rewards():
    floats = INTEGERS.float()
    expected = rvpo.rvpo_advantage(floats, 2.0)
    assert_close(rvpo.rvpo_advantage(INTEGERS, 2.0), expected)
    whitened = rvpo.advantages(floats[None], "rvpo", 2.0)
    assert_close(rvpo.advantages(INTEGERS[None], "rvpo", 2.0), whitened)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="beta"):
        rvpo.explicit_advantage(INTEGERS, INF)
    for beta in (-1.0, NAN):
        with pytest.raises(ValueError, match="beta"):
            rvpo.rvpo_advantage(INTEGERS, beta)
    for weights in ([1.0], [-1.0, 1.0], [0.0, 0.0], [NAN, 1.0]):
        with pytest.raises(ValueError, match="weights"):
            rvpo.rvpo_advantage(INTEGERS, 1.0, tensor(weights))


def test_what_is_no_batch_of_rewards_is_named():
    rewards = torch.rand(6, 2)
    for wrong, message in (
        (rewards.tolist(), "rewards must be a torch.Tensor, and not a list"),
        (rewards.numpy(), "rewards must be a torch.Tensor, and not a ndarray"),
        (
            rewards,
            "rewards must be (P, G, K), the whole batch, and not (6, 2): "
            "of one group, rewards[None]",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            rvpo.advantages(wrong, "rvpo", 1.0)
    message = "agg must be one of rvpo, gdpo, grpo, explicit, softmin, hardmin, and not 'RVPO'"
    with pytest.raises(ValueError, match=message):
        rvpo.advantages(rewards[None], "RVPO", 1.0)


def test_beta_schedule():
    rising = (0.5, 2.0)
    assert parse_beta("2") == (2.0, 2.0)
    assert parse_beta("0.5:2") == rising
    assert parse_beta("inf") == (INF, INF)
    betas = [rvpo.beta_at(rising, step, 4) for step in range(4)]
    assert betas == [0.5, 1.0, 1.5, 2.0]
    assert rvpo.beta_at((2.0, 2.0), 0, 1) == 2.0
    assert rvpo.beta_at((INF, INF), 1, 3) == INF
    for text in ("", "x", "-1", "nan", "1:nan", "1:2:3", "0:inf", "1:"):
        with pytest.raises(ValueError, match="beta"):
            parse_beta(text)


# Six tokens of one update; the last one is forced.
RATIO = tensor([1.0, 1.5, 0.5, 1.5, 0.5, 9.0])
ADVANTAGE = tensor([1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
MASK = tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
OLD = torch.full((6,), -2.0)
GAP = math.log(10)  # for the fifth: its weight would be 10, and is capped at 2
SAMPLER = OLD - tensor([0.0, 0.0, 0.0, 0.0, GAP, 0.0])


def policy_loss(sampler_logp, **options):
    """The loss, what is logged, and the gradient."""
    logp = (OLD + RATIO.log()).requires_grad_()
    options = {"n_tokens": 10, "clip_low": 0.2, "clip_high": 0.3, "is_cap": 2.0, **options}
    loss, stats = rvpo.policy_loss(logp, OLD, sampler_logp, ADVANTAGE, MASK, **options)
    loss.backward()
    return loss.item(), stats, logp.grad


def test_policy_loss_by_hand():
    loss, stats, gradient = policy_loss(SAMPLER)
    # gains: 1, min(1.5, 1.3), min(0.5, 0.8), min(-1.5, -1.3), 2 * min(-0.5, -0.8)
    gains = 1 + 1.3 + 0.5 - 1.5 - 2 * 0.8
    assert loss == pytest.approx(-gains / 10)
    assert stats["clip_fraction"] == 2
    assert stats["is_weight"] == 6
    assert stats["sampler_gap"].item() == pytest.approx(GAP)
    by_hand(gradient, -0.1, 0.0, -0.05, 0.15, 0.0, 0.0)


def test_what_an_engine_reports_for_a_forced_token_does_not_matter():
    forced = SAMPLER.masked_fill(MASK == 0, NAN)
    loss, *_ = policy_loss(forced)
    expected, *_ = policy_loss(SAMPLER)
    assert loss == expected


def test_policy_loss_without_importance_weights():
    loss, *_ = policy_loss(SAMPLER, is_cap=0)
    gains = 1 + 1.3 + 0.5 - 1.5 - 0.8
    assert loss == pytest.approx(-gains / 10)


@settings(max_examples=50)
@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3(logp, ref):
    policy_logp = tensor(logp, dtype=torch.float64)
    ref_logp = tensor(ref, dtype=torch.float64)
    k3 = rvpo.kl_k3(policy_logp, ref_logp).item()
    assert k3 >= -1e-12
    x = ref - logp
    exact = math.exp(x) - x - 1
    assert k3 == pytest.approx(exact, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(
    ("agg", "up", "down"),
    [("softmin", 2.475, -2.475), ("grpo", 2.475, -2.475), ("rvpo", 0.0585, -1.4038)],
)
def test_softmin_credits_a_success_as_it_punishes_a_failure(agg, up, down):
    """One in eight gets 7/sqrt(8), up or down, as with grpo. rvpo caps the credit of a success."""
    success = torch.zeros(8, 9, dtype=torch.float64)
    success[0, 0] = 1
    failure = 1 - success
    credit, *_ = scores_of(agg, success, 2.0)
    punishment, *_ = scores_of(agg, failure, 2.0)
    # eps stands beside a small std
    assert credit.item() == pytest.approx(up, abs=0.015)
    assert punishment.item() == pytest.approx(down, abs=0.015)


def test_softmin_by_hand():
    """Missing rewards are left out; a rollout without any gets 0."""
    rewards = tensor([[1.0, 0.0], [1.0, NAN], [NAN, NAN], [0.0, 0.0]])
    mixed = -math.log((math.exp(-1) + 1) / 2)
    s = tensor([mixed, 1.0, 0.0])  # of the three that have some
    z = (s - s.mean()) / (s.std() + EPS)
    first, second, last = z.tolist()
    softmin = rvpo.softmin_advantage(rewards, 1.0)
    by_hand(softmin, first, second, 0.0, last)
    weights = torch.ones(2)
    whitened = rvpo.advantages(rewards[None].float(), "softmin", 1.0, weights)
    assert whitened.dtype == torch.float32
