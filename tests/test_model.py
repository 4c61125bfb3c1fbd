"""Finding a model, and models that cannot be used."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig

import model
import policy as policies
from policy import pack
from ranks import InputError


def test_stop_tokens(tiny):
    tokenizer = model.load_tokenizer(tiny)
    assert model.stop_tokens(tiny, tokenizer) == [2]
    tokenizer.eos_token = "<|endoftext|>"  # a base model: another end token than its template's
    assert model.stop_tokens(tiny, tokenizer) == [0, 2]


def test_the_default_model_converts_from_its_package():
    """Real weights: Paris is likelier than Lima or cheese."""
    path = model.resolve("smollm2")
    assert AutoConfig.from_pretrained(path).max_position_embeddings == 8192
    tokenizer, policy = model.load_tokenizer(path), policies.load(path, torch.device("cpu"))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_dict=False)
    answers = [tokenizer(f"The capital of France is {city}.").input_ids for city in ("Paris", "Lima", "cheese")]
    with torch.no_grad():
        logp = [part.sum().item() for part in policy(pack([(prompt, answers)], torch.device("cpu")), 1.0).split([*map(len, answers)])]
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
