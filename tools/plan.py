"""train.py --plan: what a run would take, said before any weights are loaded.

Memory is simulated by tools/simulate.py, seconds come from experiments/roofline.py. Both are
computed, and the lines say so. Prompts, tokens, the rewards of a reference are those of the run.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig

from config import TrainConfig
from experiments import fits, roofline
from infra import adapters
from infra.pretrained import Pretrained
from infra.prompts import Prompt
from infra.ranks import RANK, WORLD, InputError
from infra.terminal import shown
from local.machine import cores
from local.models import skeleton
from local.shapes import QWEN
from rewards import Task
from tools.show import printable
from tools.simulate import GIB, OUTSIDE, USABLE

ROOT = Path(__file__).parent.parent
MODEL = "the model"  # its name among the shapes that roofline knows
CPU_OUTSIDE = 1.0  # GiB of Python and its libraries
CPU_SHARE = 0.5  # of the rate of a large product that training reaches; assumed


def show(
    config: TrainConfig,
    task: Task,
    known: Pretrained,
    train: list[Prompt],
    held_out: list[Prompt],
) -> None:
    """Prints the plan, from rank 0. Raises InputError for a machine that is not known."""
    if RANK > 0:
        return
    machine = find_machine(config.plan)
    QWEN[MODEL] = shape(known.path)
    counts = count_parameters(config, known.path)
    simulated = simulate(config, known.path, machine, train)
    first = train[0]
    chat = printable(" ".join(known.tokenizer.decode(first.ids).split()))
    lines = {
        "machine": f"{machine.gpus} x {machine.gpu}, {machine.memory:.0f} GiB each",
        "model": model(config, counts),
        "prompts": prompts(train, held_out),
        "the first": chat if len(chat) <= 300 else f"{chat[:150]} ... {chat[-150:]}",
        "rewards": rewards_of_reference(task, first),
        "a step": a_step(config, train),
        "memory": memory(config, machine, simulated),
        "time": run_time(config, machine, simulated, train),
        "disk": disk(config, known, counts),
    }
    for name, text in lines.items():
        print(f"{name:>10}  {text}")
    print("Memory, time and disk are computed. Nothing was loaded, nothing is kept.")


# The machine


def find_machine(wanted: str) -> fits.Machine:
    """here, or such as 8xH100. Raises InputError."""
    if wanted == "here":
        return gpus_here() if torch.cuda.is_available() else cpu_here()
    number, _, gpu = wanted.partition("x")
    for machine in fits.MACHINES:
        if machine.gpu.replace(" ", "").lower() == gpu.replace(" ", "").lower():
            return machine._replace(gpus=int(number))
    names = ", ".join(machine.gpu.replace(" ", "") for machine in fits.MACHINES)
    raise InputError(f"--plan {wanted}: must be here, or a number and one of {names}: 8xH100")


def gpus_here() -> fits.Machine:
    """This machine's GPUs, WORLD of them, with the rates of the most similar one that is known."""
    properties = torch.cuda.get_device_properties()
    memory = properties.total_memory / GIB
    names = [machine for machine in fits.MACHINES if machine.gpu in properties.name]
    closest = min(names or fits.MACHINES, key=lambda machine: abs(machine.memory - memory))
    gpu = properties.name
    if not names:
        gpu += f" (rates of {closest.gpu})"
    return closest._replace(gpu=gpu, memory=memory, gpus=WORLD)


def cpu_here() -> fits.Machine:
    """This machine's cores, with rates that are measured now, in a second."""
    a = torch.randn(1024, 1024)
    flops = 2 * 1024**3 / fastest(lambda: a @ a)
    block = torch.zeros(2**26)  # 256 MB
    bandwidth = 4 * 2**26 / fastest(block.sum)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # roofline counts weights in bfloat16. Here they are in float32, so half of them are read.
    return fits.Machine(
        f"CPU with {cores()} cores",
        memory / GIB,
        flops * CPU_SHARE / roofline.MFU,
        bandwidth / 2,
        bandwidth,
    )


def fastest(work) -> float:
    """Seconds of the fastest of ten."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def is_cpu(machine: fits.Machine) -> bool:
    return machine.gpu.startswith("CPU")


# The lines


class Counts(NamedTuple):
    total: int
    trained: int


def count_parameters(config: TrainConfig, path: Path) -> Counts:
    """Of the model without memory for its weights; with --lora its adapters are what is trained."""
    lm = skeleton(AutoConfig.from_pretrained(path))
    total = sum(parameter.numel() for parameter in lm.parameters())
    if not config.lora:
        return Counts(total, total)
    with torch.device("meta"):
        adapters.inject(lm, adapters.Lora(config.lora, 1.0, 0, ""))
    trained = sum(parameter.numel() for _, parameter in adapters.own_parameters(lm))
    return Counts(total, trained)


def shape(path: Path) -> tuple:
    """As local/shapes.py has it, of heads that together are as wide as the model."""
    config = AutoConfig.from_pretrained(path)
    width = getattr(config, "head_dim", None)
    return (
        config.num_hidden_layers,
        config.hidden_size,
        config.hidden_size // width if width else config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
        config.tie_word_embeddings,
    )


def model(config: TrainConfig, counts: Counts) -> str:
    how = "all are trained"
    if config.lora:
        how = f"{counts.trained / 1e6:,.1f}M of adapters are trained"
    return f"{config.model}, {counts.total / 1e6:,.0f}M parameters, {how}; lr {config.lr:g}"


def prompts(train: list[Prompt], held_out: list[Prompt]) -> str:
    lengths = [len(prompt.ids) for prompt in train]
    return (
        f"{len(train):,} to train on, {len(held_out):,} held out; {min(lengths)} to {max(lengths)} "
        f"tokens, median {statistics.median(lengths):.0f}"
    )


def rewards_of_reference(task: Task, prompt: Prompt) -> str:
    """What the first prompt's reference earns. A judge is not asked."""
    channels = task.channels(prompt.example)
    if any(channel.fn is None for channel in channels):
        return ", ".join(channel.name for channel in channels) + " (a judge's: not asked)"
    if not prompt.example.reference:
        return ", ".join(channel.name for channel in channels) + " (the prompt has no reference)"
    values, *_ = task.start(prompt.example, [prompt.example.reference])()
    parts = [f"{c.name} {shown(value)}" for c, value in zip(channels, values, strict=True)]
    return f"{', '.join(parts)} for its reference {prompt.example.reference[:60]!r}"


def a_step(config: TrainConfig, train: list[Prompt]) -> str:
    responses = config.prompts * config.group
    epochs = config.steps * config.prompts / len(train)
    return (
        f"{config.prompts} prompts x {config.group} responses, at most "
        f"{responses * config.max_tokens:,} tokens sampled; {config.steps} steps "
        f"(epochs: {epochs:.2g})"
    )


def simulate(
    config: TrainConfig, path: Path, machine: fits.Machine, train: list[Prompt]
) -> dict[str, float]:
    """tools/simulate.py in a process of its own, for it changes torch. Raises InputError.

    Its prompts fill two micro-batches of each GPU and update, if the run has so many.
    """
    prompt = round(statistics.mean(len(prompt.ids) for prompt in train))
    tokens = prompt + config.group * (config.max_tokens - 1)  # of a group
    a_micro_batch = max(1, config.tokens_per_microbatch // tokens)
    filling = 2 * a_micro_batch * machine.gpus * config.updates
    options = {
        "model": path,
        "gpus": machine.gpus,
        "memory": machine.memory,
        "prompt": prompt,
        "group": config.group,
        "response": config.max_tokens,
        "tokens-per-microbatch": config.tokens_per_microbatch,
        "gradient-checkpointing": config.gradient_checkpointing,
        "lora": config.lora,
        "kl": config.kl,
        "updates": config.updates,
        "prompts": min(config.prompts, filling),
    }
    command = [sys.executable, str(ROOT / "tools/simulate.py"), "--json"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    if is_cpu(machine):
        command += ["--dtype", "float32"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        *_, last = result.stderr.strip().splitlines() or ["no reason given"]
        raise InputError(f"--plan {config.plan}: the simulation failed: {last}")
    return json.loads(result.stdout)


def memory(config: TrainConfig, machine: fits.Machine, simulated: dict) -> str:
    outside = CPU_OUTSIDE if is_cpu(machine) else OUTSIDE
    sizes = dict(simulated["peak_parts_gib"])
    if is_cpu(machine):  # the engine does not sleep
        sizes["the engine's weights"] = 2 * simulated["vllm_weights_gib"]
        updating = outside + sum(sizes.values())
        sampling = 0.0
    else:
        updating = outside + simulated["peak_gib"]
        sampling = outside + simulated["held_gib"] + config.gpu_memory * machine.memory
    fit = max(updating, sampling) <= USABLE * machine.memory
    parts = [f"{part} {gib:.1f}" for part, gib in sizes.items() if gib >= 0.05]
    parts.append(f"all else {outside:g}")
    text = f"{updating:.1f} GiB in an update ({', '.join(parts)})"
    if sampling:
        text += f", {sampling:.1f} while sampling"
    advice = "it fits" if fit else "it DOES NOT FIT: lower --tokens-per-microbatch, or take --lora"
    return f"{text}, of {machine.memory:.0f}: {advice}"


def run_time(
    config: TrainConfig, machine: fits.Machine, simulated: dict, train: list[Prompt]
) -> str:
    """For responses of half of --max-tokens, and of all of it."""
    texts = []
    for response in (config.max_tokens / 2, config.max_tokens):
        seconds = step_seconds(config, machine, simulated, train, response)
        hours = config.steps * seconds / 3600
        whole = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        texts.append(f"{response:.0f} tokens: {seconds:.2g} s a step, {whole} in all")
    return f"with responses of {'; of '.join(texts)}; evaluations and judges not counted"


def step_seconds(
    config: TrainConfig,
    machine: fits.Machine,
    simulated: dict,
    train: list[Prompt],
    response: float,
) -> float:
    prompt = statistics.mean(len(prompt.ids) for prompt in train)
    layers, head = roofline.needed(MODEL, prompt, response, config.group, config.prompts)
    again = simulated["recomputes"]
    total = roofline.operations(layers, head, config.updates, again, config.kl, config.lora)
    updating = total / (roofline.MFU * machine.flops * machine.gpus)
    lengths = prompt, response, config.max_tokens
    share = config.gpu_memory * machine.memory * GIB / roofline.GPU_BYTES
    if is_cpu(machine):
        share = 1.0
    sampling = roofline.sample_seconds(MODEL, config.prompts, config.group, lengths, share, machine)
    if is_cpu(machine):  # where operations count, too, and not only what is read
        matrices, words, _ = roofline.parameters(MODEL)
        tokens = config.prompts * config.group * response
        sampling += 2 * (matrices + words) * tokens / (roofline.MFU * machine.flops)
    return updating + sampling


def disk(config: TrainConfig, known: Pretrained, counts: Counts) -> str:
    """Bytes of what is kept: the policies, and the newest state while the run goes on."""
    policy = counts.total * known.dtype.itemsize / 1e9
    kept = 1
    if config.keep_policies:
        kept += 2 + (config.steps - 1) // config.eval_every if config.eval_every else 2
    state = 12 * counts.trained / 1e9  # with both moments, in float32
    return f"{kept * policy:.1f} GB of checkpoints, {state:.1f} GB of state until the end"
