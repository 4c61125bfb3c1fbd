"""The update: optimizer steps on a batch of rollouts, each prompt computed once, and none that has nothing to teach."""

import argparse
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import balance
import rvpo
import stop
from policy import pack
from rollout import RANK, WORLD, Response


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def make_optimizer(policy, lr: float) -> torch.optim.AdamW:
    """With ToolRL's settings, in one fused kernel."""
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)


Piece = tuple[list[int], list[Response], Tensor]  # prompt ids, some of its responses, their advantages


def micro_batches(slots: Iterable[int], batch: list, responses: list, advantages: Tensor, pair: float,
                  args: argparse.Namespace) -> list[list[Piece]]:
    """This rank's share of an update: its micro-batches, dealt out by work. slots: the places in the batch of its
    prompts. pair: see balance.attention_cost.

    A prompt whose advantages are all 0, for want of signal, has no gradient and is not computed, unless there is a KL
    penalty.
    """
    kept = [slot for slot in slots if args.kl or advantages[slot].any()]
    groups = [(len(batch[slot][0]), [len(response.tokens) for response in responses[slot]]) for slot in kept]
    mine = balance.plan(groups, WORLD, args.tokens_per_microbatch, pair)[RANK]
    return [[(batch[kept[g]][0], [responses[kept[g]][i] for i in some], advantages[kept[g], some]) for g, some in one]
            for one in mine]


# What a rank computes when the others have a micro-batch more: sharded layers need all ranks at every forward.
IDLE = [([0], [Response([0], [0.0], [0], "", "")], torch.zeros(1))]


def update(policy, reference, optimizer, updates: list[tuple[int, list[list[Piece]]]], args: argparse.Namespace,
           device: torch.device) -> dict[str, float]:
    """Optimizer steps on one batch. updates: for each the number of sampled tokens, of all ranks, and this rank's
    micro_batches. Returns the mean loss over all of the tokens, other means over those that were computed, the largest
    gradient norm before clipping, and which of the updates were left out because their loss or gradient was not finite.
    Raises stop.Stop on all ranks, before the policy is changed."""

    def flat(pieces: list[Piece], name: str) -> torch.Tensor:  # (N,), the response tokens in the order of pack
        values = [x for _, responses, _ in pieces for response in responses for x in getattr(response, name)]
        return torch.tensor(values, dtype=torch.float32, device=device)

    packed = [[(pieces or IDLE, pack([(prompt, [response.tokens for response in responses])
                                      for prompt, responses, _ in pieces or IDLE], device))
               for pieces in mine] for _, mine in updates]
    with torch.no_grad():
        # The first update's policy is the one that sampled: its old log-probs are logp.detach(). Only later ones need
        # a forward of their own.
        old_logp = [[stop.check() or policy(row, args.temperature) if u else None for _, row in mine]
                    for u, mine in enumerate(packed)]
    if isinstance(policy, FSDPModule):
        # A forward without backward leaves embeddings and head gathered: an update without a micro-batch would then
        # step on copies.
        policy.reshard()
    sums, grad_norms, bad = {"loss": 0.0}, [], []
    for u, (n_tokens, _) in enumerate(updates):
        losses = torch.zeros((), device=device)
        for (pieces, row), old in zip(packed[u], old_logp[u], strict=True):
            if u == 0:
                stop.check()
            logp, mask = policy(row, args.temperature), flat(pieces, "mask")
            advantage = torch.cat([advantages.repeat_interleave(torch.tensor([len(r.tokens) for r in responses]))
                                   for _, responses, advantages in pieces]).to(logp)  # (N,)
            # Divided by all tokens of the update, on all ranks: any split into micro-batches and ranks then gives the
            # same mean, and gradients simply add up.
            loss, stats = rvpo.policy_loss(logp, logp.detach() if old is None else old, flat(pieces, "logp"), advantage,
                                           mask, max(1, n_tokens), args.clip_low, args.clip_high, args.is_cap)
            stats["entropy"] = -(logp.detach() * mask).sum()  # an estimate: the mean of -log p over sampled tokens
            stats["tokens"] = mask.sum()
            if reference is not None:
                with torch.no_grad():
                    ref_logp = reference(row, args.temperature)
                kl = (rvpo.kl_k3(logp, ref_logp) * mask).sum()
                loss = loss + args.kl * kl / max(1, n_tokens)
                stats["kl"] = kl.detach()
            stats["loss"] = loss.detach() * n_tokens
            (loss * WORLD).backward()  # fully_shard takes the mean over ranks, this is a sum
            losses += loss.detach()
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        for parameter in policy.parameters():
            if parameter.grad is None:  # nothing to learn from: the gradient is 0, the optimizer's momentum is not
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(norm) and math.isfinite(all_sum(losses).item()):  # the same on all ranks
            grad_norms.append(norm)
            optimizer.step()
        else:
            bad.append(u)
        optimizer.zero_grad()
    names = ["clip_fraction", "is_weight", "sampler_gap", "entropy"] + ["kl"] * (reference is not None)
    totals = all_sum(torch.stack([torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device)
                                  for name in ["loss", "tokens", *names]])).tolist()
    means = [total / totals[1] if totals[1] else math.nan for total in totals[2:]]
    return {"loss": totals[0] / max(1, sum(n for n, _ in updates)), **dict(zip(names, means, strict=True)),
            "grad_norm": max(grad_norms, default=math.nan), "bad_updates": bad}
