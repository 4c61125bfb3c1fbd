"""What is logged of a step's groups: joint rate, lengths, and how each reward channel behaves.

Nothing here is trained on. All of it is computed from raw rewards and finished advantages, the same
way for every aggregation, so that runs can be compared. NaN stands where there are no data.
"""

import math
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

import rvpo
from rewards import satisfied
from rollout import Group


def step_statistics(groups: list[Group], beta: float, seconds: float) -> dict:
    """A step's numbers, and those of its channels under "channels".

    beta: of the soft minimum that `channel_stats` computes. seconds: what the step took.
    """
    responses = [response for group in groups for response in group.responses]
    lengths = [len(response.tokens) for response in responses]
    joint = np.concatenate([satisfied(group.channels, group.rewards.numpy()) for group in groups])
    advantages = torch.stack([group.advantages for group in groups])  # (P, G)
    signal = torch.cat([has_signal(group) for group in groups])  # (P * G,)
    channels = channel_stats(groups, beta)
    for name, correlation in credit(groups).items():
        channels[name]["credit"] = correlation
    return {
        "joint": torch.from_numpy(joint).nanmean().item(),
        "advantage_std": advantages.std().item(),
        "no_signal": 1 - signal.double().mean().item(),
        "truncated": np.mean([response.finish == "length" for response in responses]),
        "length_mean": np.mean(lengths),
        "length_max": max(lengths),
        "tokens_per_second": sum(lengths) / seconds,
        "channels": channels,
    }


def channel_stats(groups: list[Group], beta: float) -> dict[str, dict[str, float]]:
    """Statistics of each channel, by its name. Channels with one name are taken together.

    mean, std, min, max: over all rollouts. missing: share of rewards that are NaN. constant: share
    of groups in which the channel does not vary at all. weight: not Channel.weight, but the share
    in the gradient of the soft minimum at this beta, whatever --agg is. binding: how often that
    share is the largest; ties share it. Both are added up over channels with one name, then
    averaged over the rollouts with signal.
    """
    rewards = defaultdict(list)  # of each name, columns (G,)
    binding = defaultdict(list)  # of each name, columns (rollouts with signal,)
    weight = defaultdict(list)
    rollouts = 0  # with signal
    for group in groups:
        signal = has_signal(group)
        shares = soft_min_shares(group, beta)
        largest = (shares == shares.amax(-1, keepdim=True)).to(shares)
        largest = largest / largest.sum(-1, keepdim=True)  # (G, K)
        rollouts += signal.sum().item()
        for k, channel in enumerate(group.channels):
            rewards[channel.name].append(group.rewards[:, k])
            binding[channel.name].append(largest[signal, k])
            weight[channel.name].append(shares[signal, k])
    return {
        name: {
            **_of_rewards(torch.cat(columns)),
            "constant": _share_of_constant(columns),
            "binding": _mean_over(rollouts, binding[name]),
            "weight": _mean_over(rollouts, weight[name]),
        }
        for name, columns in rewards.items()
    }


def credit(groups: list[Group]) -> dict[str, float]:
    """{channel: correlation of the advantages with its raw rewards, within groups}.

    A negative one means that this step's update works against the channel. A soft minimum of
    z-scores does that when too few rollouts of a group satisfy a channel that others oppose, see
    docs/sign.md. NaN if the channel never varies, or no advantage does.
    """
    pairs = defaultdict(list)  # of each name, (2, rollouts): rewards and advantages, centered
    for group in groups:
        for channel, values in zip(group.channels, group.rewards.T, strict=True):
            pair = torch.stack([values, group.advantages.to(values)])[:, ~values.isnan()]
            pairs[channel.name].append(pair - pair.mean(1, keepdim=True))
    correlations = {}
    for name, centered in pairs.items():
        rewards, advantages = torch.cat(centered, 1)
        size = (rewards.norm() * advantages.norm()).item()
        product = (rewards @ advantages).item()
        correlations[name] = product / size if size > 1e-9 else math.nan
    return correlations


def has_signal(group: Group) -> Tensor:
    """(G,) bool: the rollout has a reward, with weight, in a channel that varies in its group."""
    return rvpo.has_signal(group.rewards, _weights(group))


def soft_min_shares(group: Group, beta: float) -> Tensor:
    """(G, K) gradient of each rollout's soft minimum by its z-scores; the K shares sum to 1."""
    z = rvpo.zscore(group.rewards).requires_grad_()
    scores = rvpo.soft_min(z, beta, _weights(group))
    (shares,) = torch.autograd.grad(scores.sum(), z)
    return shares


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; NaN where there are too few values."""
    mean = np.mean(values) if values else math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, error


def _weights(group: Group) -> Tensor:
    return torch.tensor([channel.weight for channel in group.channels])  # (K,)


def _present(rewards: Tensor) -> Tensor:
    return rewards[~rewards.isnan()]


def _of_rewards(rewards: Tensor) -> dict[str, float]:
    present = _present(rewards)
    missing = 1 - len(present) / len(rewards)
    if len(present) == 0:
        return {**dict.fromkeys(("mean", "min", "max", "std"), math.nan), "missing": missing}
    return {
        "mean": present.mean().item(),
        "min": present.min().item(),
        "max": present.max().item(),
        "std": present.std(correction=min(1, len(present) - 1)).item(),
        "missing": missing,
    }


def _share_of_constant(columns: list[Tensor]) -> float:
    """The share of groups in which all rewards that are present are the same."""
    present = [rewards for rewards in map(_present, columns) if len(rewards)]
    constant = sum(float(rewards.amax() == rewards.amin()) for rewards in present)
    return constant / len(present) if present else math.nan


def _mean_over(rollouts: int, columns: list[Tensor]) -> float:
    return torch.cat(columns).sum().item() / rollouts if rollouts else math.nan
