"""The table of a GPU's memory: what can be counted is counted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import policy as policies
from bench import memory
from bench.memory import Setting
from local import models


def plan(size: str, **changed) -> dict[str, float]:
    config = models.qwen(size)
    return memory.estimate(config, memory.count(config), Setting(**changed))


@pytest.mark.parametrize(("size", "parameters"), [("1.5B", 1.54e9), ("3B", 3.09e9), ("7B", 7.62e9), ("14B", 14.77e9)])
def test_parameters_are_qwens(size, parameters):
    whole, layer = memory.count(models.qwen(size))
    assert whole == pytest.approx(parameters, rel=0.01)
    layers, hidden, *_, vocabulary, tied = models.QWEN[size]
    assert whole == layer * layers + (1 if tied else 2) * vocabulary * hidden + hidden  # embeddings, head and last norm


def test_weights_gradients_and_adamw_are_16_bytes_a_parameter_over_the_shards():
    n, _ = memory.count(models.qwen("7B"))
    for gpus in (1, 8):
        assert sum(plan("7B", gpus=gpus)[name] for name in ("weights", "gradients", "AdamW")) * 2**30 == pytest.approx(16 * n / gpus, rel=1e-12)
    got = plan("7B")["one response"] * 2**30
    assert got == 2 * (28 * 2 * 4 * 128) * 4096  # bfloat16 keys and values, 4 heads of 128, 28 layers


def test_7b_on_8_gpus_fits_and_recomputes_only_if_it_must():
    assert max(plan("7B", checkpointing=True)[when] for when in ("while updating", "while sampling")) < 76
    assert memory.cell("7B", 8).endswith(", gc") and not memory.fits(plan("7B"), 79.1)
    assert not memory.cell("1.5B", 8).endswith("gc") and memory.fits(plan("1.5B"), 79.1)
    assert plan("7B", checkpointing=True)["activations"] < plan("7B")["activations"] / 5


@pytest.mark.parametrize("changed", [
    {"gpus": 1},  # while sampling
    {"share": 0.15}, {"longest": 10**6},  # no room for vLLM's weights, or for one response
    {"gpus": 2, "share": 0.25}, {"tokens": 200_000},  # while updating
])
def test_each_way_not_to_fit(changed):
    assert not memory.fits(plan("7B", checkpointing=True, **changed), 80)
    assert memory.fits(plan("7B", checkpointing=True), 80) and memory.cell("7B", 1) == "does not fit"


def test_the_rule_for_activations_is_what_autograd_saves():
    """One layer in bfloat16, its parameters left out. The CPU's attention saves a little less than the GPU's will."""
    config = models.qwen("1.5B")
    config.num_hidden_layers, config.vocab_size = 1, 1000
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="prompt_once")
    row = policies.pack([([5] * 100, [[6] * 21] * 8)], torch.device("cpu"))
    parameters, kept = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        lm.base_model(input_ids=row.tokens, position_ids=row.positions, use_cache=False, sequences=row.sequences)
    a_token = sum(x.untyped_storage().nbytes() for x in kept.values()) / row.tokens.numel()
    assert 0.85 < a_token / memory.layer_activations(config) < 1.05
