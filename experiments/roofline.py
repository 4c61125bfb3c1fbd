"""Seconds of updates, of sampling and of a judge: operations at a share of a GPU's peak, bytes at a share of the rate
at which it reads memory. Held against one H100 in docs/gpu.md."""

from typing import NamedTuple

from local.shapes import QWEN
from tools.step import CUDA_TFLOPS

MFU = 0.3  # of an update's operations, recomputed ones too: .31 and .28 of 1.5B on one H100; prime-rl has .27 and .35
PREFILL_MFU = 0.4  # of operations on prompts; assumed
BANDWIDTH = {"H100": 3.35e12, "A100": 2.04e12}  # bytes a second, SXM with 80 GB, by the data sheets
# The share of it at which weights are read, and the seconds of a decoding step beside that, for vLLM's work on the
# host. Both assumed; together they come near what is published, see docs/reproduce.md.
SHARE, PAUSE = 0.75, 0.005
SEQUENCES = (
    256  # that a GPU samples at a time, as in rollout.VLLMEngine, if the KV cache has room for them
)
GPU_BYTES, VLLM_BYTES = (
    79.1 * 2**30,
    3.5 * 2**30,
)  # 80 GB; beside weights and KV cache: as tools/simulate.py has it


class Machine(NamedTuple):
    gpu: str = "H100"
    gpus: int = 8
    mfu: float = MFU

    @property
    def flops(self) -> float:  # a GPU's a second
        return CUDA_TFLOPS[self.gpu] * 1e12

    def decode(self, steps: float, read: float) -> float:
        """Seconds of so many steps, which read so many bytes together."""
        return steps * PAUSE + read / (SHARE * BANDWIDTH[self.gpu])

    def prefill(self, size: str, tokens: float) -> float:
        """Seconds of one GPU for so many tokens of prompts."""
        return 2 * parameters(size)[0] * tokens / (PREFILL_MFU * self.flops)


def parameters(size: str) -> tuple[int, int, int]:
    """(of all layers' matrices, of the output head, of all: biases, norms and embeddings, too)."""
    layers, hidden, heads, kv_heads, wide, words, tied = QWEN[size]
    keys = hidden // heads * kv_heads
    matrices = 2 * hidden * (hidden + keys) + 3 * hidden * wide
    return (
        layers * matrices,
        words * hidden,
        layers * (matrices + 3 * hidden + 2 * keys) + hidden + (2 - tied) * words * hidden,
    )


def cache_bytes(size: str) -> int:
    """Of a token's keys and values in bf16."""
    layers, hidden, heads, kv_heads, *_ = QWEN[size]
    return 4 * layers * (hidden // heads) * kv_heads


def recomputes(size: str, tokens: int) -> bool:
    """Whether policy.recompute would, on auto, for micro-batches of so many tokens."""
    layers, hidden, _, _, wide, *_ = QWEN[size]
    return tokens * layers * (20 * hidden + 8 * wide) > 0.4 * GPU_BYTES


def needed(
    size: str, prompt: float, response: float, group: int, prompts: int
) -> tuple[float, float]:
    """Operations of an update, in layers and in the output head: together tools.step.needed_flops."""
    (matrices, head, _), (layers, hidden, *_), n = parameters(size), QWEN[size], response - 1
    attention = 2 * layers * hidden * (prompt**2 / 2 + group * n * (prompt + n / 2))
    return 6 * prompts * (
        matrices * (prompt + group * n) + attention
    ), 6 * prompts * head * group * response


def update_seconds(
    size: str, prompt: float, response: float, train: dict, machine: Machine
) -> float:
    """Of a step with these options of train.py."""
    layers, head = needed(size, prompt, response, train["group"], train["prompts"])
    # A forward is a third. Old log-probs of all updates but the first need one more, the reference of --kl another.
    more = (1 - 1 / train["updates"] + bool(train["kl"])) / 3
    again = train["gradient_checkpointing"] != "off" and recomputes(
        size, train["tokens_per_microbatch"]
    )
    return (layers * (1 + more + again / 3) + head * (1 + more)) / (
        machine.mfu * machine.flops * machine.gpus
    )


def sample_seconds(
    size: str,
    prompts: float,
    group: int,
    lengths: tuple[float, float, int],
    memory: float,
    machine: Machine,
) -> float:
    """For `group` responses to each prompt. lengths: prompt, response, limit. memory: vLLM's share. A decoding step
    reads the weights, the head in fp32, and the keys and values of all that runs. The batch is full until the last
    response begins, and one response goes on to the limit."""
    (matrices, head, _), cache, (prompt, response, limit) = (
        parameters(size),
        cache_bytes(size),
        lengths,
    )
    own, weights = (
        prompts * group / machine.gpus,
        2 * matrices + 4 * head,
    )  # responses of a GPU; bytes
    room = memory * GPU_BYTES - VLLM_BYTES - weights - 2 * head  # the last: embeddings
    at_once = max(1, min(SEQUENCES, room // (cache * (prompt + response))))
    steps = response * max(1, own / at_once) + max(0, limit - response)
    read = steps * weights + own * response * (prompt + response / 2) * cache
    return machine.decode(steps, read) + machine.prefill(size, prompts * prompt) / machine.gpus
