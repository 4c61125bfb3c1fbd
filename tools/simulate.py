"""One step of the trainer at true size on GPUs that are not there: what it holds, sends, computes.

    python tools/simulate.py --size 7B --gpus 8   # half a minute; --json: one line
    python tools/simulate.py --table              # docs/gpu.md's table: what fits in 80 GB

policy.load, update.update with its optimizer steps and policy.full_weights run as they are, as rank
0 of a process group whose collectives do nothing. The GPU's tensors are fake: shape, dtype and
device without numbers. The host's are real. Bytes are those of tensors. Not simulated: times, and
what CUDA, NCCL and vLLM take beside them (constants below).
"""
# ruff: noqa: E402

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a script sees its own folder only
GPU_MEMORY = 79.1  # GiB of an 80 GB card
USABLE = 0.95  # the share of it that is not lost to fragments
OUTSIDE = 4.0  # GiB of CUDA's context, NCCL's buffers, and what a sleeping vLLM keeps (CUDA graphs)
ENGINE = 3.5  # GiB of vLLM's share beside weights and KV cache
ROOM = 32 * 1024  # tokens that the KV cache must take
OPTIONS = (  # name, default, help
    ("size", "7B", "Qwen2.5 0.5B, 1.5B, 3B, 7B, 14B; tiny, tiny-untied"),
    ("model", "", "a directory with a config.json, instead of --size"),
    ("dtype", "bfloat16", "of what is computed; float32 is a CPU's"),
    ("gpus", 8, "of a node"),
    ("nodes", 1, "of GPUs"),
    ("memory", GPU_MEMORY, "GiB of a GPU"),
    ("gradient-checkpointing", "auto", "on, off, auto"),
    ("updates", 1, "optimizer steps a batch"),
    ("kl", 0.0, "above 0 there is a reference"),
    ("lora", 0, "rank of adapters that are trained instead of all weights; 0: all"),
    ("prompt", 1024, "P, its tokens"),
    ("group", 12, "G, responses to it"),
    ("response", 257, "R, tokens of each"),
    ("tokens-per-microbatch", 8192, "at most"),
    ("prompts", 0, "a step, over all GPUs; 0: two micro-batches for each GPU and update"),
)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in OPTIONS:
        parser.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            help=f"{text} (default {default})",
            choices=("on", "off", "auto") if default == "auto" else None,
        )
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument(
        "--table", action="store_true", help="every size on 1 to 8 GPUs: ten minutes"
    )
    return parser.parse_args()


if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    ARGS = options()
    # As torchrun sets them for ranks.py.
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(ARGS.gpus),
        "WORLD_SIZE": str(ARGS.gpus * ARGS.nodes),
        "MASTER_ADDR": "",
        "MASTER_PORT": "",
    }

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

import policy as policies
import update
from infra import pretrained
from infra.adapters import Base, Lora
from infra.prompts import Prompt
from infra.ranks import WORLD
from local.models import qwen, skeleton
from rollout import Group, Response
from tools.fake_gpu import GIB, GPU
from tools.step import needed_flops


class Weights(dict):
    """A file of safetensors: name -> zeros in a parameter's shape, which take no room."""

    def get_slice(self, name: str):
        saved = torch.zeros((), dtype=torch.bfloat16).expand(self[name].shape)
        return Slice(saved)


class Slice:
    """What safetensors' get_slice returns."""

    def __init__(self, saved: torch.Tensor):
        self.saved = saved

    def get_shape(self) -> list[int]:
        return [*self.saved.shape]

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, rows) -> torch.Tensor:
        return self.saved[rows]


def simulate(args: argparse.Namespace) -> dict:
    """What happens on rank 0 in an update and a push.

    Returns {name: a number, or numbers by kind, phase or line of code}."""
    config = AutoConfig.from_pretrained(args.model) if args.model else qwen(args.size)
    lm = skeleton(config)
    entries = [update.update, update.add_gradients, update.old_logps_of]
    gpu, device = GPU(lm, entries), torch.device("gpu", 0)
    pretend(lm, args.memory, getattr(torch, args.dtype))
    groups = made_up_groups(args)
    with tempfile.TemporaryDirectory() as folder, gpu:
        path, mesh = Path(folder), policies.make_mesh(device)
        config.save_pretrained(path)
        (path / "model.safetensors").touch()
        policy, reference = load(args, path, device, mesh), None
        gpu.name("weights", policy.parameters())
        policy.recompute(args.gradient_checkpointing, args.tokens_per_microbatch)
        if args.kl and args.lora:
            reference = Base(policy)
        elif args.kl:
            reference = policies.load(path, device, mesh, torch.bfloat16, trained=False)
            gpu.name("reference", reference.parameters())
        learner = update.Learner(policy, reference, update.make_optimizer(policy, 1e-6), device)
        update_twice(gpu, learner, groups, args)
        counts, peak, gpu.phase = gpu.counts, gpu.by_kind(gpu.peaked), "push"
        gpu.reset()
        held = gpu.by_kind(gpu.events)
        pushed = shapes(policies.full_weights(policy, torch.bfloat16))
    counts["launches"] |= gpu.counts["launches"]
    needed = needed_flops(config, args.prompt, args.response, args.group, len(groups)) / WORLD
    head_width = config.hidden_size / config.num_attention_heads
    cache = 4 * config.num_hidden_layers * config.num_key_value_heads * head_width  # bytes a token
    own = shapes(lm.named_parameters(remove_duplicate=False))
    return {
        "held_gib": sum(held.values()),
        "held_parts_gib": held,
        "peak_gib": sum(peak.values()),
        "peak_parts_gib": peak,
        "push_gib": gpu.peak / GIB - sum(held.values()),
        **counts,
        # Frozen weights need no gradient, a third of the operations.
        "tflop_needed": needed / 1e12 * (2 / 3 if args.lora else 1),
        "recomputes": int(policy.lm.is_gradient_checkpointing),
        "pushed": len(pushed),
        "not_pushed": [name for name, shape in own.items() if pushed.get(name) != shape],
        "vllm_weights_gib": 2 * sum(shape.numel() for shape in pushed.values()) / GIB,
        "vllm_cache_gib": ROOM * cache / GIB,
    }


def load(args: argparse.Namespace, path: Path, device: torch.device, mesh) -> policies.Policy:
    if not args.lora:
        return policies.load(path, device, mesh)
    lora = Lora(args.lora, 2.0 * args.lora, 0, "")
    return policies.load(path, device, mesh, getattr(torch, args.dtype), lora=lora)


def pretend(lm, memory: float, dtype: torch.dtype) -> None:
    """What the policy asks of files, of CUDA and of other ranks."""
    policies.compute_dtype = lambda _: dtype
    pretrained.safe_open = lambda *_: Weights(lm.named_parameters())
    torch.cuda.get_device_properties = lambda: argparse.Namespace(total_memory=memory * GIB)
    update.check_signals = lambda: None  # the host's alone, and of all ranks
    dist.init_process_group("cpu:fake,gpu:fake", rank=0, world_size=WORLD, store=FakeStore())


def made_up_groups(args: argparse.Namespace) -> list[Group]:
    """--prompts groups; by default two micro-batches for each GPU and update."""
    prompts = args.prompts
    if not prompts:
        tokens = args.prompt + args.group * (args.response - 1)  # of a group
        prompts = 2 * max(1, args.tokens_per_microbatch // tokens) * WORLD * args.updates
    prompt = Prompt([5] * args.prompt, None)
    tokens, logp, mask = [6] * args.response, [-1.0] * args.response, [1] * args.response
    responses = [Response(tokens, logp, mask, "stop", "")] * args.group
    rewards, advantages = torch.zeros(args.group, 0), torch.linspace(-1, 1, args.group)
    return [Group(prompt, [], responses, rewards, advantages) for _ in range(prompts)]


def update_twice(gpu: GPU, learner: update.Learner, groups: list[Group], args) -> None:
    """The second update counts: the first fills DTensor's caches, with whole tensors."""

    def name_gradients(*_) -> None:
        (trained,) = learner.optimizer.param_groups
        gpu.name("gradients", [parameter.grad for parameter in trained["params"]])

    learner.optimizer.register_step_pre_hook(name_gradients)
    for _ in range(2):
        gpu.reset()
        update.update(learner, groups, args.updates, args.kl, 1.0, args.tokens_per_microbatch)
        for state in learner.optimizer.state.values():
            gpu.name("AdamW", state.values())


def shapes(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights}


def show(result: dict) -> None:
    """A line each number, with its parts."""
    units = {"_": " ", "gib": "GiB", "tflop": "TFLOP", "vllm": "vLLM"}
    for name, value in result.items():
        for written, said in units.items():
            name = name.replace(written, said)
        parts = ""
        if isinstance(value, dict):
            parts = ", ".join(f"{part} {as_text(number)}" for part, number in value.items())
            value = sum(value.values()) if value else value
        print(f"{name:25}{as_text(value):>10}   {parts}")


def as_text(value) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(value) or "none"


def cell(size: str, gpus: int, **shape: int) -> str:
    """GiB while sampling / at the update's peak, with more for a vLLM that needs it.

    By update.py's defaults. shape: other options of this program."""
    command = [sys.executable, __file__, "--json", "--size", size, "--gpus", str(gpus)]
    for name, value in shape.items():
        command += [f"--{name}", str(value)]
    result = json.loads(subprocess.check_output(command))
    held, weights = OUTSIDE + result["held_gib"], result["vllm_weights_gib"]
    engine = weights + result["vllm_cache_gib"] + ENGINE
    share = next((share for share in (0.4, 0.5, 0.6) if engine <= share * GPU_MEMORY), 1.0)
    sampling, updating = held + share * GPU_MEMORY, OUTSIDE + result["peak_gib"]
    if max(sampling, updating, held + weights + result["push_gib"]) > USABLE * GPU_MEMORY:
        return "does not fit"
    text = f"{sampling:.0f} / {updating:.0f}"
    if result["recomputes"]:
        text += ", gc"
    if share != 0.4:
        text += f", `--gpu-memory {share}`"
    return text


def print_table() -> None:
    print("| | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |\n|---|---|---|---|---|")
    for size in ("0.5B", "1.5B", "3B", "7B", "14B"):
        cells = [cell(size, gpus) for gpus in (1, 2, 4, 8)]
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    if ARGS.table:
        print_table()
    elif ARGS.json:
        print(json.dumps(simulate(ARGS)))
    else:
        show(simulate(ARGS))
