"""The update: optimizer steps on one batch of groups.

Each prompt is computed once for its group. A prompt whose advantages are all 0 teaches nothing and
is left out. Each rank gets equally many micro-batches of nearly equal size; nothing is padded.
"""

import math
from collections.abc import Callable
from dataclasses import replace
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
SUMS = "loss", "tokens", "clip_fraction", "is_weight", "sampler_gap", "entropy", "kl"


class Loss(NamedTuple):  # what may be changed of the loss, see docs/choices.md
    clip: tuple[float, float] = (0.2, 0.2)  # no gain from a ratio beyond 1 - low, 1 + high
    mask_truncated: bool = False  # responses that were cut off are not trained on
    correction: str = "token"  # of the gap between engine and trainer: token or sequence


class Learner(NamedTuple):  # what is trained, and what trains it
    policy: policies.Policy
    reference: Callable | None  # of the KL penalty: computes log-probs as the policy does
    optimizer: torch.optim.Optimizer
    device: torch.device
    loss: Loss = Loss()


class MicroBatch(NamedTuple):  # one forward pass: N response tokens, in the order of the groups
    row: policies.Row
    mask: Tensor  # (N,) 1 = sampled, 0 = forced
    sampler_logp: Tensor  # (N,) as the sampling engine reported them
    advantages: Tensor  # (N,) each rollout's, repeated for its tokens
    response: Tensor  # (N,) int64: the number of each token's response


def make_optimizer(policy, lr: float) -> torch.optim.AdamW:
    """AdamW with ToolRL's settings, in one fused kernel."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)


def update(
    learner: Learner, groups: list[Group], updates: int, kl: float, temperature: float, budget: int
) -> dict:
    """Takes `updates` optimizer steps, each on prompts of its own. All ranks must call it.

    groups: the whole batch, the same on every rank. kl: coefficient of the penalty; above 0 every
    prompt is computed. budget: most tokens in a micro-batch.

    Returns metrics. The loss is a mean over all sampled tokens; other means are over the tokens of
    prompts that were computed. bad_updates lists updates that were left out because loss or
    gradient was not finite, bad_prompts their places in the batch. Raises signals.Stop on all
    ranks, with the policy unchanged.
    """
    if learner.loss.mask_truncated:
        groups = [without_truncated(group) for group in groups]
    shares = np.array_split(np.arange(len(groups)), updates)
    # Sampled tokens of each update, also of prompts that are not computed. They are counted over
    # all ranks before any work is split: every split then gives the same mean over tokens.
    n_tokens = [count_sampled(groups, share) for share in shares]
    work = []
    computed_prompts = 0
    for share in shares:
        kept = [groups[place] for place in share if kl or groups[place].advantages.any()]
        computed_prompts += len(kept)
        work.append(my_micro_batches(kept, budget, learner.device))
    old_logps = old_logps_of(learner.policy, work, temperature)

    sums = {name: torch.zeros((), dtype=torch.float64, device=learner.device) for name in SUMS}
    grad_norms = []
    bad_updates = []
    for u, micro_batches in enumerate(work):
        loss = torch.zeros((), device=learner.device)
        for i, (batch, old_logp) in enumerate(zip(micro_batches, old_logps[u], strict=True)):
            if u == 0:  # once the policy has changed, a signal waits until the step is finished
                check_signals()
            if isinstance(learner.policy, FSDPModule):
                # Nodes exchange gradients once, with those of the last micro-batch.
                learner.policy.set_requires_all_reduce(i == len(micro_batches) - 1)
            tokens = max(1, n_tokens[u])
            loss += add_gradients(learner, batch, old_logp, kl, temperature, tokens, sums)
        norm = optimizer_step(learner, loss)
        if norm is None:
            bad_updates.append(u)
        else:
            grad_norms.append(norm)

    metrics = means(sums, max(1, sum(n_tokens)), with_kl=learner.reference is not None)
    metrics["grad_norm"] = max(grad_norms, default=math.nan)
    metrics["bad_updates"] = bad_updates
    metrics["bad_prompts"] = [place for u in bad_updates for place in shares[u].tolist()]
    metrics["skipped_prompts"] = len(groups) - computed_prompts
    return metrics


def without_truncated(group: Group) -> Group:
    """The group with responses that were cut off masked out (DAPO's overlong filtering)."""
    responses = []
    for response in group.responses:
        if response.finish == "length":
            response = response._replace(mask=[0] * len(response.mask))
        responses.append(response)
    return replace(group, responses=responses)


def count_sampled(groups: list[Group], places: np.ndarray) -> int:
    """Sampled tokens of the groups at these places."""
    total = 0
    for place in places:
        for response in groups[place].responses:
            total += sum(response.mask)
    return total


def old_logps_of(policy, work: list[list[MicroBatch]], temperature: float) -> list[list]:
    """Log-probs (N,) of each micro-batch of each update, under the policy that sampled.

    None for the first update: its policy is the one that sampled, and logp.detach() stands in.
    """
    old_logps = [[None] * len(work[0])]
    with torch.no_grad():
        for micro_batches in work[1:]:
            logps = []
            for batch in micro_batches:
                check_signals()
                logps.append(policy(batch.row, temperature))
            old_logps.append(logps)
    if isinstance(policy, FSDPModule):
        # A forward without backward leaves embeddings and head whole (see policy.shard). AdamW
        # would change these copies instead of the shards.
        policy.reshard()
    return old_logps


def add_gradients(
    learner: Learner,
    batch: MicroBatch,
    old_logp: Tensor | None,
    kl: float,
    temperature: float,
    n_tokens: float,
    sums: dict[str, Tensor],
) -> Tensor:
    """One micro-batch: forward, and backward, which adds to the gradients. Returns its loss.

    What is logged of it is added to `sums`.
    """
    logp = learner.policy(batch.row, temperature)  # (N,)
    if old_logp is None:
        old_logp = logp.detach()
    per_sequence = learner.loss.correction == "sequence"
    loss, stats = rvpo.policy_loss(
        logp,
        old_logp,
        batch.sampler_logp,
        batch.advantages,
        batch.mask,
        n_tokens,
        *learner.loss.clip,
        is_cap=3.0 if per_sequence else 2.0,
        response=batch.response if per_sequence else None,
    )
    if learner.reference is not None:
        with torch.no_grad():
            ref_logp = learner.reference(batch.row, temperature)
        stats["kl"] = (rvpo.kl_k3(logp, ref_logp) * batch.mask).sum()
        loss = loss + kl * stats["kl"] / n_tokens
    stats["loss"] = loss * n_tokens
    stats["tokens"] = batch.mask.sum()
    stats["entropy"] = -(logp.detach() * batch.mask).sum()  # an estimate: the mean of -log p
    # FSDP averages gradients over ranks. Ours must be summed, so the loss is multiplied by the
    # number of ranks.
    (loss * WORLD).backward()
    for name, value in stats.items():
        sums[name] += value.detach()
    return loss.detach()


def optimizer_step(learner: Learner, loss: Tensor) -> float | None:
    """Takes a step on the gradients that are there. loss: this rank's part.

    Returns their norm before clipping. Returns None, on all ranks, if norm or loss is not finite:
    then nothing was changed.
    """
    norm = torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), GRAD_CLIP)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm.item()
    # All ranks have the same norm, so either all or none of them call all_sum.
    finite = math.isfinite(norm) and math.isfinite(all_sum(loss).item())
    if finite:
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    return norm if finite else None


def means(sums: dict[str, Tensor], n_tokens: float, with_kl: bool) -> dict[str, float]:
    """The metrics of all ranks, from each rank's sums over tokens."""
    totals = dict(zip(sums, all_sum(torch.stack([*sums.values()])).tolist(), strict=True))
    loss = totals.pop("loss")
    tokens = totals.pop("tokens")
    if not with_kl:
        del totals["kl"]
    metrics = {"loss": loss / n_tokens}
    for name, total in totals.items():
        metrics[name] = total / tokens if tokens else math.nan
    return metrics


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


# Dealing out: which rank computes what

# What an idle rank computes. Sharded layers need all ranks at every forward, and AdamW needs
# gradients, if only of 0.
IDLE = Group(
    prompt=Prompt([0], None),
    channels=[],
    responses=[Response([0], [0.0], [0], "", "")],
    rewards=torch.zeros(1, 0),
    advantages=torch.zeros(1),
)


def my_micro_batches(groups: list[Group], budget: int, device: torch.device) -> list[MicroBatch]:
    """This rank's part of the work, on its device."""
    mine = deal(groups, WORLD, budget)[RANK]
    return [pack(part or [IDLE], device) for part in mine]


def pack(groups: list[Group], device: torch.device) -> MicroBatch:
    """Groups as one row of tokens."""
    sequences = []
    lengths = []
    mask = []
    sampler_logp = []
    for group in groups:
        sequences.append((group.prompt.ids, [response.tokens for response in group.responses]))
        for response in group.responses:
            lengths.append(len(response.tokens))
            mask += response.mask
            sampler_logp += response.logp
    rollout_advantages = torch.cat([group.advantages for group in groups])
    response = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    advantages = rollout_advantages[response]
    return MicroBatch(
        policies.pack(sequences, device),
        torch.tensor(mask, dtype=torch.float32, device=device),
        torch.tensor(sampler_logp, dtype=torch.float32, device=device),
        torch.as_tensor(advantages, dtype=torch.float32, device=device),
        response.to(device),
    )


def deal(groups: list[Group], ranks: int, budget: int) -> list[list[list[Group]]]:
    """Returns each rank's micro-batches: a list of groups each, of at most `budget` tokens.

    All ranks get equally many, at least one, because sharded ranks wait for each other at every
    layer; some may be empty. They are as few as will do, because each gathers all weights. A group
    is split if its responses exceed the budget or one rank's part of the work. One response that
    exceeds the budget by itself is a micro-batch of its own.
    """
    response_tokens = sum(computed(group) - len(group.prompt.ids) for group in groups)
    largest = math.ceil(response_tokens / ranks)  # a rank's part of the work
    parts = []
    for group in groups:
        parts += split(group, min(budget - len(group.prompt.ids), largest))
    parts.sort(key=computed, reverse=True)

    # A part above the budget counts as one full micro-batch: it is alone there.
    tokens = sum(min(computed(part), budget) for part in parts)
    rounds = max(1, math.ceil(tokens / ranks / budget))
    micro_batches = fill(parts, rounds * ranks, budget)
    while micro_batches is None:
        rounds += 1
        micro_batches = fill(parts, rounds * ranks, budget)

    # The largest first: what ranks compute at the same time is of nearly the same size.
    micro_batches.sort(key=lambda batch: -sum(map(computed, batch)))
    return [micro_batches[rank::ranks] for rank in range(ranks)]


def fill(parts: list[Group], bins: int, budget: int) -> list[list[Group]] | None:
    """Puts each part into the bin with the fewest tokens. None if one does not fit there."""
    contents = [[] for _ in range(bins)]
    tokens = [0] * bins
    for part in parts:
        emptiest = tokens.index(min(tokens))
        if contents[emptiest] and tokens[emptiest] + computed(part) > budget:
            return None
        contents[emptiest].append(part)
        tokens[emptiest] += computed(part)
    return contents


def split(group: Group, limit: int) -> list[Group]:
    """Parts whose responses have at most `limit` computed tokens; a single one may have more."""
    parts = [[]]
    tokens = 0
    for i, response in enumerate(group.responses):
        n = predicting(response)
        if parts[-1] and tokens + n > limit:
            parts.append([])
            tokens = 0
        parts[-1].append(i)
        tokens += n
    return [group.part(chosen) for chosen in parts]


def computed(group: Group) -> int:
    """Tokens of a group that go through the model: its prompt once, and its responses."""
    return len(group.prompt.ids) + sum(map(predicting, group.responses))


def predicting(response: Response) -> int:
    """Tokens of a response that predict another one: all but the last."""
    return max(0, len(response.tokens) - 1)
