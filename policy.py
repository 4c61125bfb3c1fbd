"""The policy as it is trained: each prompt once, nothing padded, no (tokens, vocabulary) logits, sharded over ranks.

A forward takes one row of tokens, in which every prompt is followed by its responses, and returns the log-probs of the
responses' tokens. A response sees its prompt and itself, at the positions that continue the prompt's: the same numbers
and gradients as one sequence a response (test_one_row_is_exactly_separate_sequences), for a fraction of the tokens.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from infra.pretrained import has_own_head, refuse_quantized, weights
from infra.ranks import LOCAL_WORLD, RANK, WORLD, InputError, on_rank_0
from infra.run_directory import publish

LOGITS = (
    512,
    2048,
)  # tokens whose logits exist at a time, on a CPU and on a GPU: 1.2 GB with 152,000 words
GQA = (
    {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}
)  # query heads share keys; 2.11 sees that by itself


class Sequences(
    NamedTuple
):  # who sees whom in a row of S tokens: a prompt itself, a response its prompt and itself
    at: Tensor  # where in the row the keys are that the sequences see, one sequence after another
    query_ends: Tensor  # int32, cumulated from 0: where each sequence's queries end, S in all,
    key_ends: Tensor  # and its keys in `at`; each query sees those up to itself, aligned at the end
    queries: int  # of the longest sequence. No lists: a compiled layer would be compiled again for each row
    keys: int


class Row(NamedTuple):
    tokens: (
        Tensor  # (1, S): every prompt, and after it each of its responses without the last token
    )
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
    ends = [
        torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (queries, keys)
    ]
    tokens, positions, predictors, targets, at = (
        torch.tensor(x, dtype=torch.long, device=device)
        for x in ([tokens], [positions], predictors, targets, at)
    )
    return Row(
        tokens, positions, predictors, targets, Sequences(at, *ends, max(queries), max(keys))
    )


def _prompt_once(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float,
    sequences: Sequences,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it. query (1, H, S, D), key and value (1, fewer H, S, D) -> (1, S, H, D).

    A prompt's keys and values are copied for each response: then an ordinary kernel for sequences of different lengths
    does the rest, with no mask and no work that is thrown away. On a CPU they are copied again in the backward pass.
    """
    if query.is_cuda:
        return _attend_on_cuda(query[0], key[0], value[0], scaling, sequences), None
    return checkpoint(
        _attend_on_cpu, query[0], key[0], value[0], scaling, sequences, use_reentrant=False
    ), None


def _attend_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sequences: Sequences
) -> Tensor:
    """(H, S, D) -> (1, S, H, D), by FlashAttention's kernel, which wants (S, H, D) in half precision."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return varlen_attn(
        query,
        key.index_select(0, sequences.at),
        value.index_select(0, sequences.at),
        sequences.query_ends,
        sequences.key_ends,
        sequences.queries,
        sequences.keys,
        scale=scaling,
        window_size=(-1, 0),
        **GQA,
    )[None]  # (-1, 0): causal


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sequences: Sequences
) -> Tensor:
    """The same, sequence by sequence, in any precision."""
    key, value = (x.index_select(1, sequences.at) for x in (key, value))
    out, queries, keys = (
        [],
        sequences.query_ends.diff().tolist(),
        sequences.key_ends.diff().tolist(),
    )
    for q, k, v in zip(
        query.split(queries, 1), key.split(keys, 1), value.split(keys, 1), strict=True
    ):
        n, seen = q.shape[1], k.shape[1]
        mask = None if n == seen else torch.ones(n, seen, dtype=torch.bool).tril(seen - n)
        out.append(
            scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )[0]
        )
    return torch.cat(out, 1).transpose(0, 1)[None]


AttentionInterface.register("prompt_once", _prompt_once)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32 also where a and b are in half precision."""
    return (
        torch.mm(a, b, out_dtype=torch.float32)
        if a.is_cuda and a.dtype != torch.float32
        else a.float() @ b.float()
    )


class LogProbs(torch.autograd.Function):
    """hidden (N, H), output head (V, H), targets (N,), temperature -> log-probs (N,) of the targets, float32.

    LOGITS tokens at a time: memory does not grow with N times V. Logits are in float32, for rounded to bfloat16 they
    alone would move a log-prob by .01 to .04; they are computed again in the backward pass. The head's gradient is
    summed in float32, for a sum of rounded parts would lose what is small, and autograd rounds it to the head's dtype.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> Tensor:
        logp, total, size = [], [], LOGITS[hidden.is_cuda]
        for h, target in zip(hidden.split(size), targets.split(size), strict=True):
            logits = product(h, head.T).div_(temperature)  # (some of N, V)
            total.append(logits.logsumexp(-1))
            logp.append(logits.gather(-1, target[:, None]).squeeze(-1) - total[-1])
        ctx.temperature, ctx.size = temperature, size
        ctx.save_for_backward(hidden, head, targets, torch.cat(total))
        return torch.cat(logp)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, head, targets, total = ctx.saved_tensors
        grad, d_hidden, d_head = (
            grad / ctx.temperature,
            [],
            torch.zeros_like(head, dtype=torch.float32),
        )
        for h, target, z, g in zip(
            *(x.split(ctx.size) for x in (hidden, targets, total, grad)), strict=True
        ):
            # d logp / d logits = [token is the target] - its probability; in half precision for the products
            d = product(h, head.T).div_(ctx.temperature).sub_(z[:, None]).exp_().mul_(-g[:, None])
            d = d.scatter_add_(-1, target[:, None], g[:, None]).to(h.dtype)
            d_hidden.append(d @ head)
            d_head = (
                d_head.addmm_(d.T, h) if d.dtype == torch.float32 else d_head.add_(product(d.T, h))
            )
        return torch.cat(d_hidden), d_head, None, None


class Policy(nn.Module):
    """A causal language model `lm`, from the directory `source`, whose forward gives log-probs of responses."""

    def __init__(self, lm, source: Path):
        super().__init__()
        self.lm, self.source = lm, source

    def forward(self, row: Row, temperature: float) -> Tensor:
        """Log-probs (N,) of the responses' tokens at that temperature, float32."""
        hidden = self.lm.base_model(
            input_ids=row.tokens,
            position_ids=row.positions,
            use_cache=False,
            sequences=row.sequences,
        ).last_hidden_state[0]  # (S, H)
        head = self.lm.get_output_embeddings().weight  # (V, H)
        return LogProbs.apply(
            hidden.index_select(0, row.predictors), head, row.targets, temperature
        )

    def recompute(self, mode: str, tokens: int) -> None:
        """Activations are computed again in the backward pass from now on. mode: on, off, or auto: if those of so many
        tokens, by tools/simulate.py 20 x hidden + 8 x intermediate bytes a layer, would take 0.4 of a GPU or more."""
        c, gpu = self.lm.config, next(self.parameters()).device.type != "cpu"
        kept = tokens * c.num_hidden_layers * (20 * c.hidden_size + 8 * c.intermediate_size)
        if mode == "on" or (
            mode == "auto" and gpu and kept > 0.4 * torch.cuda.get_device_properties().total_memory
        ):
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
            self.lm.train()  # transformers recomputes only in this mode; there is no dropout


def make_mesh(device: torch.device) -> DeviceMesh | None:
    """How the policy is sharded: over a node's ranks, with a replica on every node (HSDP). None on one CPU rank."""
    if WORLD == 1 and device.type == "cpu":
        return None
    mesh = init_device_mesh(
        device.type, (WORLD // LOCAL_WORLD, LOCAL_WORLD), mesh_dim_names=("replicate", "shard")
    )
    return mesh if mesh.size(0) > 1 else mesh["shard"]


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load(
    path: Path,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
) -> Policy:
    """The checkpoint's weights in `dtype`; each rank reads its own shard, and never holds more. On GPUs a layer is
    gathered and computed in bfloat16, gradients are reduced in float32. Without dropout: the log-probs must be those of
    the policy that sampled. Raises InputError for missing or quantized weights."""
    refuse_quantized(path)
    config = AutoConfig.from_pretrained(path)
    if has_own_head(path):
        config.tie_word_embeddings = False  # as transformers does it; saved checkpoints say so
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="prompt_once"
        )
    lm.tie_weights()
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lm.eval()
    policy = Policy(lm, path).requires_grad_(trained)
    if mesh:
        # What is gathered for a forward is given up after it, but for embeddings and head, if a backward needs them.
        precision = MixedPrecisionPolicy(compute_dtype(device), reduce_dtype=torch.float32)
        for unit in [*lm.base_model.layers, policy]:
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=precision,
                reshard_after_forward=None if trained else True,
            )
    buffers = dict(lm.named_buffers())
    policy.to_empty(device=device)
    for name, buffer in buffers.items():  # computed, not loaded, such as the rotary frequencies
        lm.get_buffer(name).copy_(buffer)
    lm.tie_weights()  # to_empty has parted them
    files = weights(path)
    for name, parameter in lm.named_parameters():
        if name not in files:
            raise InputError(f"{path} lacks weights that its config.json asks for, {name} for one")
        saved, shape = files[name].get_slice(name), [*parameter.shape]
        if saved.get_shape() != shape:
            raise InputError(
                f"{path}: {name} has the shape {saved.get_shape()}, its config.json asks for {shape}"
            )
        if isinstance(parameter, DTensor):  # rows are dealt out as torch.chunk does it
            rows = math.ceil(len(parameter) / mesh["shard"].size())
            first = min(len(parameter), rows * mesh["shard"].get_local_rank())
            parameter.to_local().data.copy_(saved[first : first + rows])
        else:
            parameter.data.copy_(saved[:])
    return policy


@torch.no_grad()
def full_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters, the second name of tied ones too. Sharded, they are gathered a decoder layer at
    a time, on all ranks in one order, and given up again: no rank holds a second copy of the model."""
    for prefix, unit in [
        (n, m) for n, m in policy.named_modules() if isinstance(m, FSDPModule)
    ] or [("", policy)]:
        if isinstance(unit, FSDPModule):
            unit.unshard()
        for name, parameter in unit.named_parameters(prefix, remove_duplicate=False):
            if not isinstance(parameter, DTensor):  # those belong to another unit
                # a copy: the receiver may keep it until a whole layer is there
                yield name.removeprefix("lm."), parameter.detach().to(dtype, copy=True)
        if isinstance(unit, FSDPModule):
            unit.reshard()


@torch.no_grad()
def save_policy(policy, tokenizer, dtype: torch.dtype, path: Path) -> None:
    """A checkpoint that transformers and vLLM load as it is, written by rank 0 in the original's dtype. All ranks must
    call it. Raises InputError on all of them if it cannot be written."""
    weights, part = {}, path.with_name(path.name + ".part")
    for name, parameter in policy.lm.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        if RANK == 0:
            weights[name] = full.to("cpu", dtype)

    def write() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            save_torch_state_dict(weights, part)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        policy.lm.config.dtype = dtype
        policy.lm.config.save_pretrained(part)
        generation = policy.source / "generation_config.json"
        if generation.is_file():  # as it was: transformers refuses to write some that it reads
            shutil.copy(generation, part)
        tokenizer.save_pretrained(part)
        publish(part, path)

    try:
        on_rank_0(write)
    except OSError as error:
        if RANK == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"{path} could not be written: {error}") from error
