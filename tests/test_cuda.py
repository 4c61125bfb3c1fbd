"""What is different on a GPU, as far as a CPU can tell."""

import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import policy as policies
import rollout
import train
import update
from config import TrainConfig
from infra import pretrained, ranks
from infra.ranks import InputError
from local import hf


def head_and_logp(n: int):
    """Hidden states and an output head in bfloat16 whose largest logits are about 20, and exact log-probs from them."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(rows, 64, generator=generator).mul(0.7).bfloat16().requires_grad_()
        for rows in (n, 3000)
    )
    targets = torch.randint(3000, (n,), generator=generator)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    return (
        hidden,
        head,
        targets,
        exact,
        (exact[0] @ exact[1].T / 0.5).log_softmax(-1).gather(-1, targets[:, None])[:, 0],
    )


def test_logits_of_half_precision_are_not_rounded_and_the_head_s_gradient_is_summed_in_float32():
    """By the way over chunks; rounding the logits alone would cost a thousand times as much."""
    hidden, head, targets, exact, expected = head_and_logp(3 * policies.LOGITS_ON_CPU + 5)
    logp = policies.LogProbs.apply(hidden, head, targets, 0.5)
    rounded = ((hidden @ head.T).float() / 0.5).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert (
        logp.dtype == torch.float32
        and (logp - expected).abs().max() < 2e-5 < 0.01 < (rounded - expected).abs().mean()
    )
    weights = torch.linspace(-1, 1, len(targets))
    (logp * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert (
        head.grad.dtype == torch.bfloat16
    )  # rounded once, and so is what is multiplied: 2^-9 each
    for half, full in zip((hidden, head), exact, strict=True):
        assert (half.grad - full.grad).norm() < 0.005 * full.grad.norm()


def test_a_gpu_that_cannot_be_used_is_one_sentence(monkeypatch):
    """No fall back on the CPU. compute capability 7.5 has no bfloat16, and no kernel."""
    exists = os.path.exists
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        os.path, "exists", lambda path: path == "/proc/driver/nvidia/version" or exists(path)
    )
    with pytest.raises(InputError, match=r"CUDA 13\.0 cannot use the GPU: .*580 or newer"):
        ranks.join()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(InputError, match=r"Tesla T4 is too old: compute capability 8\.0"):
        ranks.join()


def test_what_loading_raises_is_kept_in_a_file():
    with (
        pytest.raises(
            InputError,
            match=r"--model x cannot be loaded \(RuntimeError: engine core died\); all of it is in ",
        ) as raised,
        pretrained.readable("x"),
    ):
        raise RuntimeError("engine core died\nmore")
    file = Path(re.search(r"all of it is in (.*)", str(raised.value))[1])
    assert file.read_text().startswith("Traceback") and "more" in file.read_text()
    file.unlink()


def test_vllm_is_told_how_much_to_do_at_a_time_and_to_keep_the_head_in_float32(monkeypatch):
    given = {}
    monkeypatch.setitem(
        sys.modules,
        "vllm",
        types.SimpleNamespace(LLM=lambda path, **options: given.update(options)),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = rollout.VLLMEngine(Path("x"), rollout.Decoding(None, [], 1.0, 8), 100, 0.4)
    assert (
        given["max_num_seqs"] == 256
        and given["max_num_batched_tokens"] == 8192
        and given["enable_sleep_mode"]
        and engine.sleeps
    )
    assert (
        given["hf_overrides"] == {"tie_word_embeddings": False, "head_dtype": "float32"}
        and given["dtype"] == torch.bfloat16
    )


def test_moments_are_made_before_the_engine(monkeypatch, tiny):
    """What AdamW makes after it would keep blocks of memory that vLLM needs when it wakes up."""
    optimizers, make = [], update.make_optimizer
    monkeypatch.setattr(
        train, "make_optimizer", lambda *args: optimizers.append(make(*args)) or optimizers[0]
    )
    monkeypatch.setattr(
        hf,
        "load",
        lambda *args: optimizers.append({p: dict(s) for p, s in optimizers[0].state.items()}),
    )
    monkeypatch.setattr(hf, "HFEngine", lambda *args: None)
    config = TrainConfig(model=str(tiny), engine="hf", max_tokens=8)
    known = pretrained.describe(str(tiny), 8, trained=True)
    learner, _ = train.load(config, torch.device("cpu"), known, 20)
    made = optimizers[1]
    assert [*made] == [*learner.policy.parameters()] and all(
        {"step", "exp_avg", "exp_avg_sq"} <= made[p].keys() for p in made
    )


@pytest.mark.parametrize(
    ("size", "mode", "gib", "expected"),
    [
        ("1.5B", "auto", 79, False),
        ("3B", "auto", 79, True),
        ("3B", "auto", 139, False),
        ("7B", "auto", 79, True),
        ("1.5B", "on", 79, True),
        ("14B", "off", 79, False),
    ],
)
def test_activations_are_computed_again_where_there_is_no_room_for_them(
    monkeypatch, size, mode, gib, expected
):
    from local.models import qwen

    called = []
    policy = policies.Policy(torch.nn.Linear(1, 1), Path())
    policy.lm.config = qwen(size)
    policy.lm.gradient_checkpointing_enable = called.append
    monkeypatch.setattr(
        torch.nn.Module,
        "parameters",
        lambda self: iter([types.SimpleNamespace(device=torch.device("cuda"))]),
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(total_memory=gib * 2**30)
    )
    policy.recompute(mode, TrainConfig().tokens_per_microbatch)
    assert bool(called) == expected
