"""What a run needs of each GPU's memory, estimated before anything is loaded.

    python memory.py      # README's table: Qwen2.5 on 1 to 8 GPUs of 80 GB

An estimate: weights, gradients and optimizer states are exact, activations by a rule that counting what autograd saves
confirms to 15% (tests/test_memory.py), the rest rules of thumb that stand beside the numbers. None has been measured on
a GPU.
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from policy import LOGITS
from rewards import InputError
from rollout import LOCAL_RANK, LOCAL_WORLD, RANK, kv_elements

GIB = 2**30
USABLE = 0.95  # of a GPU; the rest is lost to fragments
CONTEXT = 2.0  # GiB: CUDA's and NCCL's own, and what a sleeping vLLM keeps (CUDA graphs, workspaces)
QWEN = {  # Qwen2.5: layers, hidden, heads, key-value heads, intermediate, vocabulary, tied embeddings
    "1.5B": (28, 1536, 12, 2, 8960, 151936, True), "3B": (36, 2048, 16, 2, 11008, 151936, True),
    "7B": (28, 3584, 28, 4, 18944, 152064, False), "14B": (48, 5120, 40, 8, 13824, 152064, False)}


def qwen(size: str) -> Qwen2Config:
    layers, hidden, heads, kv_heads, intermediate, vocabulary, tied = QWEN[size]
    return Qwen2Config(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocabulary,
                       tie_word_embeddings=tied, max_position_embeddings=32768)


def count(config) -> tuple[int, int]:
    """Parameters of the whole model, and of one decoder layer."""
    with init_empty_weights():
        lm = AutoModelForCausalLM.from_config(config)
    lm.tie_weights()
    return tuple(sum(p.numel() for p in part.parameters()) for part in (lm, lm.base_model.layers[0]))


def layer_activations(config) -> int:
    """Bytes a token that a decoder layer saves for the backward pass in bfloat16: around the two norms (in float32) and
    attention 34 times the hidden size, in the MLP four numbers of its width."""
    return 34 * config.hidden_size + 8 * config.intermediate_size


def estimate(config, gpu: float, shards: int, tp: int, share: float, tokens: int, longest: int, reference: bool,
             checkpointing: bool) -> dict[str, float]:
    """GiB on one GPU of `gpu` GiB. config: a transformers config. shards: GPUs over which the policy is sharded. share:
    vLLM's of the GPU, 0 without it. tokens: of the largest micro-batch. longest: prompt and response."""
    n, layer = count(config)
    rest = n - layer * config.num_hidden_layers  # embeddings, last norm, output head
    saved = layer_activations(config)
    layers = config.num_hidden_layers
    plan = {
        "weights": 4 * n / shards, "AdamW": 8 * n / shards, "gradients": 4 * n / shards,
        "reference": 2 * n / shards if reference else 0.0,
        # bfloat16: the layer at work, the next one, its gradient and the float32 copy that is reduced; embeddings and
        # output head stay gathered, and their gradient likewise
        "gathered": (2 + 2 + 2 + 4) * layer + (2 + 2 + 4) * rest,
        "activations": tokens * (2 * config.hidden_size * layers + saved if checkpointing else saved * layers),
        "logits": 12 * LOGITS * config.vocab_size,  # bfloat16 and float32, with their gradients
        "engine weights": 2 * n / tp, "one response": 2 * kv_elements(config) * longest / tp,
    }
    plan = {name: size / GIB for name, size in plan.items()}
    plan["engine"] = share * gpu if share else plan["engine weights"] + CONTEXT  # transformers' generate: a guess
    held = plan["weights"] + plan["AdamW"] + plan["reference"] + CONTEXT
    plan["while sampling"] = held + plan["engine"]
    plan["while updating"] = held + sum(plan[x] for x in ("gradients", "gathered", "activations", "logits"))
    plan["KV cache"] = share * gpu - plan["engine weights"] - 2 if share else math.inf  # 2 GiB: vLLM's activations
    return plan


def problem(plan: dict[str, float], gpu: float, checkpointing: bool) -> str | None:
    """Why it cannot fit, and what would help; None if it can."""
    if plan["KV cache"] < plan["one response"]:
        return (f"vLLM's share of {plan['engine']:.0f} GiB has no room for {plan['engine weights']:.0f} GiB of weights "
                "and a KV cache: raise --gpu-memory, or spread the engine over more GPUs with --tp")
    if plan["while sampling"] > USABLE * gpu:
        return "sampling needs more than there is: lower --gpu-memory, or use more GPUs"
    if plan["while updating"] > USABLE * gpu:
        held = plan["while updating"] - plan["activations"]
        return ("the update needs more than there is: " + (
            "use more GPUs" if held > USABLE * gpu or (checkpointing and plan["activations"] < 0.2 * gpu) else
            "lower --tokens-per-microbatch" + ("" if checkpointing else ", or leave out --gradient-checkpointing off")))
    return None


def choose(gradient_checkpointing: str, *sizes, gpu: float) -> tuple[bool, dict[str, float], str | None]:
    """(recompute activations?, the plan, what is wrong with it): `auto` recomputes only if it must, for it costs
    another forward."""
    for checkpointing in {"auto": (False, True), "on": (True,), "off": (False,)}[gradient_checkpointing]:
        plan = estimate(*sizes, checkpointing)
        wrong = problem(plan, gpu, checkpointing)
        if wrong is None:
            break
    return checkpointing, plan, wrong


def check(args: argparse.Namespace, path: Path, longest: int) -> bool:
    """Prints the plan and returns whether activations are recomputed. Raises InputError if the run cannot fit. On a CPU
    there is no plan, and recomputing only where it is asked for."""
    if not torch.cuda.is_available():
        return args.gradient_checkpointing == "on"
    gpu = torch.cuda.get_device_properties(LOCAL_RANK).total_memory / GIB
    checkpointing, plan, wrong = choose(
        args.gradient_checkpointing, AutoConfig.from_pretrained(path), gpu, LOCAL_WORLD, args.tp,
        args.gpu_memory if args.engine == "vllm" else 0.0, max(args.tokens_per_microbatch, longest), longest,
        args.kl > 0, gpu=gpu)
    if RANK == 0:
        print(f"memory of each GPU, estimated, of {gpu:.0f} GiB: "
              + ", ".join(f"{name} {size:.1f}" for name, size in plan.items() if 0 < size < math.inf)
              + f"; gradient checkpointing {'on' if checkpointing else 'off'}", flush=True)
    if wrong:
        raise InputError(f"{args.model} does not fit {LOCAL_WORLD} GPUs of {gpu:.0f} GiB, by estimate: {wrong}")
    return checkpointing


if __name__ == "__main__":
    print("| | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |\n|---|---|---|---|---|")
    for name in QWEN:
        cells = []
        for gpus in (1, 2, 4, 8):
            for tp, share in ((1, 0.4), (1, 0.5), (2, 0.4)):
                checkpointing, plan, wrong = choose("auto", qwen(name), 79.1, gpus, tp, share, 16384, 4096, False,
                                                    gpu=79.1)
                if wrong is None or tp == gpus:
                    break
            cells.append("does not fit" if wrong else
                         f"{plan['while sampling']:.0f} / {plan['while updating']:.0f}" + ", gc" * checkpointing
                         + (f", `--gpu-memory {share}`" if share != 0.4 else "") + (f", `--tp {tp}`" if tp > 1 else ""))
        print(f"| {name} | " + " | ".join(cells) + " |")
