"""Run by test_train.py under torchrun: one update on this rank's share of fixed rollouts. Saves the gradient, and what
`update` reports. Usage: ranks.py OUT TOKENS_PER_MICROBATCH UPDATES"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import model
import train
from rollout import Response

out, limit, updates = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if train.WORLD > 1:
    dist.init_process_group("gloo")
path = model.resolve("tiny")
device = torch.device("cpu")
policy, reference = model.load(path, device), model.load(path, device)
generator = torch.Generator().manual_seed(0)
for parameter in reference.parameters():
    parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
before = [parameter.detach().clone() for parameter in policy.parameters()]

rows = []
for slot in range(5):  # five prompts on two ranks, of very different lengths
    prompt = torch.randint(3, 1024, (20 + 30 * slot,), generator=generator).tolist()
    responses = []
    for g in range(4):
        tokens = torch.randint(3, 1024, (1 + 5 * slot + 7 * g,), generator=generator).tolist()
        logp = [-6.9 - 0.3 * (i % 3) for i in range(len(tokens))]
        responses.append(Response(tokens, logp, [int(i % 5 != 4) for i in range(len(tokens))], "stop", ""))
    advantages = torch.randn(4, generator=generator)
    if slot % train.WORLD == train.RANK:
        for some in train.forward_rows(prompt, responses, limit):
            rows.append({"update": slot * updates // 5, "prompt": prompt, "responses": [responses[g] for g in some],
                         "advantages": advantages[some]})

args = train.parse_args("", ["--model", "tiny", "--kl", "0.1", "--updates", str(updates), "--grad-clip", "1e9"])
# One step of 1 is the gradient. Several must be small: rounding differences grow with each.
optimizer = torch.optim.SGD(policy.parameters(), lr=1.0 if updates == 1 else 0.1)
metrics = train.update(policy, reference, optimizer, rows, args, device)
if train.RANK == 0:
    gradient = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, policy.parameters(), strict=True)])
    torch.save({"gradient": gradient, "metrics": metrics}, out)
if train.WORLD > 1:
    dist.destroy_process_group()
