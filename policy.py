"""The policy as it is trained: each prompt once, nothing padded, no (tokens, vocabulary) logits, sharded over ranks.

A forward takes one row of tokens, in which every prompt is followed by its responses, and returns the log-probs of the
responses' tokens. A response sees its prompt and itself, at the positions that continue the prompt's: the same numbers
and gradients as one sequence a response (tests/test_policy.py), for a fraction of the tokens.
"""

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from ranks import LOCAL_WORLD, WORLD, InputError

LOGITS = 512  # tokens whose logits exist at a time: 0.3 GB in float32 with 152,000 words
# Query heads share keys. torch 2.11 takes that as it is, later ones want to be told.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Sequences(NamedTuple):  # who sees whom in a row of S tokens: a prompt itself, a response its prompt and itself
    queries: list[int]  # length of each sequence, S in all
    keys: list[int]  # and of the keys it sees; each query sees those up to itself, aligned at the end
    at: Tensor  # (sum of keys,): where in the row these keys are
    query_ends: Tensor  # int32, cumulated from 0, as the CUDA kernel wants them
    key_ends: Tensor


class Row(NamedTuple):
    tokens: Tensor  # (1, S): every prompt, and after it each of its responses without the last token
    positions: Tensor  # (1, S)
    predictors: Tensor  # (N,): which of the S predicts each response token
    targets: Tensor  # (N,): the response tokens
    sequences: Sequences


def pack(groups: list[tuple[list[int], list[list[int]]]], device: torch.device) -> Row:
    """groups: (prompt, responses) as token ids. N is the sum of all responses' lengths, in their order."""
    tokens, positions, predictors, at, queries, keys = [], [], [], [], [], []
    for prompt, responses in groups:
        start, p = len(tokens), len(prompt)
        tokens += prompt
        positions += range(p)
        at += range(start, start + p)
        queries.append(p)
        keys.append(p)
        for response in responses:
            if not response:
                continue
            own = range(len(tokens), len(tokens) + len(response) - 1)
            # the prompt's last token predicts the first token of every response; a last token predicts nothing
            predictors += [start + p - 1, *own]
            if own:
                tokens += response[:-1]
                positions += range(p, p + len(own))
                at += [*range(start, start + p), *own]
                queries.append(len(own))
                keys.append(p + len(own))
    targets = [token for _, responses in groups for response in responses for token in response]
    ends = [torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (queries, keys)]
    tokens, positions, predictors, targets, at = (torch.tensor(x, dtype=torch.long, device=device)
                                                  for x in ([tokens], [positions], predictors, targets, at))
    return Row(tokens, positions, predictors, targets, Sequences(queries, keys, at, *ends))


def _prompt_once(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float,
                 sequences: Sequences, **kwargs) -> tuple[Tensor, None]:
    """Attention as transformers calls it. query (1, H, S, D), key and value (1, fewer H, S, D) -> (1, S, H, D).

    A prompt's keys and values are copied for each response: then an ordinary kernel for sequences of different lengths
    does the rest, with no mask and no work that is thrown away.
    """
    if query.is_cuda:
        return _attend_on_cuda(query[0], key[0], value[0], scaling, sequences), None
    # The copies are made again in the backward pass: kept, they took a fifth to a quarter of a CPU update's memory.
    return checkpoint(_attend_on_cpu, query[0], key[0], value[0], scaling, sequences, use_reentrant=False), None


def _attend_on_cuda(query: Tensor, key: Tensor, value: Tensor, scaling: float, sequences: Sequences) -> Tensor:
    """(H, S, D) -> (1, S, H, D), by FlashAttention's kernel, which wants (S, H, D) in half precision."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return varlen_attn(query, key.index_select(0, sequences.at), value.index_select(0, sequences.at),
                       sequences.query_ends, sequences.key_ends, max(sequences.queries), max(sequences.keys),
                       scale=scaling, window_size=(-1, 0), **GQA)[None]  # (-1, 0): causal


def _attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, scaling: float, sequences: Sequences) -> Tensor:
    """The same, sequence by sequence, in any precision."""
    key, value = (x.index_select(1, sequences.at).repeat_interleave(len(query) // len(x), 0) for x in (key, value))
    out = []
    for q, k, v in zip(query.split(sequences.queries, 1), key.split(sequences.keys, 1),
                       value.split(sequences.keys, 1), strict=True):
        n, seen = q.shape[1], k.shape[1]
        mask = None if n == seen else torch.ones(n, seen, dtype=torch.bool).tril(seen - n)
        out.append(scaled_dot_product_attention(q[None], k[None], v[None], mask, is_causal=mask is None,
                                                scale=scaling)[0])
    return torch.cat(out, 1).transpose(0, 1)[None]


AttentionInterface.register("prompt_once", _prompt_once)


class Policy(nn.Module):
    """A causal language model `lm`, from the directory `source`, whose forward gives log-probs of responses."""

    def __init__(self, lm, source: Path):
        super().__init__()
        self.lm, self.source = lm, source

    def forward(self, row: Row, temperature: float) -> Tensor:
        """Log-probs (N,) of the responses' tokens at that temperature, float32."""
        hidden = self.lm.base_model(input_ids=row.tokens, position_ids=row.positions, use_cache=False,
                                    sequences=row.sequences).last_hidden_state[0]  # (S, H)
        hidden = hidden.index_select(0, row.predictors)  # (N, H)

        def logp(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = self.lm.get_output_embeddings()(hidden).float() / temperature  # (some of N, V)
            return -cross_entropy(logits, targets, reduction="none")

        # Each chunk's logits are computed again in the backward pass: memory does not grow with N times V.
        return torch.cat([checkpoint(logp, *chunk, use_reentrant=False)
                          for chunk in zip(hidden.split(LOGITS), row.targets.split(LOGITS), strict=True)])


def make_mesh(device: torch.device) -> DeviceMesh | None:
    """How the policy is sharded: over a node's ranks, with a replica on every node (HSDP). None on one CPU rank."""
    if WORLD == 1 and device.type == "cpu":
        return None
    mesh = init_device_mesh(device.type, (WORLD // LOCAL_WORLD, LOCAL_WORLD), mesh_dim_names=("replicate", "shard"))
    return mesh if mesh.size(0) > 1 else mesh["shard"]


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load(path: Path, device: torch.device, mesh: DeviceMesh | None = None, dtype: torch.dtype = torch.float32,
         gradient_checkpointing: bool = False) -> Policy:
    """The checkpoint's weights in `dtype`; each rank reads its own shard, and never holds more. On GPUs a layer is
    gathered, computed and reduced in bfloat16 (gradients in float32). Without dropout: the log-probs must be those of
    the policy that sampled. Raises InputError for missing weights."""
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype,
                                              attn_implementation="prompt_once")
    lm.tie_weights()
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lm.eval()
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    policy = Policy(lm, path)
    if mesh:
        precision = MixedPrecisionPolicy(compute_dtype(device), reduce_dtype=torch.float32)
        for unit in [*lm.base_model.layers, policy]:
            fully_shard(unit, mesh=mesh, mp_policy=precision)
    buffers = dict(lm.named_buffers())
    policy.to_empty(device=device)
    for name, buffer in buffers.items():  # computed, not loaded, such as the rotary frequencies
        lm.get_buffer(name).copy_(buffer)
    lm.tie_weights()  # to_empty has parted them
    files = {name: file for file in (safe_open(file, "pt") for file in path.glob("*.safetensors"))
             for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name, parameter in lm.named_parameters():
        if name not in files:
            raise InputError(f"{path} lacks weights that its config.json asks for, {name} for one")
        saved, shape = files[name].get_slice(name), [*parameter.shape]
        if saved.get_shape() != shape:
            raise InputError(f"{path}: {name} has the shape {saved.get_shape()}, its config.json asks for {shape}")
        if isinstance(parameter, DTensor):  # rows are dealt out as torch.chunk does it
            rows = math.ceil(len(parameter) / mesh["shard"].size())
            first = min(len(parameter), rows * mesh["shard"].get_local_rank())
            parameter.to_local().data.copy_(saved[first:first + rows])
        else:
            parameter.data.copy_(saved[:])
    return policy


@torch.no_grad()
def full_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters, the second name of tied ones too. Sharded, they are gathered a decoder layer at
    a time, on all ranks in one order, and given up again: no rank holds a second copy of the model."""
    for prefix, unit in [(n, m) for n, m in policy.named_modules() if isinstance(m, FSDPModule)] or [("", policy)]:
        if isinstance(unit, FSDPModule):
            unit.unshard()
        for name, parameter in unit.named_parameters(prefix, remove_duplicate=False):
            if not isinstance(parameter, DTensor):  # those belong to another unit
                # a copy: the receiver may keep it until a whole layer is there
                yield name.removeprefix("lm."), parameter.detach().to(dtype, copy=True)
        if isinstance(unit, FSDPModule):
            unit.reshard()
