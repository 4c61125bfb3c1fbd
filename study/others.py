"""Aggregations of others, clipped ones and an attempt of our own, which more.py compares.

As rvpo.AGGREGATIONS: rewards (P, G, K) -> scores (P, G), not yet whitened. Rewards are on the unit
scale and none is missing. All channels weigh the same, except the constraint in `heavy`: `weights`
is not used. Nor is beta by most.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import rvpo
from rewards import Channel, to_unit

FLOOR = 0.05  # of the geometric mean, which would not see a channel beside one that is 0
LIMIT = "length14"  # the constraint of the task conflict
GAP = 2.0  # z of a success minus z of a failure where half of a large group succeeds


def in_group(scores: Tensor) -> Tensor:
    """z-scores (P, G) of scores (P, G) in their group."""
    return rvpo.zscore(scores.unsqueeze(-1)).squeeze(-1)


def neutral(scores: Tensor, counted: Tensor) -> Tensor:
    """Scores (P, G), with the mean of the counted ones for the others.

    Whitening makes the advantage of these exactly 0."""
    return scores.where(counted, scores[counted].mean() if counted.any() else 0.0)


def density(rewards: Tensor) -> Tensor:
    """DARA's weights (K,): min(5, sqrt(max pi / pi_k)).

    pi_k is the share of groups in which channel k varies; 1 if it varies in none."""
    share = (rewards.amax(1) > rewards.amin(1)).double().mean(0)
    return torch.where(share > 0, (share.max() / share).sqrt().clamp(max=5), 1.0)


def dara(rewards: Tensor, beta: float = 0.0, weights=None) -> Tensor:
    """github zhaihaotian/DARA, its symmetric form: sum_k w_k z_k, with `density`'s weights."""
    return (density(rewards) * rvpo.zscore(rewards)).sum(-1)


def gd2po(rewards: Tensor, beta: float = 0.0, weights=None) -> Tensor:
    """GD2PO (arXiv 2606.16771), its hard filter: z-scores of both signs make the advantage 0.

    The sum of the other rollouts' z-scores is multiplied by the share of their group that is left;
    the authors multiply the loss."""
    z = rvpo.zscore(rewards)
    kept = ~((z > 1e-8).any(-1) & (z < -1e-8).any(-1))
    scores = z.sum(-1) * kept.double().mean(-1, keepdim=True)
    return neutral(scores, kept & rvpo.has_signal(rewards))


def dvao(rewards: Tensor, beta: float = 0.0, weights=None) -> Tensor:
    """DVAO (arXiv 2605.25604), as read by github zhaihaotian/DARA.

    In the group: sum_k (r_k - mean_k) / sum_k std_k, std being the population's. That is
    sum_k w_k z_k with w_k = std_k / sum std: GRPO with another denominator. The authors do not
    whiten; here it follows."""
    deviation = rewards - rewards.mean(1, keepdim=True)
    total = rewards.std(1, correction=0, keepdim=True).sum(-1)  # (P, 1)
    return deviation.sum(-1) / total.masked_fill(total == 0, 1.0)


def geometric(rewards: Tensor, beta: float = 0.0, weights=None) -> Tensor:
    """The geometric mean of the channels (Nash's welfare), raised by FLOOR, then z-scored."""
    return in_group((rewards + FLOOR).log().mean(-1).exp())


def blend(rewards: Tensor, beta: float, weights=None) -> Tensor:
    """Ours: the soft minimum of p z + (1 - p) GAP (r - 1), p (K,) a channel's mean.

    A rare failure is punished as by rvpo (p near 1), a rare success is paid as by softmin (p near
    0), and a channel that nobody satisfies is not forgotten. Centred in the group: prompts differ
    in their level."""
    p = rewards.mean((0, 1))
    scores = rvpo.soft_min(p * rvpo.zscore(rewards) + (1 - p) * GAP * (rewards - 1), beta)
    return scores - scores.mean(-1, keepdim=True)


def satisfaction(channels: list[Channel], rewards: Tensor) -> Tensor:
    """(..., K) -> (..., K): min(1, r / full) on the unit scale; 1 if full is the worst value.

    What is beyond `full` is paid nothing, and a satisfied channel is 1 for methods that compare
    channels by their level."""
    full = to_unit(channels, rewards.new_tensor([channel.full for channel in channels]))
    unit = to_unit(channels, rewards)
    return torch.where(unit < full, unit / full, 1.0)


def clipped(
    aggregation: Callable, channels: list[Channel], rewards: Tensor, beta: float, weights
) -> Tensor:
    """The aggregation of `satisfaction`.

    A group in which only what is beyond `full` varies has nothing to teach."""
    r = satisfaction(channels, rewards)
    return neutral(aggregation(r, beta, weights), rvpo.has_signal(r))


def heavy(
    aggregation: Callable,
    factor: int,
    channels: list[Channel],
    rewards: Tensor,
    beta: float,
    weights,
) -> Tensor:
    """The aggregation with `factor` times the weight on the constraint: --weights, by hand."""
    weights = [factor if channel.name == LIMIT else 1 for channel in channels]
    return aggregation(rewards, beta, torch.tensor(weights))


def on_unit_scale(
    aggregation: Callable, channels: list[Channel], rewards: Tensor, beta: float, weights
) -> Tensor:
    return aggregation(to_unit(channels, rewards), beta, weights)


def forms(channels: list[Channel]) -> dict[str, Callable]:
    """{name: aggregation of the rewards of these channels}.

    "X full" is X, clipped; "X x3" has three times the weight on the constraint."""
    new = {"dara": dara, "gd2po": gd2po, "dvao": dvao, "geometric": geometric, "blend": blend}
    bound = {}
    for name, form in new.items():
        bound[name] = functools.partial(on_unit_scale, form, channels)
        bound[f"{name} full"] = functools.partial(clipped, form, channels)
    for name in ("rvpo", "gdpo", "grpo", "hardmin", "softmin"):
        bound[f"{name} full"] = functools.partial(clipped, rvpo.AGGREGATIONS[name], channels)
    for name in ("rvpo", "gdpo"):
        for factor in (3, 10):
            form = rvpo.AGGREGATIONS[name]
            bound[f"{name} x{factor}"] = functools.partial(heavy, form, factor, channels)
    return bound
