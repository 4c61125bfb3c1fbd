"""One row for a prompt and all its responses must be exactly one sequence a response; and models that cannot be used."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig

import model
from rewards import InputError

PROMPT = list(range(5, 155))
RESPONSES = [[7, 8, 9, 10, 2], [11], [], [12, 13, 14], [9] * 40]


def separate_logp(policy, prompt, responses, temperature):
    """The obvious way: each response behind its own copy of the prompt, unpadded."""
    out = []
    for response in responses:
        if response:
            logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / temperature
            out.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1))
    return torch.cat(out)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_row_is_exactly_separate_sequences(tiny_policy, temperature):
    """Log-probs, loss and gradient."""
    results = []
    weights = torch.randn(49, generator=torch.Generator().manual_seed(0))
    for function in (model.response_logp, separate_logp):
        tiny_policy.zero_grad()
        logp = function(tiny_policy, PROMPT, RESPONSES, temperature)
        loss = (weights * logp).mean()
        loss.backward()
        results.append((logp.detach(), loss.detach(), torch.cat([p.grad.flatten() for p in tiny_policy.parameters()])))
    tiny_policy.zero_grad()
    for packed, separate in zip(*results, strict=True):
        torch.testing.assert_close(packed, separate, atol=2e-5, rtol=1e-4)


def test_a_response_does_not_see_the_others(tiny_policy):
    """Changing one response moves no bit of another's log-probs beyond rounding."""
    with torch.no_grad():
        before = model.response_logp(tiny_policy, PROMPT, [[7, 8, 9], [10, 11, 12]], 1.0)
        after = model.response_logp(tiny_policy, PROMPT, [[99, 98, 97], [10, 11, 12]], 1.0)
    torch.testing.assert_close(before[3:], after[3:], atol=1e-6, rtol=0)


def test_stop_tokens(tiny):
    tokenizer = model.load_tokenizer(tiny)
    assert model.stop_tokens(tiny, tokenizer) == [2]
    tokenizer.eos_token = "<|endoftext|>"  # a base model: another end token than its template's
    assert model.stop_tokens(tiny, tokenizer) == [0, 2]


def test_the_default_model_converts_from_its_package():
    """Real weights: Paris is likelier than Lima or cheese."""
    path = model.resolve("smollm2")
    assert AutoConfig.from_pretrained(path).max_position_embeddings == 8192
    tokenizer, policy = model.load_tokenizer(path), model.load(path, torch.device("cpu"))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_dict=False)
    answers = [tokenizer(f"The capital of France is {city}.").input_ids for city in ("Paris", "Lima", "cheese")]
    with torch.no_grad():
        logp = [model.response_logp(policy, prompt, [tokens], 1.0).sum().item() for tokens in answers]
    assert logp[0] > logp[1] + 3 and logp[0] > logp[2] + 3


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such file or directory"):
        model.resolve(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="needs a config.json and weights"):
        model.resolve(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(InputError, match="needs a config.json and weights"):
        model.resolve(str(tmp_path / "empty"))


def test_the_hub_out_of_reach_is_one_sentence():
    code = "import model; model.resolve('nobody/nothing')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"})
    assert "InputError: --model nobody/nothing: no such directory, and the hub did not deliver it" in result.stderr
