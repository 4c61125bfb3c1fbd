"""One step of the trainer at true size on GPUs that are not there: what it holds, launches, waits for, sends, computes.

    python tools/simulate.py --size 7B --gpus 8   # half a minute; --json: one line, in bytes and operations
    python tools/simulate.py --table              # docs/gpu.md's table: what fits on GPUs of 80 GB

policy.load, update.update with its optimizer steps and policy.full_weights run as they are, as rank 0 of a process group
whose collectives do nothing. The GPU's tensors are fake: shape, dtype and device without numbers. The host's are real.
Bytes are those of tensors. Not simulated: times, and what CUDA, NCCL and vLLM take beside them (constants below).
"""
# ruff: noqa: E402

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a script sees its own folder only
GPU_MEMORY, USABLE = (
    79.1,
    0.95,
)  # GiB of an 80 GB card, and the share of it that is not lost to fragments
OUTSIDE = 4.0  # GiB of CUDA's context, NCCL's buffers, and what a sleeping vLLM keeps (CUDA graphs)
ENGINE, ROOM = (
    3.5,
    32 * 1024,
)  # of vLLM's share: GiB beside weights and KV cache; tokens that the KV cache must take
OPTIONS = (  # name, default, help
    ("size", "7B", "Qwen2.5 0.5B, 1.5B, 3B, 7B, 14B; tiny, tiny-untied"),
    ("gpus", 8, "of a node"),
    ("nodes", 1, "of GPUs"),
    ("memory", GPU_MEMORY, "GiB of a GPU"),
    ("gradient-checkpointing", "auto", "on, off, auto"),
    ("updates", 1, "optimizer steps a batch"),
    ("kl", 0.0, "above 0 there is a reference"),
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

import policy as policies
import update
from infra import pretrained
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
        methods = {
            "get_shape": lambda _: [*saved.shape],
            "get_dtype": lambda _: "BF16",
            "__getitem__": lambda _, rows: saved[rows],
        }
        return type("Slice", (), methods)()


def simulate(args: argparse.Namespace) -> dict:
    """What happens on rank 0 in an update and a push: name -> a number, or numbers by kind, phase or line of code."""
    config, budget, R, G = qwen(args.size), args.tokens_per_microbatch, args.response, args.group
    gpu, device = (
        GPU(lm := skeleton(config), [update.update, update.add_gradients, update.old_logps_of]),
        torch.device("gpu", 0),
    )
    policies.compute_dtype = lambda _: torch.bfloat16
    pretrained.safe_open = lambda *_: Weights(lm.named_parameters())
    torch.cuda.get_device_properties = lambda: argparse.Namespace(total_memory=args.memory * GIB)
    update.check_signals = lambda: None  # the host's alone, and of all ranks
    dist.init_process_group("cpu:fake,gpu:fake", rank=0, world_size=WORLD, store=FakeStore())
    prompts = (
        args.prompts or 2 * max(1, budget // (args.prompt + G * (R - 1))) * WORLD * args.updates
    )
    response = Response([6] * R, [-1.0] * R, [1] * R, "stop", "")
    groups = [
        Group(
            Prompt([5] * args.prompt, None),
            [],
            [response] * G,
            torch.zeros(G, 0),
            torch.linspace(-1, 1, G),
        )
        for _ in range(prompts)
    ]
    with tempfile.TemporaryDirectory() as folder, gpu:
        path, mesh = Path(folder), policies.make_mesh(device)
        config.save_pretrained(path)
        (path / "model.safetensors").touch()
        policy, reference = policies.load(path, device, mesh), None
        gpu.name("weights", policy.parameters())
        policy.recompute(args.gradient_checkpointing, budget)
        if args.kl:
            reference = policies.load(path, device, mesh, torch.bfloat16, trained=False)
            gpu.name("reference", reference.parameters())
        learner = update.Learner(policy, reference, update.make_optimizer(policy, 1e-6), device)
        learner.optimizer.register_step_pre_hook(
            lambda *_: gpu.name("gradients", [parameter.grad for parameter in policy.parameters()])
        )
        for _ in range(
            2
        ):  # of which the second counts: the first fills DTensor's caches, with whole tensors
            gpu.reset()
            update.update(learner, groups, args.updates, args.kl, 1.0, budget)
            gpu.name(
                "AdamW", [x for state in learner.optimizer.state.values() for x in state.values()]
            )
        counts, peak, gpu.phase = gpu.counts, gpu.by_kind(gpu.peaked), "push"
        gpu.reset()
        held = gpu.by_kind(gpu.events)
        pushed = {
            name: weight.shape for name, weight in policies.full_weights(policy, torch.bfloat16)
        }
    counts["launches"] |= gpu.counts["launches"]
    own = {name: parameter.shape for name, parameter in lm.named_parameters(remove_duplicate=False)}
    needed = needed_flops(config, args.prompt, R, G, prompts) / WORLD
    cache = (
        4
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.hidden_size
        / config.num_attention_heads
    )
    return {
        "held_gib": sum(held.values()),
        "held_parts_gib": held,
        "peak_gib": sum(peak.values()),
        "peak_parts_gib": peak,
        "push_gib": gpu.peak / GIB - sum(held.values()),
        **counts,
        "tflop_needed": needed / 1e12,
        "recomputes": int(policy.lm.is_gradient_checkpointing),
        "pushed": len(pushed),
        "not_pushed": [name for name in own if pushed.get(name) != own[name]],
        "vllm_weights_gib": 2 * sum(shape.numel() for shape in pushed.values()) / GIB,
        "vllm_cache_gib": ROOM * cache / GIB,
    }


def show(result: dict) -> None:
    def text(x) -> str:
        return (
            f"{x:,.2f}"
            if isinstance(x, float)
            else f"{x:,}"
            if isinstance(x, int)
            else ", ".join(x) or "none"
        )

    for name, value in result.items():
        parts = value if isinstance(value, dict) else {}
        total = text(sum(parts.values()) if parts else value)
        name = (
            name.replace("_", " ")
            .replace("gib", "GiB")
            .replace("tflop", "TFLOP")
            .replace("vllm", "vLLM")
        )
        print(
            f"{name:25}{total:>10}   " + ", ".join(f"{part} {text(x)}" for part, x in parts.items())
        )


def cell(size: str, gpus: int, **shape: int) -> str:
    """GiB while sampling / at the update's peak, by update.py's defaults, with more for a vLLM that needs it. shape:
    other options of this program."""
    command = [
        sys.executable,
        __file__,
        "--json",
        "--size",
        size,
        "--gpus",
        str(gpus),
        *(word for name, value in shape.items() for word in (f"--{name}", str(value))),
    ]
    result = json.loads(subprocess.check_output(command))
    held, weights = OUTSIDE + result["held_gib"], result["vllm_weights_gib"]
    share = next(
        (
            x
            for x in (0.4, 0.5, 0.6)
            if weights + result["vllm_cache_gib"] + ENGINE <= x * GPU_MEMORY
        ),
        1.0,
    )
    sampling, updating = held + share * GPU_MEMORY, OUTSIDE + result["peak_gib"]
    if max(sampling, updating, held + weights + result["push_gib"]) > USABLE * GPU_MEMORY:
        return "does not fit"
    return (
        f"{sampling:.0f} / {updating:.0f}"
        + ", gc" * result["recomputes"]
        + f", `--gpu-memory {share}`" * (share != 0.4)
    )


if __name__ == "__main__":
    if ARGS.table:
        print("| | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |\n|---|---|---|---|---|")
        for size in ("0.5B", "1.5B", "3B", "7B", "14B"):
            print(
                f"| {size} | " + " | ".join(cell(size, gpus) for gpus in (1, 2, 4, 8)) + " |",
                flush=True,
            )
    elif ARGS.json:
        print(json.dumps(simulate(ARGS)))
    else:
        show(simulate(ARGS))
