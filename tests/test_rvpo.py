"""The advantage against numbers worked out by hand, TRL's formula, and what the method promises."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.testing import assert_close

import rvpo
from config import parse_beta

NAN = math.nan


def rewards_strategy(levels: int = 5, missing: bool = False):
    """(P, G, K) rewards on a grid, so that ties and constant channels happen."""
    value = st.integers(0, levels - 1).map(lambda i: i / (levels - 1))
    if missing:
        value = st.one_of(value, st.just(NAN))
    shape = st.tuples(st.integers(1, 3), st.integers(2, 8), st.integers(1, 6))
    return shape.flatmap(lambda s: arrays("float64", s, elements=value)).map(torch.from_numpy)


def by_hand(actual, *expected: float):
    assert_close(actual, torch.tensor(expected))


def test_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    # Each channel has mean 0.5 and unbiased std sqrt(1/3): z is a or -a.
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    # -1/beta log((e^(-beta a) + e^(beta a)) / 2), beta = 2:
    mixed = -math.log(math.cosh(2 * a)) / 2
    by_hand(rvpo.rvpo_advantage(rewards, 2.0), mixed, mixed, a, -a)
    by_hand(rvpo.AGGREGATIONS["gdpo"](rewards), 0.0, 0.0, a, -a)
    by_hand(rvpo.AGGREGATIONS["hardmin"](rewards), -a, -a, a, -a)
    by_hand(rvpo.explicit_advantage(rewards, 0.5), -a * a / 2, -a * a / 2, a, -a)
    b = 1 / (math.sqrt(2 / 3) + 1e-4)  # sums 1, 1, 2, 0
    by_hand(rvpo.grpo_advantage(rewards), 0.0, 0.0, b, -b)


def test_missing_reward_by_hand():
    """Rollout 0 has no second reward, rollout 3 has none at all."""
    rewards = torch.tensor([[1.0, NAN], [0.0, 1.0], [1.0, 0.0], [NAN, NAN]])
    # Channel 0 over rollouts 0 to 2: mean 2/3, std sqrt(1/3).
    p = (1 / 3) / (math.sqrt(1 / 3) + 1e-4)
    # Channel 1 over rollouts 1 and 2: mean 0.5, std sqrt(0.5).
    q = 0.5 / (math.sqrt(0.5) + 1e-4)
    by_hand(rvpo.AGGREGATIONS["gdpo"](rewards), p, (-2 * p + q) / 2, (p - q) / 2, 0.0)
    by_hand(rvpo.AGGREGATIONS["hardmin"](rewards), p, -2 * p, -q, 0.0)
    # grpo: a rollout counts as its mean over what it has, times two channels: 2, 1, 1.
    r = 1 / (math.sqrt(1 / 3) + 1e-4)
    by_hand(rvpo.grpo_advantage(rewards), r * 2 / 3, -r / 3, -r / 3, 0.0)
    whitened = rvpo.advantages(rewards[None], "rvpo", 2.0)[0]
    assert whitened[3] == 0
    assert abs(whitened[:3].mean()) < 1e-6 and abs(whitened[:3].std() - 1) < 1e-3


@given(rewards_strategy(missing=True))
def test_gdpo_is_trl_normalize_then_sum(rewards):
    """As TRL's documentation has it: nanmean and nanstd (ddof 1) in the group, eps 1e-4, nansum
    over the channels, then whitening per sample.

    A sum and a mean whiten alike where nothing is missing."""
    rewards = rewards.nan_to_num(0.5)
    z = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    scores = z.mean(-1)
    assert_close(rvpo.AGGREGATIONS["gdpo"](rewards), scores, atol=1e-9, rtol=1e-9)
    # TRL counts groups without signal in, we do not.
    if rvpo.has_signal(rewards).all() and scores.std() > 0.01:
        expected = (scores - scores.mean()) / (scores.std() + 1e-4)
        got = rvpo.advantages(rewards, "gdpo", 1.0)
        assert_close(got, expected, atol=1e-6, rtol=1e-6)


@given(rewards_strategy(missing=True), st.sampled_from([0.0, 1e-6, 0.3, 1.0, 7.0, 1e3, math.inf]))
def test_float32_is_accurate_for_every_beta(rewards, beta):
    z = rvpo.zscore(rewards)
    got = rvpo.soft_min(z.float(), beta)
    low, mean = z.nan_to_num(math.inf).amin(-1), z.nanmean(-1)
    empty = z.isnan().all(-1)
    assert got.isfinite().all() and (got[empty] == 0).all()
    for p, g in (~empty).nonzero().tolist():
        exact = exact_soft_min([v for v in z[p, g].tolist() if not math.isnan(v)], beta)
        assert abs(got[p, g].item() - exact) < 3e-6
        assert low[p, g] - 3e-6 <= got[p, g] <= mean[p, g] + 3e-6


def exact_soft_min(values: list[float], beta: float) -> float:
    mean, low = math.fsum(values) / len(values), min(values)
    if beta == 0:
        return mean
    if beta == math.inf:
        return low
    if beta * (max(values) - low) < 1e-3:  # the formula has lost its digits here: use the series
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        return mean - beta / 2 * variance
    shifted = math.fsum(math.exp(-beta * (v - low)) for v in values) / len(values)
    return low - math.log(shifted) / beta


@given(rewards_strategy(), st.floats(1e-3, 5.0))
def test_taylor_bound(rewards, beta):
    """|soft-min - (mean - beta/2 var)| <= beta^2 r^3 / (36 sqrt 3), r the range of z."""
    z = rvpo.zscore(rewards)
    taylor = z.mean(-1) - beta / 2 * z.var(-1, unbiased=False)
    bound = beta**2 * (z.amax(-1) - z.amin(-1)) ** 3 / (36 * math.sqrt(3))
    assert ((rvpo.soft_min(z, beta) - taylor).abs() <= bound + 1e-9).all()
    assert_close(rvpo.explicit_advantage(rewards, beta / 2), taylor)


@given(rewards_strategy(missing=True), st.floats(0.0, 20.0), st.randoms(use_true_random=False))
def test_order_of_rollouts_and_channels_does_not_matter(rewards, beta, rng):
    rollouts, channels = list(range(rewards.shape[1])), list(range(rewards.shape[2]))
    rng.shuffle(rollouts)
    rng.shuffle(channels)
    for function in rvpo.AGGREGATIONS.values():
        plain = function(rewards, beta)
        other_channels = function(rewards[:, :, channels], beta)
        assert_close(other_channels, plain, atol=1e-9, rtol=1e-9)
        other_rollouts = function(rewards[:, rollouts], beta)
        assert_close(other_rollouts, plain[:, rollouts], atol=1e-9, rtol=1e-9)
        # Padding with a channel that nobody has changes nothing.
        padded = torch.cat([rewards, torch.full_like(rewards[..., :1], NAN)], -1)
        assert_close(function(padded, beta), plain, atol=1e-9, rtol=1e-9)


@given(rewards_strategy(), st.floats(0.0, 5.0), st.floats(-3, 3), st.floats(10, 1000))
def test_scale_and_shift_of_a_channel_do_not_matter(rewards, beta, shift, scale):
    """Up to eps = 1e-4, beside which the standard deviation is at least 0.08. For grpo they do."""
    changed = rewards.clone()
    changed[..., 0] = changed[..., 0] * scale + shift
    before, after = rvpo.rvpo_advantage(rewards, beta), rvpo.rvpo_advantage(changed, beta)
    assert_close(after, before, atol=2e-2, rtol=0)


@given(rewards_strategy(missing=True), st.sampled_from([*rvpo.AGGREGATIONS]), st.floats(0.1, 5.0))
def test_groups_without_signal_get_exactly_zero_and_stay_out(rewards, agg, beta):
    got = rvpo.advantages(rewards, agg, beta)
    signal = rvpo.has_signal(rewards)
    assert got.isfinite().all() and (got[~signal] == 0).all()
    constant = torch.full_like(rewards[:1], 0.1)
    more = rvpo.advantages(torch.cat([constant, rewards, 3 * constant]), agg, beta)
    assert (more[0] == 0).all() and (more[-1] == 0).all()
    assert_close(more[1:-1], got)


def test_the_trap_of_whitening_soft_min():
    """8 prompts x 8 rollouts x 2 binary rewards, beta 1: constant groups would get about +0.2."""
    rewards = torch.randint(0, 2, (8, 8, 2), generator=torch.Generator().manual_seed(0)).float()
    rewards[:3] = 1.0
    scores = rvpo.rvpo_advantage(rewards, 1.0)
    trapped = rvpo.whiten(scores, torch.ones_like(scores, dtype=torch.bool))
    assert trapped[:3].min() > 0.1
    assert (rvpo.advantages(rewards, "rvpo", 1.0)[:3] == 0).all()


@pytest.mark.parametrize("agg", [*rvpo.AGGREGATIONS])
def test_rounding_noise_in_one_channel_does_not_erase_the_others(agg):
    """A channel that varies by rounding alone counts as constant.

    NeMo-RL#4158: a variance as E[x^2] - E[x]^2 leaves 2e-7 of a constant 0.95, and z-scores of
    thousands, beside which whitening makes all others 0. Here it is 0. A channel that differs once
    has z-scores of at most (G - 1) / sqrt(G)."""
    rewards = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(0))
    rewards[..., 2] = 0.95
    exact = rvpo.advantages(rewards, agg, 2.0)
    noisy = rewards.clone()
    noisy[:, ::2, 2] = torch.nextafter(noisy[:, ::2, 2], torch.tensor(1.0))
    assert (noisy != rewards).any() and exact.abs().max() > 1
    assert_close(rvpo.advantages(noisy, agg, 2.0), exact, atol=1e-5, rtol=1e-5)
    noise = torch.cat([noisy[:1, :, 2:].expand(1, 8, 3), rewards])  # a group of nothing else
    assert (rvpo.advantages(noise, agg, 2.0)[0] == 0).all()
    assert_close(rvpo.advantages(noise, agg, 2.0)[1:], exact, atol=1e-5, rtol=1e-5)
    rewards[:, 0, 2] = 0.0  # [0, .95, .95, ...]
    assert rvpo.zscore(rewards.double())[..., 2].abs().max() <= 7 / math.sqrt(8)


def test_a_rollout_whose_only_rewards_are_constant_has_no_signal():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, NAN]])
    assert rvpo.has_signal(rewards).tolist() == [True, True, False]
    assert rvpo.advantages(rewards[None], "rvpo", 2.0)[0, 2] == 0
    unweighted = rvpo.advantages(rewards[None], "rvpo", 2.0, torch.tensor([1.0, 0.0]))
    assert (unweighted == 0).all()  # only the channel without weight varies


def test_opposed_rewards_cancel_in_the_mean_but_not_in_the_soft_min():
    r = torch.tensor([1.0, 1.0, 0.0, 0.0])
    rewards = torch.stack([r, 1 - r], -1)
    assert (rvpo.AGGREGATIONS["gdpo"](rewards) == 0).all()
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert_close(rvpo.rvpo_advantage(rewards, 1.0), torch.full((4,), -math.log(math.cosh(a))))


def test_weights():
    rewards = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0))
    for function in rvpo.AGGREGATIONS.values():
        same = function(rewards, 2.0, torch.tensor([7.0, 7.0, 7.0]))
        assert_close(same, function(rewards, 2.0))
        dropped = function(rewards, 2.0, torch.tensor([1.0, 0.0, 1.0]))
        assert_close(dropped, function(rewards[..., [0, 2]], 2.0), atol=2e-4, rtol=1e-3)
        by_prompt = function(rewards, 2.0, torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
        assert_close(by_prompt, torch.stack([same[0], dropped[1]]))
    z = torch.tensor([[-1.0, 0.0]]).double()
    tiny_weight = rvpo.soft_min(z, 1e3, torch.tensor([1e-8, 1.0]))
    assert tiny_weight.item() == pytest.approx(-(1000 + math.log(1e-8)) / 1000, abs=1e-6)


def test_the_gradient_of_soft_min_is_each_channel_s_weight():
    """As metrics.jsonl reports it: exp(-beta z) in shares. A missing channel has none."""
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[0, 2], z[3] = NAN, NAN
    for beta in (0.0, 0.5, 3.0):
        (gradient,) = torch.autograd.grad(rvpo.soft_min(z.requires_grad_(), beta).sum(), z)
        shares = (-beta * z.detach()).exp().nan_to_num(0.0)
        assert_close(gradient, shares / shares.sum(-1, keepdim=True).clamp(min=1e-300))
    z = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(rvpo.soft_min(z, math.inf).sum(), z)
    assert gradient.tolist() == [[0.0, 0.5, 0.5]]


@pytest.mark.parametrize(
    "rewards",
    [torch.zeros(4), torch.zeros(1, 3), torch.zeros(2, 0), torch.tensor([[1.0], [math.inf]])],
)
def test_bad_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards"):
        rvpo.rvpo_advantage(rewards, 1.0)


def test_integer_rewards_and_bad_settings():
    rewards = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    floats = rewards.float()
    assert_close(rvpo.rvpo_advantage(rewards, 2.0), rvpo.rvpo_advantage(floats, 2.0))
    with pytest.raises(ValueError, match="beta"):
        rvpo.explicit_advantage(rewards, math.inf)
    of_floats = rvpo.advantages(floats[None], "rvpo", 2.0)
    assert_close(rvpo.advantages(rewards[None], "rvpo", 2.0), of_floats)
    for beta in (-1.0, NAN):
        with pytest.raises(ValueError, match="beta"):
            rvpo.rvpo_advantage(rewards, beta)
    for weights in ([1.0], [-1.0, 1.0], [0.0, 0.0], [NAN, 1.0]):
        with pytest.raises(ValueError, match="weights"):
            rvpo.rvpo_advantage(rewards, 1.0, torch.tensor(weights))


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
    assert parse_beta("2") == (2.0, 2.0)
    assert parse_beta("0.5:2") == (0.5, 2.0)
    assert parse_beta("inf") == (math.inf, math.inf)
    assert [rvpo.beta_at((0.5, 2.0), step, 4) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rvpo.beta_at((2.0, 2.0), 0, 1) == 2.0
    assert rvpo.beta_at((math.inf, math.inf), 1, 3) == math.inf
    for text in ("", "x", "-1", "nan", "1:nan", "1:2:3", "0:inf", "1:"):
        with pytest.raises(ValueError, match="beta"):
            parse_beta(text)


def test_policy_loss_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 9.0])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    old = torch.full((6,), -2.0)
    # The weight of the fifth would be 10, and is capped at 2.
    sampler = old - torch.tensor([0.0, 0.0, 0.0, 0.0, math.log(10.0), 0.0])
    logp = (old + ratio.log()).requires_grad_()
    loss, stats = rvpo.policy_loss(
        logp, old, sampler, advantage, mask, n_tokens=10, clip_low=0.2, clip_high=0.3, is_cap=2.0
    )
    # gains: 1, min(1.5, 1.3), min(0.5, 0.8), min(-1.5, -1.3), 2 * min(-0.5, -0.8)
    assert loss.item() == pytest.approx(-(1 + 1.3 + 0.5 - 1.5 - 2 * 0.8) / 10)
    assert stats["clip_fraction"] == 2 and stats["is_weight"] == 6
    assert stats["sampler_gap"].item() == pytest.approx(math.log(10))
    loss.backward()
    assert_close(logp.grad, torch.tensor([-0.1, 0.0, -0.05, 0.15, 0.0, 0.0]))
    forced, _ = rvpo.policy_loss(
        logp, old, sampler.masked_fill(mask == 0, NAN), advantage, mask, 10, 0.2, 0.3, is_cap=2.0
    )
    assert forced.item() == loss.item()  # what an engine reports for a forced token does not matter
    uncorrected, _ = rvpo.policy_loss(logp, old, sampler, advantage, mask, 10, 0.2, 0.3, is_cap=0)
    assert uncorrected.item() == pytest.approx(-(1 + 1.3 + 0.5 - 1.5 - 0.8) / 10)


@settings(max_examples=50)
@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3(logp, ref):
    k3 = rvpo.kl_k3(torch.tensor(logp, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64))
    exact = math.exp(ref - logp) - (ref - logp) - 1
    assert k3 >= -1e-12
    assert k3.item() == pytest.approx(exact, rel=1e-12, abs=1e-9)


def test_softmin_credits_a_success_as_it_punishes_a_failure():
    """One in eight gets 7/sqrt(8), up or down, as with grpo. rvpo caps the credit of a success."""
    success, failure = torch.zeros(8, 9, dtype=torch.float64), torch.ones(8, 9, dtype=torch.float64)
    success[0, 0], failure[0, 0] = 1, 0
    for name, up, down in (
        ("softmin", 2.475, -2.475),
        ("grpo", 2.475, -2.475),
        ("rvpo", 0.0585, -1.4038),
    ):
        scores = [rvpo.AGGREGATIONS[name](r, 2.0)[0].item() for r in (success, failure)]
        assert scores == pytest.approx([up, down], abs=0.015), name  # eps beside a small std


def test_softmin_by_hand():
    """Missing rewards are left out; a rollout without any gets 0."""
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.0], [1.0, nan], [nan, nan], [0.0, 0.0]])
    s = torch.tensor([-math.log((math.exp(-1) + 1) / 2), 1.0, 0.0])  # of the three that have some
    expected = (s - s.mean()) / (s.std() + rvpo.EPS)
    first, second, last = expected.tolist()
    by_hand(rvpo.softmin_advantage(rewards, 1.0), first, second, 0.0, last)
    whitened = rvpo.advantages(rewards[None].float(), "softmin", 1.0, torch.ones(2))
    assert whitened.dtype == torch.float32
