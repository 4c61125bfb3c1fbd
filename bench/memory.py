"""What training needs of each GPU's memory, estimated: Qwen2.5 on 1 to 8 GPUs of 80 GB.

    python bench/memory.py      # docs/gpu.md's table: GiB while sampling / while updating

A cell without gc is of --gradient-checkpointing off, which saves a forward. gc: activations must be computed again in
the backward pass, the default on GPUs.

Weights, gradients and optimizer states are exact, activations by a rule that counting what autograd saves confirms to
15% (tests/test_memory.py), the rest rules of thumb that stand beside the numbers. Nothing has been measured on a GPU.
Left out are the copies of a prompt's keys and values that attention makes for each response: they count where many
short responses share a long prompt. vLLM's own needs beside weights and KV cache may be larger.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from local.models import QWEN, qwen
from policy import LOGITS

GIB = 2**30
USABLE = 0.95  # of a GPU; the rest is lost to fragments
CONTEXT = 2.0  # GiB: CUDA's and NCCL's own, and what a sleeping vLLM keeps (CUDA graphs, workspaces)


class Setting(NamedTuple):
    """All that a run's memory depends on beside the model."""

    gpus: int = 8  # over which the policy is sharded
    share: float = 0.4  # of a GPU that is vLLM's
    checkpointing: bool = False  # activations are computed again in the backward pass
    tokens: int = 16384  # of the largest micro-batch
    longest: int = 4096  # prompt and response
    gpu: float = 79.1  # GiB


def kv_elements(config) -> int:
    """Numbers that the KV cache holds for one token, over all layers. config: a transformers config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim


def count(config) -> tuple[int, int]:
    """Parameters of the whole model, and of one decoder layer. config: a transformers config."""
    with init_empty_weights():
        lm = AutoModelForCausalLM.from_config(config)
    lm.tie_weights()
    return tuple(sum(p.numel() for p in part.parameters()) for part in (lm, lm.base_model.layers[0]))


def layer_activations(config) -> int:
    """Bytes a token that a decoder layer saves for the backward pass in bfloat16: around the two norms (in float32) and
    attention 34 times the hidden size, in the MLP four numbers of its width."""
    return 34 * config.hidden_size + 8 * config.intermediate_size


def estimate(config, parameters: tuple[int, int], setting: Setting) -> dict[str, float]:
    """GiB on one GPU. parameters: see `count`."""
    (n, layer), (gpus, share, checkpointing, tokens, longest, gpu) = parameters, setting
    layers, saved = config.num_hidden_layers, layer_activations(config)
    rest = n - layer * layers  # embeddings, last norm, output head
    plan = {
        "weights": 4 * n / gpus, "AdamW": 8 * n / gpus, "gradients": 4 * n / gpus,
        # bfloat16: the layer at work, the next one, its gradient and the float32 copy that is reduced; embeddings and
        # output head stay gathered, and their gradient likewise
        "gathered": (2 + 2 + 2 + 4) * layer + (2 + 2 + 4) * rest,
        "activations": tokens * (2 * config.hidden_size * layers + saved if checkpointing else saved * layers),
        "logits": 12 * LOGITS * config.vocab_size,  # bfloat16 and float32, with their gradients
        "engine weights": 2 * n, "one response": 2 * kv_elements(config) * longest,
    }
    plan = {name: size / GIB for name, size in plan.items()}
    held = plan["weights"] + plan["AdamW"] + CONTEXT
    plan["while sampling"] = held + share * gpu
    plan["while updating"] = held + sum(plan[x] for x in ("gradients", "gathered", "activations", "logits"))
    plan["KV cache"] = share * gpu - plan["engine weights"] - 2  # 2 GiB: vLLM's activations
    return plan


def fits(plan: dict[str, float], gpu: float) -> bool:
    return (plan["KV cache"] >= plan["one response"]
            and max(plan["while sampling"], plan["while updating"]) <= USABLE * gpu)


def cell(size: str, gpus: int) -> str:
    """GiB while sampling / while updating, and with what it fits."""
    config = qwen(size)
    parameters = count(config)
    for share in (0.4, 0.5):
        for checkpointing in (False, True):
            setting = Setting(gpus, share, checkpointing)
            plan = estimate(config, parameters, setting)
            if fits(plan, setting.gpu):
                return (f"{plan['while sampling']:.0f} / {plan['while updating']:.0f}" + ", gc" * checkpointing
                        + f", `--gpu-memory {share}`" * (share != 0.4))
    return "does not fit"


if __name__ == "__main__":
    print("| | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |\n|---|---|---|---|---|")
    for size in QWEN:
        print(f"| {size} | " + " | ".join(cell(size, gpus) for gpus in (1, 2, 4, 8)) + " |")
