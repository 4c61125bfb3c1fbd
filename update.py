"""The update: optimizer steps on a batch of groups, each prompt computed once, and none that has nothing to teach."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import policy as policies
import rvpo
from infra.prompts import Prompt
from infra.ranks import RANK, WORLD
from infra.signals import check_signals
from rollout import Group, Response

GRAD_CLIP = 1.0  # the gradient norm is clipped to this, as in ToolRL


class Learner(NamedTuple):  # what is trained, and what trains it
    policy: policies.Policy
    reference: policies.Policy | None  # of the KL penalty
    optimizer: torch.optim.Optimizer
    device: torch.device


def make_optimizer(policy, lr: float) -> torch.optim.AdamW:
    """With ToolRL's settings, in one fused kernel."""
    return torch.optim.AdamW(
        policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True
    )


def computed(group: Group) -> int:
    """Tokens of a prompt and its responses that go through the model: a response's last one predicts nothing."""
    return len(group.prompt.ids) + sum(
        max(0, len(response.tokens) - 1) for response in group.responses
    )


def split(group: Group, limit: int) -> list[Group]:
    """Parts whose responses have at most `limit` computed tokens; a single one may have more."""
    parts, tokens = [[]], 0
    for i, response in enumerate(group.responses):
        n = max(0, len(response.tokens) - 1)
        if parts[-1] and tokens + n > limit:
            parts, tokens = [*parts, []], 0
        parts[-1].append(i)
        tokens += n
    return [group.part(chosen) for chosen in parts]


def deal(groups: list[Group], ranks: int, budget: int) -> list[list[list[Group]]]:
    """For each rank its micro-batches, at least one and equally many (sharded ranks wait for each other at every layer)
    of at most `budget` tokens, unless one response with its prompt has more. The largest group goes first, to the one
    with the fewest tokens. A group whose responses exceed the budget, or a rank's share of all, is split."""
    share = math.ceil(sum(computed(group) - len(group.prompt.ids) for group in groups) / ranks)
    parts = [
        part
        for group in groups
        for part in split(group, min(budget - len(group.prompt.ids), share))
    ]
    parts.sort(key=computed, reverse=True)
    least = math.ceil(sum(min(computed(part), budget) for part in parts) / ranks / budget)
    for rounds in itertools.count(max(1, least)):  # as few as will do: each gathers all weights
        batches, tokens = [[] for _ in range(rounds * ranks)], [0] * (rounds * ranks)
        for part in parts:
            b = tokens.index(min(tokens))
            if batches[b] and tokens[b] + computed(part) > budget:
                break
            batches[b].append(part)
            tokens[b] += computed(part)
        else:
            break
    batches.sort(
        key=lambda batch: -sum(map(computed, batch))
    )  # those that ranks compute at one time are alike
    return [batches[rank::ranks] for rank in range(ranks)]


# What an idle rank computes: sharded layers need all ranks at every forward, AdamW needs gradients, if only of 0.
IDLE = [
    Group(
        Prompt([0], None),
        [],
        [Response([0], [0.0], [0], "", "")],
        torch.zeros(1, 0),
        torch.zeros(1),
    )
]


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def row_of(
    groups: list[Group], device: torch.device
) -> tuple[policies.Row, Tensor, Tensor, Tensor]:
    """A micro-batch as one row, and of its N response tokens, in that order: mask, log-prob when sampled, advantage."""
    row = policies.pack(
        [(group.prompt.ids, [r.tokens for r in group.responses]) for group in groups], device
    )
    responses = [response for group in groups for response in group.responses]
    lengths = torch.tensor([len(response.tokens) for response in responses])
    advantages = torch.cat([group.advantages for group in groups]).repeat_interleave(lengths)
    mask, logp = ([x for r in responses for x in r.mask], [x for r in responses for x in r.logp])
    return row, *(
        torch.as_tensor(x, dtype=torch.float32, device=device) for x in (mask, logp, advantages)
    )


def update(
    learner: Learner, groups: list[Group], updates: int, kl: float, temperature: float, budget: int
) -> dict[str, float]:
    """Optimizer steps on one batch of groups, `updates` of them, each on prompts of its own. kl: coefficient of the
    penalty. budget: most tokens in a micro-batch. A prompt whose advantages are all 0 has no gradient and is not
    computed, unless there is a KL penalty. Returns the mean loss over all of the tokens, other means over those that
    were computed, the largest gradient norm before clipping, and which updates were left out because loss or gradient
    was not finite (bad_updates; bad_prompts: places in the batch). Raises checkpoint.Stop on all ranks, with the policy
    unchanged."""
    policy, device = learner.policy, learner.device
    slots = np.array_split(np.arange(len(groups)), updates)
    # Sampled tokens of each update, also of prompts that are not computed. Counted first, over all ranks: any split
    # into micro-batches and ranks then gives the same mean over tokens, and losses and gradients simply add up.
    n_tokens = [
        sum(sum(response.mask) for slot in share for response in groups[slot].responses)
        for share in slots
    ]
    kept = [
        [groups[slot] for slot in share if kl or groups[slot].advantages.any()] for share in slots
    ]
    packed = [
        [row_of(batch or IDLE, device) for batch in deal(some, WORLD, budget)[RANK]]
        for some in kept
    ]
    # Old log-probs. None for the first update: its policy is the one that sampled, and logp.detach() stands in.
    old_logp = [[None] * len(packed[0])]
    with torch.no_grad():
        for batches in packed[1:]:
            old_logp.append([check_signals() or policy(row, temperature) for row, *_ in batches])
    if isinstance(policy, FSDPModule):
        policy.reshard()  # a forward without backward leaves embeddings and head gathered: AdamW would step on copies
    names = [
        *"loss tokens clip_fraction is_weight sampler_gap entropy".split(),
        *["kl"] * bool(learner.reference),
    ]
    sums, grad_norms, bad = (
        {name: torch.zeros((), dtype=torch.float64, device=device) for name in names},
        [],
        [],
    )
    for u, batches in enumerate(packed):
        losses = torch.zeros((), device=device)
        for i, ((row, mask, sampler_logp, advantages), old) in enumerate(
            zip(batches, old_logp[u], strict=True)
        ):
            if u == 0:  # afterwards the policy has changed, and the step is finished
                check_signals()
            logp = policy(row, temperature)
            loss, stats = rvpo.policy_loss(
                logp,
                logp.detach() if old is None else old,
                sampler_logp,
                advantages,
                mask,
                max(1, n_tokens[u]),
            )
            stats["entropy"] = -(
                logp.detach() * mask
            ).sum()  # an estimate: the mean of -log p over sampled tokens
            stats["tokens"] = mask.sum()
            if learner.reference is not None:
                with torch.no_grad():
                    ref_logp = learner.reference(row, temperature)
                stats["kl"] = (rvpo.kl_k3(logp, ref_logp) * mask).sum()
                loss = loss + kl * stats["kl"] / max(1, n_tokens[u])
            stats["loss"] = loss * n_tokens[u]
            if isinstance(
                policy, FSDPModule
            ):  # gradients go from node to node once, with those of the last batch
                policy.set_requires_all_reduce(i == len(batches) - 1)
            (loss * WORLD).backward()  # fully_shard takes the mean over ranks, this is a sum
            losses += loss.detach()
            for name in names:
                sums[name] += stats[name].detach()
        norm = step(learner, losses)
        (bad if norm is None else grad_norms).append(u if norm is None else norm)
    loss, tokens, *others = all_sum(torch.stack([*sums.values()])).tolist()
    return {
        "loss": loss / max(1, sum(n_tokens)),
        **{
            name: total / tokens if tokens else math.nan
            for name, total in zip(names[2:], others, strict=True)
        },
        "grad_norm": max(grad_norms, default=math.nan),
        "bad_updates": bad,
        "bad_prompts": [slot for u in bad for slot in slots[u].tolist()],
        "skipped_prompts": len(groups) - sum(map(len, kept)),
    }


def step(learner: Learner, loss: Tensor) -> float | None:
    """An optimizer step on the gradients that are there. Returns their norm before clipping. None, on all ranks, if it
    or the loss (this rank's) is not finite: then nothing was changed."""
    norm = torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), GRAD_CLIP)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    finite = math.isfinite(norm) and math.isfinite(all_sum(loss).item())
    if finite:
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    return norm if finite else None
