"""--lora: the policy begins as its base model, is trained as peft trains it, and leaves merged."""

import math
from pathlib import Path

import pytest
import torch
import updates
from conftest import on_ranks
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from programs import TINY, evaluate_here, run
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import policy as policies
import update
from config import TrainConfig, parse
from infra import adapters, ranks
from infra import state as states
from infra.adapters import Base, Lora
from infra.ranks import InputError
from infra.state import State
from local import hf

CPU = torch.device("cpu")
LORA = Lora(rank=4, alpha=8.0, seed=3, base="tiny")


@pytest.fixture
def policy(tiny):
    return policies.load(tiny, CPU, lora=LORA)


@pytest.fixture
def trained(policy):
    """A policy whose adapters are not those that it began with."""
    generator = torch.Generator().manual_seed(5)
    for _, parameter in adapters.own_parameters(policy.lm):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture(scope="module")
def row():
    groups = [([5, 6, 7, 8], [[9, 10, 11], [12, 13], [14]]), ([20, 21], [[22, 23, 24, 25]])]
    return policies.pack(groups, CPU)


def test_at_first_the_log_probs_are_those_of_the_base_model_to_the_bit(policy, tiny_policy, row):
    assert torch.equal(policy(row, 0.7), tiny_policy(row, 0.7))


def test_adapters_alone_are_trained_and_in_float32(tiny):
    policy = policies.load(tiny, CPU, dtype=torch.bfloat16, lora=LORA)
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert names == {f"lm.{name}" for name, _ in adapters.own_parameters(policy.lm)}
    layers = policy.lm.config.num_hidden_layers
    assert len(names) == layers * 7 * 2  # q k v o, gate up down; A and B
    for _, parameter in policy.named_parameters():
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == wanted
    (group,) = update.make_optimizer(policy, 1e-3).param_groups
    assert len(group["params"]) == len(names)


def test_the_seed_decides_a_and_b_is_zero(tiny, policy):
    same = policies.load(tiny, CPU, lora=LORA)
    other = policies.load(tiny, CPU, lora=LORA._replace(seed=4))
    for (name, a), (_, b), (_, c) in zip(
        *(adapters.own_parameters(p.lm) for p in (policy, same, other)), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (".lora_B." in name)
        bound = 0.0 if ".lora_B." in name else 1 / math.sqrt(a.shape[1])
        assert a.abs().max() <= bound


def peft_log_probs(lm, groups) -> torch.Tensor:
    """Of every response token, in order: one sequence a response, as peft's own layers compute."""
    logps = []
    for prompt, responses in groups:
        for response in responses:
            logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            every_word = log_softmax(logits.float(), -1)
            logps.append(every_word.gather(-1, torch.tensor(response)[:, None]).squeeze(-1))
    return torch.cat(logps)


def test_gradients_are_pefts_own_on_separate_sequences(tiny, trained):
    groups = [([5, 6, 7, 8], [[9, 10, 11], [12, 13], [14]]), ([20, 21], [[22, 23, 24, 25]])]
    weights = torch.linspace(-1, 1, 10)
    (trained(policies.pack(groups, CPU), 1.0) * weights).sum().backward()

    lm = hf.load(tiny, CPU)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=names), lm)
    ours = dict(adapters.own_parameters(trained.lm))
    for name, parameter in adapters.own_parameters(lm):
        parameter.data.copy_(ours[name].data)
    (peft_log_probs(lm, groups) * weights).sum().backward()
    for name, parameter in adapters.own_parameters(lm):
        error = (parameter.grad - ours[name].grad).norm()
        assert error <= 1e-5 * parameter.grad.norm() + 1e-9, name
    assert all(p.grad is None for p in trained.parameters() if not p.requires_grad)


@pytest.mark.parametrize("loads", ["transformers", "peft"])
def test_a_saved_checkpoint_is_the_trained_policy(tiny, trained, row, tmp_path, loads):
    policies.save_policy(
        trained, AutoTokenizer.from_pretrained(tiny), torch.float32, tmp_path / "checkpoint"
    )
    if loads == "transformers":  # the merged model, by our own loading, which transformers' equals
        again = policies.load(tmp_path / "checkpoint", CPU)
        assert not list(adapters.own_parameters(again.lm))
        assert (again(row, 1.0) - trained(row, 1.0)).abs().max() < 1e-5
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
        saved = dict(merged.named_parameters())
        for name, parameter in again.lm.named_parameters():
            assert torch.equal(saved[name], parameter)
    else:  # the adapter, on the model that it was trained on
        model = PeftModel.from_pretrained(hf.load(tiny, CPU), tmp_path / "checkpoint/adapter")
        own = dict(adapters.own_parameters(trained.lm))
        loaded = dict(adapters.own_parameters(model.base_model.model))
        assert own.keys() == loaded.keys()
        assert all(torch.equal(own[name], loaded[name]) for name in own)
        assert model.peft_config["default"].base_model_name_or_path == "tiny"


def test_the_engine_gets_merged_weights_under_plain_names(tiny, trained, tiny_policy, row):
    plain = dict(policies.full_weights(tiny_policy, torch.float32))
    merged = dict(policies.full_weights(trained, torch.float32))
    assert plain.keys() == merged.keys()
    again = policies.load(tiny, CPU)
    for name, parameter in again.lm.named_parameters():
        parameter.data.copy_(merged[name])
    assert (again(row, 1.0) - trained(row, 1.0)).abs().max() < 1e-5
    changed = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert len(changed) == trained.lm.config.num_hidden_layers * 7


def test_the_reference_of_the_kl_penalty_is_the_base_without_a_second_copy(
    trained, tiny_policy, row
):
    reference = Base(trained)
    logp = trained(row, 1.0)
    with torch.no_grad():
        assert torch.equal(reference(row, 1.0), tiny_policy(row, 1.0))
    assert not torch.equal(logp, tiny_policy(row, 1.0))
    logp.sum().backward()  # the adapters are on again, and get gradients
    assert all(p.grad is not None for _, p in adapters.own_parameters(trained.lm))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_has_the_gradient_of_full_training_projected_on_the_adapters(
    tiny, tiny_policy, checkpointing
):
    """With W + s B A the gradients are dB = s dW A^T and dA = s B^T dW. At first B is 0."""
    options = {"kl": 0.0, "limit": 200, "checkpointing": checkpointing}
    whole = updates.run(tiny, tiny, **options)
    adapted = updates.run(tiny, tiny, lora=LORA, **options)
    (d_weights,), (d_adapters,) = whole["gradients"], adapted["gradients"]
    names = [name for name, _ in tiny_policy.lm.named_parameters()]
    sizes = [parameter.numel() for _, parameter in tiny_policy.lm.named_parameters()]
    d_weight = dict(zip(names, d_weights.split(sizes), strict=True))

    initial = dict(adapters.own_parameters(policies.load(tiny, CPU, lora=LORA).lm))
    for name, a in initial.items():
        gradient, d_adapters = d_adapters.split([a.numel(), d_adapters.numel() - a.numel()])
        if ".lora_A." in name:
            assert not gradient.any()
            continue
        a = initial[name.replace(".lora_B.", ".lora_A.")]
        weight = name.replace(".lora_B.default", "")
        exact = 2.0 * d_weight[weight].view(-1, a.shape[1]) @ a.T
        assert (gradient.view_as(exact) - exact).norm() <= 1e-5 * exact.norm(), name


def test_two_ranks_train_save_and_resume_the_same_adapters(tiny, tmp_path):
    """Sharded, with a KL penalty. The reference begins as the policy: only rounding differs."""
    alone = updates.run(tiny, tiny, **TWO_RANKS)
    on_ranks(2, 2, tmp_path, tiny, module="test_lora")
    saved = policies.load(tmp_path / "checkpoint", CPU)
    merged = dict(policies.full_weights(alone["policy"], torch.float32))
    for name, parameter in saved.lm.named_parameters():
        torch.testing.assert_close(parameter, merged[name], atol=1e-6, rtol=0)
    resumed = policies.load(tiny, CPU, lora=LORA)
    optimizer = update.make_optimizer(resumed, 0.1)
    states.load(tmp_path / "state/step-1", resumed, optimizer)
    merged = dict(policies.full_weights(resumed, torch.float32))
    for name, parameter in saved.lm.named_parameters():
        torch.testing.assert_close(parameter, merged[name], atol=1e-7, rtol=0)


TWO_RANKS = {**updates.CASES["several"], "lora": LORA}


def main(out: Path, tiny: Path) -> None:
    """On a rank of two."""
    ranks.join()
    policy = updates.run(tiny, tiny, policies.make_mesh(CPU), **TWO_RANKS)["policy"]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    policies.save_policy(policy, tokenizer, torch.float32, out / "checkpoint")
    states.save(out, policy, update.make_optimizer(policy, 0.1), State(step=1))


def test_the_state_holds_adapters_alone_and_resumes_to_the_bit(tmp_path, tiny, trained, row):
    optimizer = update.make_optimizer(trained, 1e-2)
    trained(row, 1.0).sum().backward()
    optimizer.step()
    states.save(tmp_path, trained, optimizer, State(step=1, optimizer_steps=1))
    size = sum(file.stat().st_size for file in (tmp_path / "state/step-1").iterdir())
    own = sum(p.numel() for _, p in adapters.own_parameters(trained.lm))
    assert size < 3 * 4 * own + 100_000  # adapters and two moments, names and state.json
    again = policies.load(tiny, CPU, lora=LORA)
    other = update.make_optimizer(again, 1e-2)
    states.load(tmp_path / "state/step-1", again, other)
    for policy, makes in ((trained, optimizer), (again, other)):
        makes.zero_grad()
        policy(row, 1.0).sum().backward()
        makes.step()
    for (_, a), (_, b) in zip(
        adapters.own_parameters(trained.lm), adapters.own_parameters(again.lm), strict=True
    ):
        assert torch.equal(a, b)


def test_a_run_its_kept_policies_and_its_evaluation(monkeypatch, tmp_path, row):
    options = "--lora 4 --kl 0.1 --updates 2 --eval-every 1 --keep-policies"
    trained = run(monkeypatch, tmp_path, *TINY, options)
    assert all(0 < step["grad_norm"] < 1e9 and step["kl"] >= 0 for step in trained.steps)
    assert [line["step"] for line in trained.evaluations] == [0, 1, 2]
    folder = tmp_path / "runs/a"
    final = policies.load(folder / "checkpoint", CPU)(row, 1.0)
    kept = policies.load(folder / "policies/step-2", CPU)(row, 1.0)
    first = policies.load(folder / "policies/step-0", CPU)(row, 1.0)
    assert torch.equal(final, kept) and not torch.allclose(final, first)
    assert (folder / "checkpoint/adapter/adapter_model.safetensors").exists()
    evaluate_here("--engine hf --task tools --limit 2 --max-tokens 8 --policies --model runs/a")


def test_options(monkeypatch):
    line = ["--model", "a/b", "--lora", "16"]
    assert parse(TrainConfig, "", line).lr == pytest.approx(1e-5)
    assert parse(TrainConfig, "", ["--lora", "16"]).lr == pytest.approx(2e-4)  # of smollm2
    assert parse(TrainConfig, "", [*line, "--lr", "1e-6"]).lr == 1e-6
    with pytest.raises(InputError, match="--lora-alpha 8.0: give --lora, too"):
        parse(TrainConfig, "", ["--lora-alpha", "8"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--lora 16 needs `pip install peft`"):
        parse(TrainConfig, "", line)
