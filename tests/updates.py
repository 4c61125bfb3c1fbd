"""Updates on fixed rollouts, for test_train.py: in its process, or on several ranks."""

from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

import policy as policies
import update
from infra import pretrained, ranks, run_directory
from infra import state as states
from infra.adapters import Base, Lora
from infra.prompts import Prompt
from rollout import Group, Response

CPU = torch.device("cpu")
# Five prompts of four responses in one update, all in one micro-batch, with a KL penalty, except:
CASES = {
    "whole": {},
    "split": {"limit": 100},
    "checkpointing": {"limit": 200, "checkpointing": True},
    "silent": {"kl": 0.0, "limit": 100, "silent": (0, 3)},
    "few": {"prompts": 1, "group": 1},
    "several": {"limit": 200, "updates": 5},
    "nothing": {"kl": 0.0, "silent": range(5)},
    "nothing first": {"kl": 0.0, "silent": (0, 1, 2), "updates": 2},
}


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it steps on: whole, whatever shards they are in."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.gradients = []

    def step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([full(p.grad).flatten() for p in parameters]))
        super().step()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def batch_of(prompts: int, group: int, silent=()) -> list[Group]:
    """Prompts and responses of very different lengths. silent: prompts with advantages of 0."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for slot in range(prompts):
        ids = torch.randint(3, 1024, (20 + 30 * slot,), generator=generator).tolist()
        responses = []
        for g in range(group):
            tokens = torch.randint(3, 1024, (1 + 5 * slot + 7 * g,), generator=generator).tolist()
            logp = [-6.9 - 0.3 * (i % 3) for i in range(len(tokens))]
            mask = [int(i % 5 != 4) for i in range(len(tokens))]
            responses.append(Response(tokens, logp, mask, "stop", ""))
        groups.append(Group(Prompt(ids, None), [], responses, torch.zeros(group, 0)))
    advantages = torch.randn(prompts, group, generator=generator)
    advantages[list(silent)] = 0.0
    for made, row in zip(groups, advantages, strict=True):
        made.advantages = row
    return groups


def run(
    path: Path,
    reference_path: Path,
    mesh=None,
    prompts: int = 5,
    group: int = 4,
    silent=(),
    checkpointing: bool = False,
    limit: int = 100_000,
    kl: float = 0.1,
    updates: int = 1,
    lora: Lora | None = None,
) -> dict:
    """Runs one case. Returns every rank's metrics, the gradient of each update, the policy, and how
    many prompts each micro-batch of a rank has."""
    policy = policies.load(path, CPU, mesh, lora=lora)
    if checkpointing:
        policy.recompute("on", 0)
    reference = None
    if kl and lora:
        reference = Base(policy)
    elif kl:
        reference = policies.load(reference_path, CPU, mesh).requires_grad_(False)
    # Steps must be small where there are several: rounding differences grow with each.
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = Recorder(trained, lr=0.1, weight_decay=0.1)
    learner = update.Learner(policy, reference, optimizer, CPU)
    prompts_dealt, deal = [], update.deal  # prompts_dealt: of each update, of each micro-batch

    def noting(*args):
        plan = deal(*args)
        prompts_dealt.append([len(batch) for batch in plan[ranks.RANK]])
        return plan

    batch = batch_of(prompts, group, silent)
    with (
        mock.patch.object(update, "GRAD_CLIP", 1e9),
        mock.patch.object(update, "deal", noting),
    ):
        metrics = update.update(learner, batch, updates, kl, 1.0, limit)
    return {
        "metrics": ranks.gather([metrics]),
        "gradients": optimizer.gradients,
        "policy": policy,
        "dealt": ranks.gather([prompts_dealt]),
    }


def main(out: Path, path: Path, reference: Path, *others: Path) -> None:
    """On a rank: runs all cases. Saves to `out` what each gives and the gathered weights of the
    policies, and beside it a checkpoint."""
    ranks.join()
    mesh = policies.make_mesh(CPU)
    if others and (others[0] / "state").exists():  # a run of one rank: save it as a run of several
        policy = policies.load(path, CPU, mesh)
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        state = states.load(run_directory.latest(others[0]), policy, optimizer)
        state.step = 4
        states.save(out, policy, optimizer, state)
        return
    results = {"mesh": mesh.mesh.tolist(), "shards": {}, "weights": {}}
    for case, changes in CASES.items():
        results[case] = run(path, reference, mesh, **changes)
        policy = results[case].pop("policy")
    policies.save_policy(
        policy, pretrained.load_tokenizer(path), torch.float32, out.with_suffix("")
    )
    results["saved"] = dict(policies.full_weights(policy, torch.float32))
    for other in (path, *others):
        policy = policies.load(other, CPU, mesh)
        local = [p.to_local() for p in policy.parameters()]
        results["shards"][other] = ranks.gather(
            [(sum(p.numel() for p in local), sum(p.untyped_storage().nbytes() for p in local))]
        )
        results["weights"][other] = dict(policies.full_weights(policy, torch.float32))
    if ranks.RANK == 0:
        torch.save(results, out)
