"""Updates on fixed rollouts, for test_train.py: in its process, or on several ranks."""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import balance
import checkpoint
import files
import model
import policy as policies
import rollout
from options import parse_args
from rollout import Response
from update import micro_batches, update

CPU = torch.device("cpu")
CASES = {  # what differs from five prompts of four responses in one update, all in one micro-batch, with a KL penalty
    "whole": {}, "split": {"limit": 100}, "checkpointing": {"limit": 200, "checkpointing": True},
    "silent": {"kl": 0.0, "limit": 100, "silent": (0, 3)}, "few": {"prompts": 1, "group": 2},
    "several": {"limit": 200, "updates": 5},
    "nothing": {"kl": 0.0, "silent": range(5)}, "nothing first": {"kl": 0.0, "silent": (0, 1, 2), "updates": 2},
}


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it steps on: whole, whatever shards they are in."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.gradients = []

    def step(self):
        self.gradients.append(torch.cat([full(p.grad).flatten() for group in self.param_groups for p in group["params"]]))
        super().step()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def batch_of(prompts: int, group: int, silent=()) -> tuple[list, list, torch.Tensor]:
    """Prompts and responses of very different lengths: (batch, responses, advantages), as update.micro_batches has
    them. silent: prompts with advantages of 0."""
    generator = torch.Generator().manual_seed(0)
    batch, responses = [], []
    for slot in range(prompts):
        batch.append((torch.randint(3, 1024, (20 + 30 * slot,), generator=generator).tolist(), None))
        responses.append([])
        for g in range(group):
            tokens = torch.randint(3, 1024, (1 + 5 * slot + 7 * g,), generator=generator).tolist()
            logp = [-6.9 - 0.3 * (i % 3) for i in range(len(tokens))]
            responses[-1].append(Response(tokens, logp, [int(i % 5 != 4) for i in range(len(tokens))], "stop", ""))
    advantages = torch.randn(prompts, group, generator=generator)
    advantages[list(silent)] = 0.0
    return batch, responses, advantages


def updates_of(policy, args, batch: list, responses: list, advantages: torch.Tensor) -> list:
    """This rank's share, as train.fit deals it out."""
    pair = balance.attention_cost(policy.lm.config)
    shares = [range(u * len(batch) // args.updates, (u + 1) * len(batch) // args.updates) for u in range(args.updates)]
    return [(sum(sum(response.mask) for slot in share for response in responses[slot]),
             micro_batches(share, batch, responses, advantages, pair, args)) for share in shares]


def options(limit: int = 100_000, kl: float = 0.1, updates: int = 1):
    return parse_args("", ["--model", "tiny", "--kl", str(kl), "--updates", str(updates), "--grad-clip", "1e9",
                           "--tokens-per-microbatch", str(limit)])


def run(path: Path, reference_path: Path, mesh=None, prompts: int = 5, group: int = 4, silent=(), checkpointing: bool = False,
        **changes) -> dict:
    """One case. Returns every rank's metrics, the gradient of each update, and for every rank and micro-batch the
    number of its prompts."""
    args = options(**changes)
    policy = policies.load(path, CPU, mesh, gradient_checkpointing=checkpointing)
    reference = policies.load(reference_path, CPU, mesh).requires_grad_(False) if args.kl else None
    # Steps must be small, where there are several: rounding differences grow with each.
    optimizer = Recorder(policy.parameters(), lr=0.1, weight_decay=0.1)
    updates = updates_of(policy, args, *batch_of(prompts, group, silent))
    metrics = update(policy, reference, optimizer, updates, args, CPU)
    return {"metrics": rollout.gather([metrics]), "gradients": optimizer.gradients, "policy": policy,
            "dealt": rollout.gather([[[len(pieces) for pieces in mine] for _, mine in updates]])}


def main(out: Path, path: Path, reference: Path, *others: Path) -> None:
    """On a rank: all cases. Saves to `out` what each gives, and the weights of the policies, gathered; beside it a
    checkpoint."""
    rollout.join_ranks()
    mesh = policies.make_mesh(CPU)
    if others and (others[0] / "state").exists():  # a run of one rank: save it as a run of several
        policy = policies.load(path, CPU, mesh)
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        checkpoint.load(files.latest(others[0]), policy, optimizer)
        checkpoint.save(out, policy, optimizer, {"step": 4}, keep=1)
        return
    results = {"mesh": mesh.mesh.tolist(), "shards": {}, "weights": {}}
    for case, changes in CASES.items():
        results[case] = run(path, reference, mesh, **changes)
        policy = results[case].pop("policy")
    policies.save(policy, model.load_tokenizer(path), out.with_suffix(""), torch.float32)
    results["saved"] = dict(policies.full_weights(policy, torch.float32))
    for other in (path, *others):
        policy = policies.load(other, CPU, mesh)
        local = [p.to_local() for p in policy.parameters()]
        results["shards"][other] = rollout.gather([(sum(p.numel() for p in local), sum(p.untyped_storage().nbytes() for p in local))])
        results["weights"][other] = dict(policies.full_weights(policy, torch.float32))
    if rollout.RANK == 0:
        torch.save(results, out)
