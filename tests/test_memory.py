"""The plan of a GPU's memory: what can be counted is counted, and each way not to fit has its sentence."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import memory
import policy as policies
from options import parse_args
from rewards import InputError


def choose(size: str, checkpointing: str = "auto", gpu: float = 80.0, gpus: int = 8, tp: int = 1, share: float = 0.4,
           tokens: int = 16384, longest: int = 4096, reference: bool = False):
    return memory.choose(checkpointing, memory.qwen(size), gpu, gpus, tp, share, tokens, longest, reference, gpu=gpu)


@pytest.mark.parametrize(("size", "parameters"), [("1.5B", 1.54e9), ("3B", 3.09e9), ("7B", 7.62e9), ("14B", 14.77e9)])
def test_parameters_are_qwens(size, parameters):
    whole, layer = memory.count(memory.qwen(size))
    assert whole == pytest.approx(parameters, rel=0.01)
    layers, hidden, *_, vocabulary, tied = memory.QWEN[size]
    assert whole == layer * layers + (1 if tied else 2) * vocabulary * hidden + hidden  # embeddings, head and last norm


def test_weights_gradients_and_adamw_are_16_bytes_a_parameter_over_the_shards():
    n, _ = memory.count(memory.qwen("7B"))
    for gpus in (1, 8):
        _, plan, _ = choose("7B", gpus=gpus)
        assert sum(plan[name] for name in ("weights", "gradients", "AdamW")) * 2**30 == pytest.approx(16 * n / gpus, rel=1e-12)
    _, plan, _ = choose("7B", reference=True)
    assert plan["reference"] * 2**30 == pytest.approx(2 * n / 8, rel=1e-12) and plan["engine"] == 0.4 * 80
    assert plan["one response"] * 2**30 == 2 * (28 * 2 * 4 * 128) * 4096  # bfloat16 keys and values, 4 heads of 128, 28 layers


def test_7b_on_8_gpus_fits_and_recomputes_only_if_it_must():
    checkpointing, plan, wrong = choose("7B")
    assert wrong is None and plan["while updating"] < 76 and plan["while sampling"] < 76
    assert checkpointing == (choose("7B", "off")[2] is not None)
    assert choose("1.5B", gpu=80, tokens=8192)[0] is False and choose("7B", tokens=32768)[0] is True
    assert choose("7B", "on")[1]["activations"] < choose("7B", "off")[1]["activations"] / 5


@pytest.mark.parametrize(("options", "message"), [
    ({"size": "7B", "gpus": 1}, "sampling needs more than there is: lower --gpu-memory, or use more GPUs"),
    ({"size": "7B", "share": 0.15}, "no room for 14 GiB of weights and a KV cache: raise --gpu-memory, or spread the engine over more GPUs with --tp"),
    ({"size": "7B", "longest": 10**6}, "no room for 14 GiB of weights and a KV cache"),
    ({"size": "7B", "gpus": 2, "share": 0.25}, "the update needs more than there is: use more GPUs"),
    ({"size": "7B", "tokens": 200_000}, "the update needs more than there is: lower --tokens-per-microbatch"),
    ({"size": "7B", "tokens": 200_000, "checkpointing": "off"}, "lower --tokens-per-microbatch, or leave out --gradient-checkpointing off"),
    ({"size": "7B", "gpus": 1, "share": 0.0}, "sampling needs more"),  # transformers' generate
])
def test_each_way_not_to_fit_has_its_sentence(options, message):
    assert message in choose(**options)[2]
    helped = {"gpus": 8, "tokens": 16384, "longest": 4096, "share": 0.4, "checkpointing": "auto"}
    assert choose(**{**options, **helped})[2] is None


def test_more_gpus_for_an_engine_are_less_of_its_weights_on_each():
    assert choose("14B", share=0.33)[2].startswith("vLLM's share of 26 GiB has no room for 28 GiB") and choose("14B", share=0.33, tp=2)[2] is None


def test_the_check_before_anything_is_loaded(monkeypatch, tmp_path, tiny, capsys):
    """On a CPU there is no plan; on a GPU it is printed, or it stops the run with one sentence."""
    def check(path, *options):
        return memory.check(parse_args("", ["--model", "m", "--engine", "vllm", *options]), path, 500)

    assert [check(tiny, "--gradient-checkpointing", x) for x in ("auto", "on", "off")] == [False, True, False]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    assert [check(tiny, "--gradient-checkpointing", x) for x in ("auto", "on", "off")] == [False, True, False]
    assert "memory of each GPU, estimated, of 80 GiB: weights 0.0" in (said := capsys.readouterr().out) and said.count("\n") == 3
    memory.qwen("7B").save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match="^m does not fit 1 GPUs of 80 GiB, by estimate: sampling needs more"):
        check(tmp_path / "large")


def test_the_rule_for_activations_is_what_autograd_saves():
    """One layer in bfloat16, its parameters left out. The CPU's attention saves a little less than the GPU's will."""
    config = memory.qwen("1.5B")
    config.num_hidden_layers, config.vocab_size = 1, 1000
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="prompt_once")
    row = policies.pack([([5] * 100, [[6] * 21] * 8)], torch.device("cpu"))
    own, kept = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        lm.base_model(input_ids=row.tokens, position_ids=row.positions, use_cache=False, sequences=row.sequences)
    a_token = sum(x.untyped_storage().nbytes() for x in kept.values()) / row.tokens.numel()
    assert 0.85 < a_token / memory.layer_activations(config) < 1.05
