"""Which model fits which GPUs, and how long the paper's tool run takes: experiments/fits.md.

    python experiments/fits.py                        # half an hour on a CPU
    python experiments/fits.py --gpu H100 --gpus 8    # some of its lines

Memory is simulated by tools/simulate.py, with what it assumes for CUDA and vLLM. Seconds come from
experiments/roofline.py, and from the bytes that the simulation sends. Nothing here is measured.
"""
# ruff: noqa: E402

import argparse
import sys

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="", help="one of RTX 4090, L40S, H100 (default all)")
    parser.add_argument("--gpus", type=int, default=0, help="of the machine (default 1 and 8)")
    OPTIONS = parser.parse_args()

import itertools
import json
import math
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a script sees its own folder only

from experiments.cost import RESPONSE, REST
from experiments.files import read
from experiments.lengths import LENGTHS
from experiments.roofline import (
    GPU_BYTES,
    MFU,
    PAUSE,
    PREFILL_MFU,
    SHARE,
    needed,
    operations,
    parameters,
    sample_seconds,
)
from tools.simulate import ENGINE, GIB, OUTSIDE, USABLE

RANK = 16  # of LoRA's adapters
SIZES = "0.5B", "1.5B", "3B", "7B", "14B"
SHARES = 0.4, 0.5, 0.6  # --gpu-memory: the first that leaves vLLM enough room
BUDGETS = 8192, 4096, 2048  # --tokens-per-microbatch: the first that fits
TRAIN = read("tools")["train"]
PROMPT, RESPONSE_TOKENS, GROUP = LENGTHS["rlla"].prompt, RESPONSE["rlla"], TRAIN["group"]


class Machine(NamedTuple):
    """Equal GPUs. Rates are those of the data sheets; that of the link is assumed."""

    gpu: str
    memory: float  # GiB that torch reports
    flops: float  # dense bfloat16
    bandwidth: float  # of its memory
    link: float  # bytes a second between two GPUs, in a collective
    gpus: int = 1

    def decode(self, steps: float, read: float) -> float:
        """As roofline.Machine has it."""
        return steps * PAUSE + read / (SHARE * self.bandwidth)

    def prefill(self, size: str, tokens: float) -> float:
        matrices, _, _ = parameters(size)
        return 2 * matrices * tokens / (PREFILL_MFU * self.flops)


MACHINES = (
    Machine("RTX 4090", 23.6, 165e12, 1.01e12, 10e9),
    Machine("L40S", 44.4, 362e12, 0.86e12, 10e9),
    Machine("H100", 79.1, 989e12, 3.35e12, 300e9),
)


def simulate(size: str, machine: Machine, budget: int, rank: int) -> dict:
    """tools/simulate.py in a process of its own, for it changes torch."""
    options = {
        "size": size,
        "gpus": machine.gpus,
        "memory": machine.memory,
        "prompt": round(PROMPT),
        "group": GROUP,
        "response": RESPONSE_TOKENS,
        "tokens-per-microbatch": budget,
        "lora": rank,
    }
    command = [sys.executable, str(ROOT / "tools/simulate.py"), "--json"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return json.loads(subprocess.check_output(command))


def share_of_vllm(simulated: dict, memory: float) -> float:
    """--gpu-memory that holds all that vLLM needs; 1 if none does."""
    vllm = simulated["vllm_weights_gib"] + simulated["vllm_cache_gib"] + ENGINE
    return next((share for share in SHARES if vllm <= share * memory), 1.0)


def fit(size: str, machine: Machine, rank: int) -> tuple[int, float, dict] | None:
    """(tokens of a micro-batch, share of vLLM, the simulation); None if the model does not fit.

    rank: of LoRA; 0: all weights are trained."""
    _, _, total = parameters(size)
    usable = USABLE * machine.memory
    held = 2 if rank else 12  # bytes a parameter: bf16; or fp32 with AdamW's moments
    if OUTSIDE + held * total / machine.gpus / GIB > usable:
        return None
    for budget in BUDGETS:
        simulated = simulate(size, machine, budget, rank)
        held = OUTSIDE + simulated["held_gib"]
        share = share_of_vllm(simulated, machine.memory)
        pushing = held + simulated["vllm_weights_gib"] + simulated["push_gib"]
        if max(held + share * machine.memory, pushing) > usable:
            return None  # a smaller micro-batch does not help
        if OUTSIDE + simulated["peak_gib"] <= usable:
            return budget, share, simulated
    return None


def seconds(
    size: str, machine: Machine, rank: int, budget: int, share: float, simulated: dict
) -> list[float]:
    """Of a step of the tool run: update, transfers between GPUs, sampling, all with the rest."""
    prompts, updates = TRAIN["prompts"], TRAIN["updates"]
    layers, head = needed(size, PROMPT, RESPONSE_TOKENS, GROUP, prompts)
    total = operations(layers, head, updates, simulated["recomputes"], lora=rank)
    updating = total / (MFU * machine.flops * machine.gpus)

    at_once = budget // round(PROMPT + GROUP * (RESPONSE_TOKENS - 1))  # prompts of a micro-batch
    micro_batches = updates * math.ceil(prompts / updates / machine.gpus / at_once)
    sent = simulated.get("collectives_gib", {})  # of two micro-batches, without old log-probs
    gathered = sent.get("allgather_base", 0.0) * (1 + (1 - 1 / updates) / 2)
    reduced = sent.get("reduce_scatter_base", 0.0)
    others = 1 - 1 / machine.gpus  # the share that is not on this GPU already
    sending = micro_batches / 2 * (gathered + reduced) * GIB * others / machine.link

    lengths = PROMPT, RESPONSE_TOKENS, TRAIN["max_tokens"]
    memory = share * machine.memory * GIB / GPU_BYTES  # roofline's GPU has 80 GB
    sampling = sample_seconds(size, prompts, GROUP, lengths, memory, machine)
    return [updating, sending, sampling, (1 + REST) * (updating + sending + sampling)]


def line(size: str, machine: Machine, rank: int) -> list[str] | None:
    found = fit(size, machine, rank)
    if found is None:
        return None
    budget, share, simulated = found
    sampling = OUTSIDE + simulated["held_gib"] + share * machine.memory
    options = []
    if share != SHARES[0]:
        options.append(f"`--gpu-memory {share}`")
    if budget != BUDGETS[0]:
        options.append(f"`--tokens-per-microbatch {budget}`")
    if rank:
        options.insert(0, f"`--lora {rank}`")
    times = seconds(size, machine, rank, *found)
    return [
        f"{machine.gpus} x {machine.gpu}",
        size,
        f"{sampling:.0f} / {OUTSIDE + simulated['peak_gib']:.0f} of {machine.memory:.0f}",
        ", ".join(options),
        *(f"{x:.0f}" for x in times),
        f"{TRAIN['steps'] * times[-1] / 3600:.1f}",
    ]


if __name__ == "__main__":
    print(
        "| GPUs | Qwen2.5 | GiB while sampling / at the update's peak | options "
        "| update, s | transfers, s | sampling, s | step, s | 100 steps, hours |\n"
        + "|---" * 9
        + "|"
    )
    for machine in MACHINES:
        for gpus in (1, 8):
            if OPTIONS.gpu in ("", machine.gpu) and OPTIONS.gpus in (0, gpus):
                for size, rank in itertools.product(SIZES, (0, RANK)):
                    cells = line(size, machine._replace(gpus=gpus), rank)
                    if cells:
                        print("| " + " | ".join(cells) + " |", flush=True)
