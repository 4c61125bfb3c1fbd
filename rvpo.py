"""RVPO, Reward-Variance Policy Optimization (arXiv 2605.05750): the method itself, nothing else.

Copy this file: it needs torch only. Shapes: P prompts, G rollouts of each, K reward channels.

    rewards (P, G, K) raw
    1. `zscore`       z (P, G, K)          each channel over the rollouts of one prompt
    2. `soft_min`     scores (P, G)        across channels: -1/beta * log mean_j exp(-beta * z_j)
    3. `whiten`       advantages (P, G)    over all rollouts of the batch that have a signal
    4. `policy_loss`  loss ()              clipped; a rollout's advantage on each of its tokens

`rvpo_advantage` is steps 1 and 2, `advantages` is steps 1 to 3. GDPO, the hard minimum and the
explicit penalty differ in step 2 alone. GRPO and `softmin` aggregate the raw rewards first, and
z-score the result.

NaN means "this reward is missing". It is left out everywhere, and never counts as 0. Prompts that
have fewer channels are padded with NaN.

The aggregations also take one group, (G, K). `advantages` takes the batch (P, G, K) only: in two
dimensions the rollouts of all prompts would be z-scored together.
"""

import math

import torch
from torch import Tensor

EPS = 1e-4  # added to every standard deviation, as TRL does (verl's GDPO: 1e-6)


def zscore(rewards: Tensor, eps: float = EPS) -> Tensor:
    """Step 1: (..., G, K) -> (..., G, K), with the unbiased standard deviation. NaN stays NaN.

    A constant channel gives exactly 0.
    """
    present = ~rewards.isnan()
    n = present.sum(-2, keepdim=True)  # (..., 1, K)
    mean = rewards.nansum(-2, keepdim=True) / n.clamp(min=1)
    # A channel that varies by no more than rounding counts as constant: its deviations become 0.
    deviation = (rewards - mean) * _varies(rewards).unsqueeze(-2)
    variance = deviation.square().nansum(-2, keepdim=True) / (n - 1).clamp(min=1)
    return deviation / (variance.sqrt() + eps)


def soft_min(z: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """Step 2: (..., G, K) -> (..., G), -1/beta * log sum_j w_j exp(-beta * z_j).

    The sum is over the channels that are present. beta = 0 is exactly the mean (GDPO), beta = inf
    the minimum. A rollout without any reward scores 0.
    """
    if not beta >= 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    w = _channel_weights(z, weights)  # (..., G, K)
    smallest = z.masked_fill(w == 0, math.inf).amin(-1, keepdim=True)  # (..., G, 1)
    smallest = smallest.masked_fill(smallest == math.inf, 0.0)
    above = torch.where(w > 0, z - smallest, 0.0)  # (..., G, K) >= 0
    # The score is smallest + extra, with extra = -1/beta log sum_j w_j exp(-beta * above_j). No
    # exponent is positive, so a large beta cannot overflow. The w_j sum to 1, so the log is that of
    # 1 + sum_j w_j (exp(-beta * above_j) - 1): log1p and expm1 keep the digits of a small beta.
    if beta == 0:
        extra = (w * above).sum(-1)
    elif beta == math.inf:
        extra = torch.zeros_like(above[..., 0])
    else:
        extra = -torch.log1p((w * torch.expm1(-beta * above)).sum(-1)) / beta
    return smallest.squeeze(-1) + extra


def whiten(scores: Tensor, signal: Tensor, eps: float = EPS) -> Tensor:
    """Step 3: (P, G) scores -> (P, G) advantages, z-scored over the rollouts with signal.

    Rollouts without signal get exactly 0. Their score is 0, above the batch's mean, which is
    negative for a soft minimum: counted in, they would get a positive advantage for nothing. Call
    this on the whole batch: in train.py every rank has all groups, so all compute the same.
    """
    x = scores[signal].double()
    out = torch.zeros_like(scores)
    if x.numel() > 1:
        out[signal] = ((x - x.mean()) / (x.std() + eps)).to(scores)
    return out


def advantages(rewards: Tensor, agg: str, beta: float, weights: Tensor | None = None) -> Tensor:
    """Steps 1 to 3: raw rewards (P, G, K) of the whole batch -> advantages (P, G).

    agg: a key of AGGREGATIONS. weights: of channels, (K,) or (P, K). Raises ValueError.
    """
    if agg not in AGGREGATIONS:
        raise ValueError(f"agg must be one of {', '.join(AGGREGATIONS)}, and not {agg!r}")
    r = _check(rewards)
    if r.dim() != 3:
        raise ValueError(
            f"rewards must be (P, G, K), the whole batch, and not {tuple(r.shape)}: "
            "of one group, rewards[None]"
        )
    scores = AGGREGATIONS[agg](r, beta, weights)
    return _float_like(whiten(scores, has_signal(r, weights)), rewards)


def has_signal(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """(..., G, K) -> (..., G) bool: can the rollout teach anything?

    It can if it has a reward, with weight, in a channel that varies in its group.
    """
    r = _check(rewards)
    teaches = ~r.isnan() & _varies(r).unsqueeze(-2) & (_channel_weights(r, weights) > 0)
    return teaches.any(-1)


# Aggregations: raw rewards (G, K) or (P, G, K) -> scores (G,) or (P, G), not yet whitened.
# weights: of channels, (K,) or (P, K).


def rvpo_advantage(rewards: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """RVPO's scores: z-score each channel in its group, then the soft minimum."""
    return _float_like(soft_min(zscore(_check(rewards)), beta, weights), rewards)


def gdpo_advantage(rewards: Tensor, beta: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """GDPO (arXiv 2601.05242): the mean of the z-scores. beta is not used."""
    return rvpo_advantage(rewards, 0.0, weights)


def hardmin_advantage(rewards: Tensor, beta: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """The minimum of the z-scores. beta is not used."""
    return rvpo_advantage(rewards, math.inf, weights)


def explicit_advantage(rewards: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """mean - beta * population variance of the z-scores.

    To second order it is soft_min's score with twice this beta.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be >= 0 and finite, got {beta}")
    z = zscore(_check(rewards))
    w = _channel_weights(z, weights)
    mean = (w * z).nansum(-1, keepdim=True)  # (..., G, 1)
    variance = (w * (z - mean).square()).nansum(-1)  # (..., G)
    return _float_like(mean.squeeze(-1) - beta * variance, rewards)


def grpo_advantage(rewards: Tensor, beta: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """GRPO (arXiv 2402.03300): the sum of the raw rewards, z-scored in the group. beta is not used.

    A rollout with missing rewards gets the weighted mean of its others, times the group's number of
    channels, so that a gap does not count as 0.
    """
    r = _check(rewards)
    w = _channel_weights(r, weights)
    channels = (w > 0).any(-2).sum(-1)[..., None]  # (..., 1), without padding and weight 0
    # The weights of a rollout sum to 1, so this is the plain sum if none is missing.
    total = (w * r).nansum(-1) * channels  # (..., G)
    return _float_like(_zscore_scores(total, w), rewards)


def softmin_advantage(rewards: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """The soft minimum of the raw rewards, z-scored in the group: this project's own idea.

    All rewards must be on one scale. train.py makes each 0 at its worst and 1 at its best.
    """
    r = _check(rewards)
    score = soft_min(r, beta, weights)
    return _float_like(_zscore_scores(score, _channel_weights(r, weights)), rewards)


AGGREGATIONS = {
    "rvpo": rvpo_advantage,
    "gdpo": gdpo_advantage,
    "grpo": grpo_advantage,
    "explicit": explicit_advantage,
    "softmin": softmin_advantage,
    "hardmin": hardmin_advantage,
}


def beta_at(schedule: tuple[float, float], step: int, steps: int) -> float:
    """The paper's risk schedule: linear from the first step (0) to the last (steps - 1)."""
    start, end = schedule
    if start == end:
        return start
    return start + (end - start) * min(1.0, step / max(1, steps - 1))


# Training


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
    response: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Step 4: the clipped policy gradient over tokens. All tensors have one shape, any shape.

    logp: of the sampled tokens under the policy, with gradient.
    old_logp: under the policy that the batch began with. For the first update of a batch that is
        logp.detach().
    sampler_logp: as the sampling engine reported them.
    mask: 1 for sampled tokens; 0 for those that an engine put in, or that are left out.
    n_tokens: sampled tokens of the *whole* update, of all micro-batches and ranks. Losses and
        gradients then simply add up, and each token counts the same, as in ToolRL and DAPO.

    is_cap: the largest importance weight, see `importance`.
    response: int64, the number of each token's response, from 0 to N - 1; see `importance`. The
        tensors then have the shape (N,).

    Returns the loss and sums over tokens for the log.

    The ratio is clipped here; the gradient's norm in update.py, which calls this.
    """
    # Tokens with mask 0 may have any sampler_logp, NaN too. They are masked before exp, because
    # NaN * 0 is NaN.
    ratio = torch.where(mask > 0, logp - old_logp, 0.0).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    gap = torch.where(mask > 0, old_logp - sampler_logp, 0.0)
    weight = importance(gap, is_cap, response)
    loss = -(weight * gain * mask).sum() / n_tokens
    is_clipped = ratio * advantage > clipped * advantage
    return loss, {
        "clip_fraction": (is_clipped * mask).sum(),
        "is_weight": (weight * mask).sum(),
        "sampler_gap": (gap.abs() * mask).sum(),
    }


def importance(gap: Tensor, cap: float, response: Tensor | None = None) -> Tensor:
    """Importance weights of tokens, because engine and trainer compute one policy differently.

    gap: log-probs of the trainer minus those of the engine. A token's weight is min(exp(gap), cap).
    If cap is 0, every weight is 1. With `response` all tokens of a response have one weight, the
    exponential of their summed gap. If that is above cap it becomes 0, which leaves the response
    out (TRL's default: sequence_mask with cap 3).
    """
    if cap == 0:
        return torch.ones_like(gap)
    if response is None:
        return gap.exp().clamp(max=cap)
    summed = torch.zeros_like(gap).index_add(0, response, gap)
    weight = summed[response].exp()
    return weight.masked_fill(weight > cap, 0.0)


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's k3, an estimate of KL(policy || reference) for each token. Never negative.

    It is exp(x) - x - 1 with x = ref_logp - logp.
    """
    x = (ref_logp - logp).clamp(-20, 20)
    return x.exp() - x - 1


# Inside


def _check(rewards: Tensor) -> Tensor:
    """Refuses what has no advantage. Returns float64: a step has few rewards, precision is free."""
    if not isinstance(rewards, Tensor):
        raise ValueError(
            f"rewards must be a torch.Tensor, and not a {type(rewards).__name__}: "
            "torch.tensor(rewards)"
        )
    shape = tuple(rewards.shape)
    if len(shape) not in (2, 3) or shape[-2] < 2 or shape[-1] < 1:
        raise ValueError(f"rewards must be (G, K) or (P, G, K) with G >= 2 and K >= 1, got {shape}")
    if rewards.isinf().any():
        raise ValueError("rewards hold an infinite value: use NaN for a missing reward")
    return rewards.double()


def _float_like(scores: Tensor, rewards: Tensor) -> Tensor:
    """In the dtype of the rewards; integer rewards have fractional scores."""
    return scores.to(torch.promote_types(rewards.dtype, torch.float32))


def _varies(rewards: Tensor) -> Tensor:
    """(..., G, K) -> (..., K) bool: by more than the rounding of float32. All missing: False."""
    low = rewards.nan_to_num(math.inf).amin(-2)
    high = rewards.nan_to_num(-math.inf).amax(-2)
    return high - low > 1e-6 * torch.maximum(low.abs(), high.abs())


def _zscore_scores(scores: Tensor, w: Tensor) -> Tensor:
    """(..., G) -> (..., G) in the group. A rollout without any reward is left out and gets 0."""
    known = scores.masked_fill(w.sum(-1) == 0, math.nan)
    return zscore(known.unsqueeze(-1)).squeeze(-1).nan_to_num(0.0)


def _channel_weights(z: Tensor, weights: Tensor | None) -> Tensor:
    """(..., G, K): each rollout's weights over the channels that it has.

    They sum to 1, or are all 0 if it has none.
    """
    K = z.shape[-1]
    w = torch.ones(K) if weights is None else torch.as_tensor(weights)
    valid = w.shape[-1] == K and (w.isfinite() & (w >= 0)).all() and (w > 0).any(-1).all()
    if not valid:
        raise ValueError(
            f"weights must be {K} finite numbers >= 0 (or one such row a prompt), not all 0"
        )
    w = w.to(z).unsqueeze(-2) * ~z.isnan()
    return w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
