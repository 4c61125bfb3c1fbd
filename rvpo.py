"""RVPO, Reward-Variance Policy Optimization (arXiv 2605.05750): the method itself, and nothing else.

Copy this file: it needs torch only. Shapes: P prompts, G rollouts of each, K reward channels.

    rewards (P, G, K) raw  ->  z (P, G, K)  ->  scores (P, G)  ->  advantages (P, G)  ->  (N,) tokens  ->  loss ()

1. `zscore`      each channel over the rollouts of one prompt,
2. `soft_min`    across the channels of one rollout: -1/beta * log mean_j exp(-beta * z_j),
3. `whiten`      over all rollouts of the batch that have a reward which varies in their group,
4. `policy_loss` the clipped policy gradient, each rollout's advantage on all of its tokens.

`rvpo_advantage` is steps 1 and 2. GDPO, the hard minimum and the explicit penalty differ in step 2 alone; GRPO and
`softmin` aggregate the raw rewards first and z-score the result. NaN means "this reward is missing": it is left out
everywhere and never counts as 0. Pad prompts that have fewer channels with NaN.

A tensor with two dimensions is ONE group, (G, K): P groups are (P, G, K), or all of their rollouts
would be z-scored together.
"""

import math

import torch
from torch import Tensor

EPS = 1e-4  # added to every standard deviation, as TRL does (verl's GDPO: 1e-6)


def _check(rewards: Tensor) -> Tensor:
    """Refuse what has no advantage; return float64. A step has few rewards: precision costs nothing."""
    if not isinstance(rewards, Tensor):
        raise ValueError(
            f"rewards must be a torch.Tensor, and not a {type(rewards).__name__}: "
            "torch.tensor(rewards)"
        )
    if rewards.dim() not in (2, 3) or rewards.shape[-2] < 2 or rewards.shape[-1] < 1:
        raise ValueError(
            f"rewards must be (G, K) or (P, G, K) with G >= 2 and K >= 1, got {tuple(rewards.shape)}"
        )
    if rewards.isinf().any():
        raise ValueError("rewards hold an infinite value: use NaN for a missing reward")
    return rewards.double()


def _float_like(scores: Tensor, rewards: Tensor) -> Tensor:
    return scores.to(
        torch.promote_types(rewards.dtype, torch.float32)
    )  # integer rewards have fractional scores


def _varies(rewards: Tensor) -> Tensor:
    """(..., G, K) -> (..., K): does the channel vary in the group, by more than the rounding of float32?"""
    low, high = rewards.nan_to_num(math.inf).amin(-2), rewards.nan_to_num(-math.inf).amax(-2)
    return high - low > 1e-6 * torch.maximum(low.abs(), high.abs())


def zscore(rewards: Tensor, eps: float = EPS) -> Tensor:
    """Step 1: (..., G, K) -> (..., G, K), unbiased std, NaN kept. A constant channel gives exactly 0."""
    present = ~rewards.isnan()
    n = present.sum(-2, keepdim=True)
    mean = rewards.nansum(-2, keepdim=True) / n.clamp(min=1)
    deviation = (rewards - mean) * _varies(rewards).unsqueeze(-2)
    std = (deviation.square().nansum(-2, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return deviation / (std + eps)


def _channel_weights(z: Tensor, weights: Tensor | None) -> Tensor:
    """(..., G, K): each rollout's weights over the channels it has, summing to 1 (all 0 if it has none)."""
    w = torch.ones(z.shape[-1:]) if weights is None else torch.as_tensor(weights)
    if (
        w.shape[-1] != z.shape[-1]
        or not (w.isfinite() & (w >= 0)).all()
        or not (w > 0).any(-1).all()
    ):
        raise ValueError(
            f"weights must be {z.shape[-1]} finite numbers >= 0 (or one such row a prompt), not all 0"
        )
    w = w.to(z).unsqueeze(-2) * ~z.isnan()
    return w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)


def soft_min(z: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """Step 2: (..., G, K) -> (..., G), -1/beta * log sum_j w_j exp(-beta * z_j) over the channels that are present.

    beta = 0 is exactly the mean (GDPO), beta = inf the minimum. With m the minimum the sum is rewritten by expm1 and
    log1p, so that no beta overflows and none divides a rounding error by a small number.
    """
    if not beta >= 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    w = _channel_weights(z, weights)
    m = z.masked_fill(w == 0, math.inf).amin(-1, keepdim=True)  # (..., G, 1)
    m = m.masked_fill(m == math.inf, 0.0)  # a rollout without any reward scores 0
    d = torch.where(w > 0, z - m, 0.0)
    if beta == 0:
        above = (w * d).sum(-1)
    elif beta == math.inf:
        above = torch.zeros_like(d[..., 0])
    else:
        above = -torch.log1p((w * torch.expm1(-beta * d)).sum(-1)) / beta
    return m.squeeze(-1) + above


# The aggregations: raw rewards (G, K) or (P, G, K) -> scores (G,) or (P, G), not yet whitened. weights: (K,) or (P, K).


def rvpo_advantage(rewards: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """RVPO's scores: z-score each channel in its group, then the soft minimum; `advantages` whitens them, too. With
    beta = 0, the mean, they are GDPO's (arXiv 2601.05242)."""
    return _float_like(soft_min(zscore(_check(rewards)), beta, weights), rewards)


def explicit_advantage(rewards: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """mean - beta * population variance of the z-scores: to second order soft_min's with twice this beta."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be >= 0 and finite, got {beta}")
    z = zscore(_check(rewards))
    w = _channel_weights(z, weights)
    mean = (w * z).nansum(-1, keepdim=True)
    return _float_like(mean.squeeze(-1) - beta * (w * (z - mean).square()).nansum(-1), rewards)


def grpo_advantage(rewards: Tensor, beta: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """GRPO (arXiv 2402.03300): sum the raw rewards, then z-score the sum in the group. beta is not used.

    A rollout with missing rewards gets its weighted mean times the group's number of channels: a gap is not a 0.
    """
    r = _check(rewards)
    w = _channel_weights(r, weights)
    channels = (
        (w > 0).any(-2).sum(-1)[..., None]
    )  # (..., 1): padding is no channel, nor is one without weight
    total = ((w * r).nansum(-1) * channels).masked_fill(w.sum(-1) == 0, math.nan)
    return _float_like(zscore(total.unsqueeze(-1)).squeeze(-1).nan_to_num(0.0), rewards)


def softmin_advantage(rewards: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """This project's own, not the paper's: the soft minimum of absolute rewards, which must be on one scale (train.py
    makes each 0 at its worst, 1 at its best), then z-scored in the group."""
    r = _check(rewards)
    s = soft_min(r, beta, weights).masked_fill(_channel_weights(r, weights).sum(-1) == 0, math.nan)
    return _float_like(zscore(s.unsqueeze(-1)).squeeze(-1).nan_to_num(0.0), rewards)


AGGREGATIONS = {
    "rvpo": rvpo_advantage,
    "gdpo": lambda rewards, beta=0.0, weights=None: rvpo_advantage(rewards, 0.0, weights),
    "grpo": grpo_advantage,
    "explicit": explicit_advantage,
    "softmin": softmin_advantage,
    "hardmin": lambda rewards, beta=0.0, weights=None: rvpo_advantage(rewards, math.inf, weights),
}


def has_signal(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """(..., G, K) -> (..., G) bool: the rollout has a reward in a channel with weight that varies in its group."""
    r = _check(rewards)
    return (~r.isnan() & _varies(r).unsqueeze(-2) & (_channel_weights(r, weights) > 0)).any(-1)


def whiten(scores: Tensor, signal: Tensor, eps: float = EPS) -> Tensor:
    """Step 3: (P, G) scores -> (P, G) advantages, z-scored over the rollouts with signal; exactly 0 for the others.

    Call it on the whole batch, gathered from all ranks (train.py does). Rollouts without signal score 0 where z-scores
    are aggregated, but the soft minimum of the others is negative on average: counted in, they would be rewarded.
    """
    x = scores[signal].double()
    out = torch.zeros_like(scores)
    if x.numel() > 1:
        out[signal] = ((x - x.mean()) / (x.std() + eps)).to(scores)
    return out


def advantages(rewards: Tensor, agg: str, beta: float, weights: Tensor | None = None) -> Tensor:
    """Steps 1 to 3: raw rewards (P, G, K) of the whole batch -> advantages (P, G). agg: a key of AGGREGATIONS."""
    if agg not in AGGREGATIONS:
        raise ValueError(f"agg must be one of {', '.join(AGGREGATIONS)}, and not {agg!r}")
    r = _check(rewards)
    if r.dim() != 3:
        raise ValueError(
            f"rewards must be (P, G, K), the whole batch, and not {tuple(r.shape)}: "
            "of one group, rewards[None]"
        )
    return _float_like(whiten(AGGREGATIONS[agg](r, beta, weights), has_signal(r, weights)), rewards)


def beta_at(schedule: tuple[float, float], step: int, steps: int) -> float:
    """The paper's risk schedule: linear from the first step (0) to the last (steps - 1)."""
    start, end = schedule
    return start if start == end else start + (end - start) * min(1.0, step / max(1, steps - 1))


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    sampler_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    n_tokens: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    is_cap: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Step 4: the clipped policy gradient over tokens. All tensors have one shape, any shape.

    logp: of the sampled tokens under the policy, with gradient. old_logp: under the policy that the batch began with;
    for the first update of a batch that is logp.detach(). sampler_logp: as the sampling engine reported them. mask: 1
    for sampled tokens. n_tokens: sampled tokens of the *whole* update, all micro-batches and ranks, so that losses and
    gradients simply add up: each token counts the same, as in ToolRL and DAPO.

    The engine and the trainer compute the same policy with different kernels. The gap is corrected by the truncated
    importance weight min(exp(old_logp - sampler_logp), is_cap); is_cap = 0 leaves it out.
    Returns the loss and sums over tokens for the log: clipped tokens, importance weights, |old_logp - sampler_logp|.
    """
    # Forced tokens may have any sampler_logp, NaN too: masked before exp, or NaN * 0 would come through.
    ratio = torch.where(mask > 0, logp - old_logp, 0.0).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    gap = torch.where(mask > 0, old_logp - sampler_logp, 0.0)
    weight = gap.exp().clamp(max=is_cap) if is_cap > 0 else torch.ones_like(gap)
    loss = -(weight * gain * mask).sum() / n_tokens
    return loss, {
        "clip_fraction": ((ratio * advantage > clipped * advantage) * mask).sum(),
        "is_weight": (weight * mask).sum(),
        "sampler_gap": (gap.abs() * mask).sum(),
    }


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), never negative: Schulman's k3, exp(x) - x - 1, x = ref - logp."""
    x = (ref_logp - logp).clamp(-20, 20)
    return x.exp() - x - 1
