"""The policy as it is trained: a language model whose forward gives log-probs of responses.

Each prompt is computed once for its group. Nothing is padded, no (tokens, vocabulary) tensor of
logits exists, and weights are sharded over ranks.

A forward takes one row of tokens, in which every prompt is followed by its responses. A response
sees its prompt and itself, at the positions that continue the prompt's. Log-probs and gradients are
as if each response were a sequence of its own, up to rounding, for a fraction of the tokens. In
tests/test_policy.py test_one_row_is_exactly_separate_sequences shows it.
"""

import functools
import math
import shutil
from collections.abc import Iterable, Iterator
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

from infra import adapters
from infra.adapters import Lora
from infra.pretrained import has_own_head, refuse_quantized, weights
from infra.ranks import LOCAL_WORLD, RANK, WORLD, InputError, on_rank_0
from infra.run_directory import publish

# Tokens whose logits exist at a time: 2,048 x 152,000 words in float32 are 1.2 GB.
LOGITS_ON_CPU = 512
LOGITS_ON_GPU = 2048
# Query heads share keys. torch 2.11 sees that by itself.
GQA = {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}


class Sequences(NamedTuple):
    """Who sees whom in a row of S tokens: a prompt itself, a response its prompt and itself.

    A row of a prompt (places 0 1 2), one response (3 4) and another (5) has three sequences. Their
    queries are 0 1 2 | 3 4 | 5, and their keys are 0 1 2 | 0 1 2 3 4 | 0 1 2 5.

    None of this is a Python list: for each new list torch.compile would compile a layer again.
    """

    keys_at: Tensor  # places in the row: the keys of the first sequence, of the second, ...
    query_ends: Tensor  # int32: 0, then where each sequence's queries end in the row
    key_ends: Tensor  # int32: 0, then where each sequence's keys end in `keys_at`
    max_queries: int  # of the longest sequence
    max_keys: int


class Row(NamedTuple):
    tokens: Tensor  # (1, S): every prompt, then each of its responses without the last token
    positions: Tensor  # (1, S)
    predictors: Tensor  # (N,): which of the S tokens predicts each response token
    targets: Tensor  # (N,): the response tokens
    sequences: Sequences


def pack(groups: list[tuple[list[int], list[list[int]]]], device: torch.device) -> Row:
    """Prompts with their responses, as token ids, in one row.

    N is the sum of all responses' lengths, in their order.
    """
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    keys_at: list[int] = []
    queries: list[int] = []  # of each sequence, its length
    keys: list[int] = []
    for prompt, responses in groups:
        prompt_at = range(len(tokens), len(tokens) + len(prompt))
        tokens += prompt
        positions += range(len(prompt))
        keys_at += prompt_at
        queries.append(len(prompt))
        keys.append(len(prompt))
        for response in responses:
            if not response:
                continue
            # A response's last token predicts nothing, so it is not computed. The prompt's last
            # token predicts the first token of every response.
            computed = len(response) - 1
            response_at = range(len(tokens), len(tokens) + computed)
            predictors += [prompt_at[-1], *response_at]
            targets += response
            if computed == 0:
                continue
            tokens += response[:-1]
            positions += range(len(prompt), len(prompt) + computed)
            keys_at += [*prompt_at, *response_at]
            queries.append(computed)
            keys.append(len(prompt) + computed)

    def on_device(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=device)

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    sequences = Sequences(on_device(keys_at), ends(queries), ends(keys), max(queries), max(keys))
    return Row(
        on_device([tokens]),
        on_device([positions]),
        on_device(predictors),
        on_device(targets),
        sequences,
    )


class Policy(nn.Module):
    """A causal language model `lm`, from the directory `source`."""

    def __init__(self, lm, source: Path):
        super().__init__()
        self.lm = lm
        self.source = source

    def forward(self, row: Row, temperature: float) -> Tensor:
        """Log-probs (N,) of the responses' tokens at that temperature, float32."""
        output = self.lm.base_model(
            input_ids=row.tokens,
            position_ids=row.positions,
            use_cache=False,
            sequences=row.sequences,
        )
        hidden = output.last_hidden_state[0].index_select(0, row.predictors)  # (N, H)
        head = self.lm.get_output_embeddings().weight  # (V, H)
        return LogProbs.apply(hidden, head, row.targets, temperature)

    def use_kernels(self, kernels: str, flash_attention_3: bool = False) -> None:
        """How the decoder's layers are computed. kernels: eager, as transformers does; compile, by
        torch.compile, layer by layer; liger, norms, rotary and SwiGLU by the package liger-kernel.
        flash_attention_3: `varlen_attn` becomes that of the package flash_attn_interface.
        """
        if flash_attention_3:
            from torch.nn.attention import activate_flash_attention_impl  # older torch lacks it

            activate_flash_attention_impl("FA3")
        if kernels == "compile":
            for layer in self.lm.base_model.layers:
                layer.compile(dynamic=True)  # once for rows of all sizes
        if kernels == "liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            # LogProbs stands in for the head and its loss.
            _apply_liger_kernel_to_instance(
                model=self.lm, cross_entropy=False, fused_linear_cross_entropy=False
            )

    def recompute(self, mode: str, tokens: int) -> None:
        """Should activations be computed again in the backward pass? If so, they are from now on.

        mode: on, off, or auto. auto: on a GPU, if the activations of so many tokens would take 0.4
        of its memory or more. tools/simulate.py finds 20 x hidden + 8 x intermediate bytes a token
        and layer.
        """
        config = self.lm.config
        wanted = mode == "on"
        if mode == "auto" and next(self.parameters()).device.type != "cpu":
            per_layer = 20 * config.hidden_size + 8 * config.intermediate_size
            kept = tokens * config.num_hidden_layers * per_layer
            wanted = kept > 0.4 * torch.cuda.get_device_properties().total_memory
        if wanted:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
            self.lm.train()  # transformers recomputes only in this mode; there is no dropout


# Attention


def _prompt_once(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float,
    sequences: Sequences,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    query (1, H, S, D), key and value (1, fewer H, S, D) -> (1, S, H, D). A prompt's keys and values
    are copied for each response. An ordinary kernel for sequences of different lengths does the
    rest: no mask, and no work that is thrown away. sliding_window: how many keys a token of this
    layer sees, its own among them. A response's keys follow its prompt's, so windows are exact.
    """
    args = query[0], key[0], value[0], scaling, sequences, sliding_window
    if query.is_cuda:
        return _attend_on_cuda(*args), None
    # The copies are made again in the backward pass, to save memory.
    return checkpoint(_attend_on_cpu, *args, use_reentrant=False), None


def _attend_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sequences: Sequences,
    window: int | None = None,
) -> Tensor:
    """(H, S, D) -> (1, S, H, D), by FlashAttention's kernel. It wants half precision."""
    query = query.transpose(0, 1)  # (S, H, D)
    key = key.transpose(0, 1).index_select(0, sequences.keys_at)
    value = value.transpose(0, 1).index_select(0, sequences.keys_at)
    left = -1 if window is None else window - 1  # keys before the query's own; -1: all
    out = varlen_attn(
        query,
        key,
        value,
        sequences.query_ends,
        sequences.key_ends,
        sequences.max_queries,
        sequences.max_keys,
        scale=scaling,
        window_size=(left, 0),  # causal: none after it
        **GQA,
    )
    return out[None]


def _attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sequences: Sequences,
    window: int | None = None,
) -> Tensor:
    """The same, sequence by sequence, in any precision."""
    queries = query.split(sequences.query_ends.diff().tolist(), 1)
    key_lengths = sequences.key_ends.diff().tolist()
    keys = key.index_select(1, sequences.keys_at).split(key_lengths, 1)
    values = value.index_select(1, sequences.keys_at).split(key_lengths, 1)
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):  # (heads, length, D)
        n = q.shape[1]
        seen = k.shape[1]
        mask = None
        # Query i stands at place seen - n + i. It sees the keys up to there, `window` at most.
        if n < seen or window is not None:
            mask = torch.ones(n, seen, dtype=torch.bool).tril(seen - n)
        if window is not None:
            mask = mask.triu(seen - n - window + 1)
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(out[0])
    return torch.cat(outputs, 1).transpose(0, 1)[None]


AttentionInterface.register("prompt_once", _prompt_once)


# Log-probs


class LogProbs(torch.autograd.Function):
    """hidden (N, H), output head (V, H), targets (N,), temperature -> log-probs (N,), float32.

    Logits exist for some tokens at a time, so memory does not grow with N x V, and are computed
    again in the backward pass. They are in float32: rounded to bfloat16 they alone would move a
    log-prob by .01 to .04. The head's gradient is summed in float32, because a sum of rounded parts
    would lose what is small. Autograd rounds it to the head's dtype.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> Tensor:
        chunk = LOGITS_ON_GPU if hidden.is_cuda else LOGITS_ON_CPU
        logps = []
        normalizers = []
        for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = product(h, head.T).div_(temperature)  # (chunk, V)
            normalizer = logits.logsumexp(-1)  # (chunk,)
            logps.append(logits.gather(-1, target[:, None]).squeeze(-1) - normalizer)
            normalizers.append(normalizer)
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, head, targets, torch.cat(normalizers))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, head, targets, normalizers = ctx.saved_tensors
        grad = grad / ctx.temperature
        d_hidden = []
        d_head = None
        if ctx.needs_input_grad[1]:  # with LoRA the head is frozen
            d_head = torch.zeros_like(head, dtype=torch.float32)
        chunks = [x.split(ctx.chunk) for x in (hidden, targets, normalizers, grad)]
        for h, target, normalizer, g in zip(*chunks, strict=True):
            # d logp / d logits = [token is the target] - its probability
            d = product(h, head.T).div_(ctx.temperature)
            d = d.sub_(normalizer[:, None]).exp_().mul_(-g[:, None])
            d = d.scatter_add_(-1, target[:, None], g[:, None])
            d = d.to(h.dtype)  # in half precision for the products
            d_hidden.append(d @ head)
            if d_head is None:
                continue
            if d.dtype == torch.float32:
                d_head.addmm_(d.T, h)
            else:
                d_head.add_(product(d.T, h))
        return torch.cat(d_hidden), d_head, None, None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32 also where a and b are in half precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# Loading and sharding


def make_mesh(device: torch.device) -> DeviceMesh | None:
    """How the policy is sharded: over a node's ranks, with a replica on every node (HSDP).

    None on one CPU rank.
    """
    if WORLD == 1 and device.type == "cpu":
        return None
    nodes = WORLD // LOCAL_WORLD
    mesh = init_device_mesh(
        device.type, (nodes, LOCAL_WORLD), mesh_dim_names=("replicate", "shard")
    )
    return mesh if nodes > 1 else mesh["shard"]


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load(
    path: Path,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    lora: Lora | None = None,
) -> Policy:
    """A checkpoint as a policy with weights in `dtype`. All ranks must call it.

    lora: only adapters, in float32, are trained; infra/adapters.py.

    Each rank reads its own shard, and never holds more. On GPUs a layer is gathered and computed in
    bfloat16, and gradients are reduced in float32. There is no dropout: log-probs must be those of
    the policy that sampled. Raises InputError for missing or quantized weights.
    """
    refuse_quantized(path)
    lm = skeleton(path, dtype, lora)
    policy = Policy(lm, path)
    if not lora:
        policy.requires_grad_(trained)
    if mesh:
        shard(policy, mesh, compute_dtype(device))
    buffers = dict(lm.named_buffers())
    policy.to_empty(device=device)
    for name, buffer in buffers.items():  # computed, not loaded, such as the rotary frequencies
        lm.get_buffer(name).copy_(buffer)
    lm.tie_weights()  # to_empty has parted them
    saved_tensors = weights(path)
    for name, parameter in lm.named_parameters():
        if adapters.is_adapter(name):
            continue
        name = adapters.plain_name(name)
        if name not in saved_tensors:
            raise InputError(f"{path} lacks weights that its config.json asks for, {name} for one")
        saved = saved_tensors[name].get_slice(name)
        shape = [*parameter.shape]
        if saved.get_shape() != shape:
            raise InputError(
                f"{path}: {name} has the shape {saved.get_shape()}, "
                f"its config.json asks for {shape}"
            )
        fill(parameter, saved, mesh)
    if lora:
        adapters.initialize(lm, lora.seed, functools.partial(fill, mesh=mesh))
    return policy


def skeleton(path: Path, dtype: torch.dtype, lora: Lora | None = None):
    """The model of a checkpoint's config.json, without memory for its weights."""
    config = AutoConfig.from_pretrained(path)
    if has_own_head(path):
        config.tie_word_embeddings = False  # transformers does so, too; checkpoints will say it
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="prompt_once"
        )
        if lora:
            adapters.inject(lm, lora)
    lm.tie_weights()
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return lm.eval()


def shard(policy: Policy, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Deals the parameters out, a decoder layer at a time, and the rest together."""
    trained = next(policy.parameters()).requires_grad  # embeddings and head; not with LoRA
    precision = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
    # None, FSDP2's default: gathered weights are freed after a forward, except embeddings and head,
    # which a backward pass needs first. True: those, too. A reference has no backward pass; with
    # LoRA they are gathered again for it.
    reshard = None if trained else True
    for unit in [*policy.lm.base_model.layers, policy]:
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)


def fill(parameter: nn.Parameter, saved, mesh: DeviceMesh | None) -> None:
    """Copies a saved tensor, of which a sharded parameter has some rows."""
    if not isinstance(parameter, DTensor):
        parameter.data.copy_(saved[:])
        return
    rows = math.ceil(len(parameter) / mesh["shard"].size())  # as torch.chunk deals them out
    first = min(len(parameter), rows * mesh["shard"].get_local_rank())
    parameter.to_local().data.copy_(saved[first : first + rows])


# Handing weights on


@torch.no_grad()
def full_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of all parameters; tied ones under both names.

    Sharded ones are gathered a decoder layer at a time, on all ranks in one order, and given up
    again: no rank holds a second copy of the model.
    """
    units = [(name, m) for name, m in policy.named_modules() if isinstance(m, FSDPModule)]
    for prefix, unit in units or [("", policy)]:
        if isinstance(unit, FSDPModule):
            unit.unshard()
        own = []
        for name, parameter in unit.named_parameters(prefix, remove_duplicate=False):
            # The unit's own parameters are whole now. A DTensor is a nested unit's, still sharded.
            if not isinstance(parameter, DTensor):
                own.append((name, parameter))
        for name, tensor in adapters.merge(policy, own):
            # A copy: the receiver may keep it until a whole layer is there.
            yield name.removeprefix("lm."), tensor.to(dtype, copy=True)
        if isinstance(unit, FSDPModule):
            unit.reshard()


@torch.no_grad()
def save_policy(policy: Policy, tokenizer, dtype: torch.dtype, path: Path) -> None:
    """Writes a checkpoint that transformers and vLLM load as it is. All ranks must call it.

    dtype: the original's. An adapter is merged; by itself it is in the folder `adapter`. Raises
    InputError on all ranks if it cannot be written.
    """
    lm = policy.lm
    part = path.with_name(path.name + ".part")
    merged = on_cpu_of_rank_0(adapters.merge(lm, lm.named_parameters()), dtype)
    adapter = on_cpu_of_rank_0(adapters.own_parameters(lm), torch.float32)

    def write() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            save_torch_state_dict(merged, part)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        lm.config.dtype = dtype
        lm.config.save_pretrained(part)
        if adapter:
            adapters.save(lm, adapter, part / "adapter")
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


def on_cpu_of_rank_0(
    parameters: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parameters, whole, in rank 0's main memory; {} on other ranks. All must call it."""
    gathered = {}
    for name, parameter in parameters:
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if RANK == 0:
            gathered[name] = full.to("cpu", dtype)
    return gathered
