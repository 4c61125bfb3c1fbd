"""One row of several prompts and all their responses must be exactly one sequence a response, in
little memory."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import policy as policies
from infra import pretrained
from infra.ranks import InputError
from local import hf
from policy import pack

CPU = torch.device("cpu")


def tokens(length: int, first: int = 5) -> list[int]:
    return [3 + (first * i + i * i) % 900 for i in range(first, first + length)]


GROUPS = [
    (tokens(150), [tokens(5), tokens(1), [], tokens(3, 40), tokens(200, 2)]),
    ([17], [tokens(2), tokens(90, 9)]),
    (tokens(30, 8), [tokens(1, 50), tokens(300, 4)]),
    ([20, 21], [[]]),
]


def gradient(module) -> dict[str, torch.Tensor]:
    grads = {name.removeprefix("lm."): p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return grads


def separate_logp(lm, groups, temperature) -> torch.Tensor:
    """The obvious way: transformers, each response behind its own copy of the prompt, unpadded."""
    out = []
    for prompt, responses in groups:
        for response in filter(None, responses):
            logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logp = (logits / temperature).log_softmax(-1)
            out.append(logp.gather(-1, torch.tensor(response)[:, None]).squeeze(-1))
    return torch.cat(out)


def logp_of(policy, groups, temperature: float = 1.0) -> list[list[torch.Tensor]]:
    """Log-probs, for each prompt and response."""
    with torch.no_grad():
        values = policy(pack(groups, CPU), temperature)
    parts = [*values.split([len(response) for _, responses in groups for response in responses])]
    out = []
    for _, responses in groups:
        out.append(parts[: len(responses)])
        del parts[: len(responses)]
    return out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["tiny", "llama"])
def test_one_row_is_exactly_separate_sequences(request, architecture, checkpointing):
    """Log-probs and the gradient of every parameter, with more tokens than logits at a time.

    Qwen2 has tied embeddings and biases, Llama neither."""
    path, results = request.getfixturevalue(architecture), []
    n = sum(len(response) for _, responses in GROUPS for response in responses)
    assert n > policies.LOGITS_ON_CPU
    weights = torch.randn(n, generator=torch.Generator().manual_seed(0))
    packed = policies.load(path, CPU)
    if checkpointing:
        packed.recompute("on", 0)
    lm = hf.load(path, CPU)
    for module, logp in (
        (packed, packed(pack(GROUPS, CPU), 0.7)),
        (lm, separate_logp(lm, GROUPS, 0.7)),
    ):
        assert logp.dtype == torch.float32
        (weights * logp).mean().backward()
        results.append((logp.detach(), gradient(module)))
    (logp, grads), (exact, exact_grads) = results
    torch.testing.assert_close(logp, exact, atol=1e-4, rtol=0)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert (grad - exact_grads[name]).norm() <= 1e-5 * exact_grads[name].norm(), name


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Qwen3Config, {}),
        (Phi3Config, {}),
        (SmolLM3Config, {"no_rope_layers": [1, 0]}),
        (MistralConfig, {"sliding_window": None}),
        # Prompts of GROUPS are longer than these windows, and so are some responses.
        (MistralConfig, {"sliding_window": 7}),
        (Phi3Config, {"sliding_window": 3}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        (SmolLM3Config, {"use_sliding_window": True, "sliding_window": 1}),
    ],
    ids=lambda value: getattr(value, "model_type", None) or str(value.get("sliding_window", "")),
)
def test_other_architectures(config, options, tmp_path):
    """Log-probs of those that are not refused (pretrained.TRAINABLE), some with sliding windows."""
    small = config(
        vocab_size=1003,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path)
    assert config.model_type in pretrained.TRAINABLE
    with torch.no_grad():
        packed = policies.load(tmp_path, CPU)(pack(GROUPS, CPU), 0.7)
        exact = separate_logp(hf.load(tmp_path, CPU), GROUPS, 0.7)
    torch.testing.assert_close(packed, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("g", "i", "changed"),
    [
        (0, 0, {(0, 0)}),
        (0, 1, {(0, 1)}),
        (1, 0, {(1, 0)}),
        (0, None, {(0, 0), (0, 1)}),
        (1, None, {(1, 0)}),
    ],
)
def test_a_response_sees_its_prompt_and_nothing_else(tiny_policy, g, i, changed):
    """A changed token of a response moves its log-probs from there on; one of a prompt (i = None)
    moves the log-probs of all its responses. No others move, beyond rounding."""
    groups = [(tokens(40), [tokens(9), tokens(6, 30)]), (tokens(10, 70), [tokens(8, 11)])]
    before = logp_of(tiny_policy, groups)
    prompt, responses = groups[g]
    (prompt if i is None else responses[i])[4] = 999
    after = logp_of(tiny_policy, groups)
    for p, _ in enumerate(groups):
        for r, (a, b) in enumerate(zip(after[p], before[p], strict=True)):
            moved = (a - b).abs()
            if (p, r) in changed:
                assert moved[:4].max() < 1e-5 or i is None
                assert moved[4:].max() > 1e-3
            else:
                assert moved.max() < 1e-5


def test_a_row_without_any_response_token(tiny):
    policy = policies.load(tiny, CPU)
    logp = policy(pack([(tokens(5), [[], []])], CPU), 1.0)
    logp.sum().backward()
    assert logp.shape == (0,)
    assert all(grad is None or not grad.any() for grad in gradient(policy).values())


# Memory


class Vocabulary(TorchDispatchMode):
    """Of all tensors (n, V) that are made, the largest n, and the most bytes they hold at once."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.rows = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}  # storages and their bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.size,) and x._base is None:
                self.rows = max(self.rows, x.numel() // self.size)
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {
            key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()
        }
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch, llama, vocabulary):
    """Forward and backward: at most LOGITS_ON_CPU rows of logits at a time, however many tokens."""
    monkeypatch.setattr(policies, "LOGITS_ON_CPU", 128)
    policy, lm, seen = policies.load(llama, CPU), hf.load(llama, CPU), {}
    for n in (512, 1024):
        groups = [(tokens(20), [tokens(n // 4, first) for first in (1, 2, 3, 4)])]
        with Vocabulary(vocabulary) as seen[n]:
            policy(pack(groups, CPU), 1.0).sum().backward()
        with Vocabulary(vocabulary) as plain:
            separate_logp(lm, [(tokens(20), [tokens(n)])], 1.0).sum().backward()
        assert seen[n].rows == 128 and plain.rows >= n  # what would be seen
    assert seen[512].peak == seen[1024].peak < plain.peak / 4


def test_a_compiled_layer_is_compiled_for_the_first_two_rows_alone(monkeypatch, tiny):
    """The second time with free sizes. A layer is given no lists, which would be compiled in."""
    from torch._dynamo.utils import counters

    # Set where another test has loaded vLLM (local/cpu.py):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    counters.clear()
    looping = torch.compiler.disable(policies._attend_on_cpu)  # it loops over sequences
    monkeypatch.setattr(policies, "_attend_on_cpu", looping)
    policy, plain, compiled = policies.load(tiny, CPU), policies.load(tiny, CPU), []
    for layer in policy.lm.base_model.layers:
        layer.compile(backend="aot_eager")
    for prompt, responses in [
        (30, (4, 5, 9)),
        (50, (7, 2)),
        (61, (3, 3, 3, 12)),
        (13, (40,)),
        (99, (5, 6, 7, 8, 9)),
    ]:
        row = pack([(tokens(prompt), [tokens(n) for n in responses])], CPU)
        logp = policy(row, 1.0)
        logp.sum().backward()
        torch.testing.assert_close(logp, plain(row, 1.0))
        compiled.append(counters["stats"]["unique_graphs"])
    assert 0 < compiled[0] < compiled[1] == compiled[-1]


# Checkpoints


@pytest.mark.parametrize("architecture", ["tiny", "llama"])
def test_full_weights_and_a_saved_checkpoint_are_the_policy(request, tmp_path, architecture, tiny):
    """Names and numbers as transformers has them, tied ones under both names."""
    path = request.getfixturevalue(architecture)
    policy, tokenizer = policies.load(path, CPU), AutoTokenizer.from_pretrained(tiny)
    policies.save_policy(policy, tokenizer, torch.float32, tmp_path / "saved")
    for there in (path, tmp_path / "saved"):
        full = dict(policies.full_weights(policy, torch.float32))
        expected = dict(hf.load(there, CPU).named_parameters(remove_duplicate=False))
        assert full.keys() == expected.keys() and "lm_head.weight" in full
        assert all(torch.equal(full[name], expected[name]) for name in full)
        assert full["lm_head.weight"].data_ptr() != policy.lm.lm_head.weight.data_ptr()  # copies
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == load_file(path / "model.safetensors").keys()
    policies.save_policy(policy, tokenizer, torch.bfloat16, tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert policy.lm.dtype == torch.float32


def test_a_loaded_policy_is_what_transformers_loads(tiny):
    """Also buffers that are in no file; without dropout, which recomputing would switch on."""
    for checkpointing in (False, True):
        policy, lm = policies.load(tiny, CPU), hf.load(tiny, CPU)
        if checkpointing:
            policy.recompute("on", 0)
        buffers = dict(policy.lm.named_buffers())
        assert all(torch.equal(value, buffers[name]) for name, value in lm.named_buffers())
        assert logp_of(policy, GROUPS)[0][0].equal(logp_of(policy, GROUPS)[0][0])
    half = policies.load(tiny, CPU, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_checkpoint_that_does_not_fit_its_config(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "odd")
    config = (tmp_path / "odd/config.json").read_text()
    (tmp_path / "odd/config.json").write_text(
        config.replace('"intermediate_size": 384', '"intermediate_size": 380')
    )
    shapes = r"has the shape \[384, 128\], its config.json asks for \[380, 128\]"
    with pytest.raises(InputError, match=rf"mlp\.gate_proj\.weight {shapes}"):
        policies.load(tmp_path / "odd", CPU)


def test_a_checkpoint_with_an_odd_generation_config_can_be_saved(tmp_path, tiny):
    """Some models have a temperature without do_sample, which transformers refuses to write."""
    shutil.copytree(tiny, tmp_path / "odd")
    (tmp_path / "odd/generation_config.json").write_text(
        '{"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.9}'
    )
    policy, tokenizer = policies.load(tmp_path / "odd", CPU), AutoTokenizer.from_pretrained(tiny)
    policies.save_policy(policy, tokenizer, torch.float32, tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [2, 0]
    pretrained.load_tokenizer(tmp_path / "saved")


# The kernel for GPUs


def varlen(
    query,
    key,
    value,
    query_ends,
    key_ends,
    longest_query,
    longest_key,
    *,
    scale,
    window_size,
    enable_gqa=False,
):
    """As torch's varlen_attn, token by token: aligned at the end, as in FlashAttention."""
    assert query_ends.dtype == key_ends.dtype == torch.int32 and window_size == (-1, 0)
    assert enable_gqa == bool(policies.GQA)  # torch 2.11 has no such argument
    assert longest_query == query_ends.diff().max() and longest_key == key_ends.diff().max()
    out = torch.empty_like(query)
    repeat = query.shape[1] // key.shape[1]
    for q0, q1, k0, k1 in zip(query_ends, query_ends[1:], key_ends, key_ends[1:], strict=False):
        for i in range(q1 - q0):
            seen = slice(k0, k1 - (q1 - q0) + i + 1)
            k, v = (x[seen].repeat_interleave(repeat, 1) for x in (key, value))  # (seen, H, D)
            attention = (scale * torch.einsum("hd,khd->kh", query[q0 + i], k)).softmax(0)
            out[q0 + i] = torch.einsum("khd,kh->hd", v, attention)
    return out


def heads(row, dtype=torch.float32, device=CPU) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, row.tokens.shape[1], 32, generator=generator)
        .to(device, dtype)
        .requires_grad_()
        for n in (4, 2, 2)
    ]


def test_the_gpu_kernel_is_given_the_same_attention(monkeypatch):
    monkeypatch.setattr(policies, "varlen_attn", varlen)
    row = pack([(tokens(7), [tokens(4), tokens(1), tokens(6)]), ([9], [tokens(3)])], CPU)
    there = policies._attend_on_cuda(*heads(row), 0.2, row.sequences)
    here = policies._attend_on_cpu(*heads(row), 0.2, row.sequences)
    assert there.shape == (1, row.tokens.shape[1], 4, 32)
    torch.testing.assert_close(there, here, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_kernel_itself():
    device = torch.device("cuda")
    here, there = pack(GROUPS, CPU), pack(GROUPS, device)
    exact, half = heads(here), heads(there, torch.bfloat16, device)
    for row, inputs, attend in (
        (here, exact, policies._attend_on_cpu),
        (there, half, policies._attend_on_cuda),
    ):
        attend(*inputs, 0.2, row.sequences).float().square().sum().backward()
    for a, b in zip(exact, half, strict=True):
        assert (a.grad - b.grad.float().cpu()).norm() < 0.02 * a.grad.norm()
