"""Seconds of updates, of sampling and of a judge.

Operations take a share of a GPU's peak, bytes a share of the rate at which it reads memory. Held
against one H100 in docs/gpu.md.
"""

from typing import NamedTuple

from local.shapes import QWEN
from tools.step import CUDA_TFLOPS

# Of an update's operations, recomputed ones too: .31 and .28 of 1.5B on one H100; prime-rl has .27
# and .35.
MFU = 0.3
PREFILL_MFU = 0.4  # of operations on prompts; assumed
BANDWIDTH = {"H100": 3.35e12, "A100": 2.04e12}  # bytes a second, SXM with 80 GB, by the data sheets
# The share of it at which weights are read, and the seconds that a decoding step takes beside that,
# for vLLM's work on the host. Both are assumed; together they come near what is published, see
# docs/reproduce.md.
SHARE = 0.75
PAUSE = 0.005
SEQUENCES = 256  # that a GPU samples at a time, as in rollout.VLLMEngine, if the KV cache has room
GPU_BYTES = 79.1 * 2**30  # of a GPU of 80 GB, as in tools/simulate.py
VLLM_BYTES = 3.5 * 2**30  # that vLLM needs beside weights and KV cache, as there


class Machine(NamedTuple):
    gpu: str = "H100"
    gpus: int = 8
    mfu: float = MFU

    @property
    def flops(self) -> float:  # a GPU's a second
        return CUDA_TFLOPS[self.gpu] * 1e12

    def decode(self, steps: float, bytes_read: float) -> float:
        """Seconds of these decoding steps, which read so many bytes together."""
        return steps * PAUSE + bytes_read / (SHARE * BANDWIDTH[self.gpu])

    def prefill(self, size: str, tokens: float) -> float:
        """Seconds of one GPU for these tokens of prompts."""
        return 2 * parameters(size).matrices * tokens / (PREFILL_MFU * self.flops)


class Parameters(NamedTuple):
    matrices: int  # in all layers
    head: int  # in the output head
    total: int  # with biases, norms and embeddings


def parameters(size: str) -> Parameters:
    layers, hidden, heads, kv_heads, wide, words, tied = QWEN[size]
    keys = hidden // heads * kv_heads
    matrices = 2 * hidden * (hidden + keys) + 3 * hidden * wide
    biases_and_norms = layers * (3 * hidden + 2 * keys) + hidden
    embeddings = (2 - tied) * words * hidden
    return Parameters(
        layers * matrices, words * hidden, layers * matrices + biases_and_norms + embeddings
    )


def cache_bytes(size: str) -> int:
    """Of a token's keys and values in bf16."""
    layers, hidden, heads, kv_heads, *_ = QWEN[size]
    return 4 * layers * (hidden // heads) * kv_heads


def recomputes(size: str, tokens: int) -> bool:
    """Whether policy.recompute would, on auto, for micro-batches of these tokens."""
    layers, hidden, _, _, wide, *_ = QWEN[size]
    return tokens * layers * (20 * hidden + 8 * wide) > 0.4 * GPU_BYTES


def needed(
    size: str, prompt: float, response: float, group: int, prompts: int
) -> tuple[float, float]:
    """Operations of an update, in layers and in the output head.

    Together they are tools.step.needed_flops.
    """
    matrices, head, _ = parameters(size)
    layers, hidden, *_ = QWEN[size]
    n = response - 1
    attention = 2 * layers * hidden * (prompt**2 / 2 + group * n * (prompt + n / 2))
    in_layers = 6 * prompts * (matrices * (prompt + group * n) + attention)
    in_head = 6 * prompts * head * group * response
    return in_layers, in_head


def update_seconds(
    size: str, prompt: float, response: float, train: dict, machine: Machine
) -> float:
    """Of a step with these options of train.py."""
    layers, head = needed(size, prompt, response, train["group"], train["prompts"])
    micro_batch = train["tokens_per_microbatch"]
    again = train["gradient_checkpointing"] != "off" and recomputes(size, micro_batch)
    total = operations(layers, head, train["updates"], again, train["kl"])
    return total / (machine.mfu * machine.flops * machine.gpus)


def operations(
    layers: float, head: float, updates: int, again: bool, kl: float = 0.0, lora: int = 0
) -> float:
    """Of a step's updates, from those that `needed` returns. again: activations are recomputed.

    A forward is a third. Old log-probs of all updates but the first need one more, the reference of
    --kl another. Frozen weights, LoRA's, need no gradient, which is a third, too.
    """
    whole = 2 / 3 if lora else 1.0
    more = (1 - 1 / updates + bool(kl)) / 3
    return layers * (whole + more + again / 3) + head * (whole + more)


def sample_seconds(
    size: str,
    prompts: float,
    group: int,
    lengths: tuple[float, float, int],
    memory: float,
    machine: Machine,
) -> float:
    """For `group` responses to each prompt.

    lengths: prompt, response, limit. memory: vLLM's share. A decoding step reads the weights, the
    head in fp32, and the keys and values of all that runs. The batch is full until the last
    response begins, and one response goes on to the limit.
    """
    matrices, head, _ = parameters(size)
    prompt, response, limit = lengths
    cache = cache_bytes(size)
    responses = prompts * group / machine.gpus  # of a GPU
    weights = 2 * matrices + 4 * head  # bytes
    embeddings = 2 * head
    room = memory * GPU_BYTES - VLLM_BYTES - weights - embeddings
    at_once = max(1, min(SEQUENCES, room // (cache * (prompt + response))))
    steps = response * max(1, responses / at_once) + max(0, limit - response)
    bytes_read = steps * weights + responses * response * (prompt + response / 2) * cache
    prefill = machine.prefill(size, prompts * prompt) / machine.gpus
    return machine.decode(steps, bytes_read) + prefill
