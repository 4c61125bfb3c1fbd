"""Finding a model, and models that cannot be used."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

import policy as policies
from infra import pretrained
from infra.ranks import InputError
from policy import pack


def test_stop_tokens(tiny):
    tokenizer = pretrained.load_tokenizer(tiny)
    assert pretrained.stop_tokens(tiny, tokenizer) == [2]
    tokenizer.eos_token = "<|endoftext|>"  # a base model: another end token than its template's
    assert pretrained.stop_tokens(tiny, tokenizer) == [0, 2]


def test_the_default_model_converts_from_its_package():
    """Real weights: Paris is likelier than Lima or cheese."""
    path = pretrained.resolve("smollm2")
    assert AutoConfig.from_pretrained(path).max_position_embeddings == 8192
    tokenizer, policy = pretrained.load_tokenizer(path), policies.load(path, torch.device("cpu"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    answers = [
        tokenizer(f"The capital of France is {city}.").input_ids
        for city in ("Paris", "Lima", "cheese")
    ]
    with torch.no_grad():
        logp = policy(pack([(prompt, answers)], torch.device("cpu")), 1.0)
    paris, lima, cheese = (part.sum() for part in logp.split([*map(len, answers)]))
    assert paris > lima + 3 and paris > cheese + 3


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such file or directory"):
        pretrained.resolve(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="needs a config.json and weights"):
        pretrained.resolve(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(InputError, match="needs a config.json and weights"):
        pretrained.resolve(str(tmp_path / "empty"))


# Which files hold the weights, and what they hold


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of tiny, to be changed."""
    shutil.copytree(tiny, tmp_path / "copied")
    return tmp_path / "copied"


def configure(path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def refused(path, trained: bool = True) -> str:
    with pytest.raises(InputError) as error:
        pretrained.describe(str(path), 8, trained)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn, torch.int8])
def test_quantized_weights_are_not_trained(copied, dtype):
    """By the configuration or the weights alone. Their codes were once trained as if weights."""
    name = "model.layers.0.mlp.up_proj.weight"
    if dtype:
        weights = load_file(copied / "model.safetensors")
        save_file({**weights, name: weights[name].to(dtype)}, copied / "model.safetensors")
    else:
        configure(copied, quantization_config={"quant_method": "fp8"})
    why = {
        None: "its config.json has a quantization_config",
        torch.float8_e4m3fn: f"{name} is F8_E4M3",
        torch.int8: f"{name} is I8",
    }[dtype]
    assert refused(copied) == (
        f"{copied} is quantized ({why}) and cannot be trained: name the model that it was made "
        "from, such as Qwen/Qwen3-8B for Qwen/Qwen3-8B-FP8"
    )
    with pytest.raises(InputError, match="is quantized"):
        policies.load(copied, torch.device("cpu"))
    assert pretrained.describe(str(copied), 8)[0] == copied  # vLLM evaluates it


def test_weights_in_several_files_are_those_of_the_index(tiny, copied):
    """As transformers has it; what lies beside them, such as Mistral's second copy, is not read."""
    lm = AutoModelForCausalLM.from_pretrained(copied)
    (copied / "model.safetensors").unlink()
    lm.save_pretrained(copied, max_shard_size="2MB")
    (copied / "consolidated.safetensors").write_bytes(b"x")
    assert len(pretrained.weight_files(copied)) > 1 and pretrained.resolve(str(copied)) == copied
    ours, theirs = (
        dict(policies.load(path, torch.device("cpu")).named_parameters()) for path in (copied, tiny)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    _, lost, *_ = pretrained.weight_files(copied)
    lost.unlink()
    index = "model.safetensors.index.json"
    assert refused(copied) == f"{copied} lacks {lost.name}, which {index} names"


@pytest.mark.parametrize("indexed", [False, True])
def test_two_sets_of_weights(copied, indexed):
    """Which one was trained once depended on the order in which the file system lists them."""
    shutil.copy(copied / "model.safetensors", copied / "model-00001-of-00001.safetensors")
    if indexed:
        index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(copied, trained=False) == refused(copied)
    assert refused(copied) == (
        f"{copied} has two sets of weights, transformers would load model.safetensors and vLLM "
        "model-00001-of-00001.safetensors: remove the files that are not the model's"
    )


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs(copied, file):
    (copied / file).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n"
    )
    message = "is only git-lfs's pointer to the file: run `git lfs pull` there"
    assert f"{copied / file} {message}" in refused(copied)


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_not_left_out(copied, alone):
    (copied / "adapter_config.json").write_text("{}")
    if alone:
        (copied / "config.json").unlink()
    said = refused(copied, trained=False)
    message = "which is not applied here: merge it into its model"
    assert f"{copied} has an adapter (adapter_config.json), {message}" in said
    assert ("or remove adapter_config.json" in said) is not alone


def test_tokens_that_end_a_response(copied):
    """An id without an embedding is never sampled: each response would run to --max-tokens."""
    (copied / "generation_config.json").write_text('{"eos_token_id": [2, 1029]}')
    message = "has the token '', id 1029, but the model has only 1024 embeddings"
    assert f"what ends a response {message}" in refused(copied, trained=False)
    (copied / "generation_config.json").unlink()
    configure(copied, eos_token_id=None)
    tokenizer = pretrained.load_tokenizer(copied)
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(copied)
    message = (
        "nothing would end a response: set eos_token in tokenizer_config.json, "
        "or eos_token_id in generation_config.json"
    )
    assert message in refused(copied, trained=False)


def test_a_head_of_its_own_is_trained_and_saved(own_head, tmp_path):
    """As in transformers, although config.json says that the embeddings are the head."""
    ids = torch.arange(5, 40)[None]

    def logp(path):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path)(ids).logits
        return logits.log_softmax(-1)[0, 9:-1].gather(-1, ids[0, 10:, None])[:, 0]

    policy = policies.load(own_head, torch.device("cpu"))
    row = pack([(ids[0, :10].tolist(), [ids[0, 10:].tolist()])], torch.device("cpu"))
    torch.testing.assert_close(policy(row, 1.0).detach(), logp(own_head), atol=1e-4, rtol=0)
    tokenizer = pretrained.load_tokenizer(own_head)
    policies.save_policy(policy, tokenizer, torch.float32, tmp_path / "saved")
    assert torch.equal(logp(tmp_path / "saved"), logp(own_head))
    assert not AutoConfig.from_pretrained(tmp_path / "saved").tie_word_embeddings


def test_a_head_that_is_the_embeddings_is_tied(copied):
    weights = load_file(copied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, copied / "model.safetensors")
    lm = policies.load(copied, torch.device("cpu")).lm
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_a_run_that_is_not_finished(tmp_path):
    (tmp_path / "config.json").write_text('{"data_sha256": "x"}')
    assert refused(tmp_path) == (
        f"--model {tmp_path}: this run of train.py is not finished and has no checkpoint/ yet: "
        f"go on with `python train.py --resume {tmp_path}`, "
        f"or name a policy that it has kept, {tmp_path}/policies/step-N"
    )


def test_the_hub_out_of_reach_is_one_sentence():
    code = "from infra import pretrained; pretrained.resolve('nobody/nothing')"
    offline = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=offline)
    message = "no such directory, and the hub did not deliver it"
    assert f"InputError: --model nobody/nothing: {message}" in result.stderr


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sliding_window": 0, "use_sliding_window": True}, "a sliding window of 0"),
        ({"layer_types": ["chunked_attention"] * 4}, "layers of type chunked_attention"),
    ],
)
def test_attention_that_is_not_known(tiny, changes, what):
    config = Qwen2Config.from_pretrained(tiny)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=f"--model m: training with {what} is not supported"):
        pretrained.refuse_untrainable("m", config)


def test_the_adapter_of_a_run_is_not_its_model(tiny, tmp_path):
    merged = tmp_path / "checkpoint"
    shutil.copytree(tiny, merged)
    (merged / "adapter").mkdir()
    (merged / "adapter/adapter_config.json").write_text("{}")
    message = f"--model {merged}/adapter: name {merged}, the model with this adapter merged"
    with pytest.raises(InputError, match=re.escape(message)):
        pretrained.describe(f"{merged}/adapter", 8)


def test_a_plan_needs_no_weights(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    assert pretrained.describe(str(tmp_path / "m"), 8, trained=True, with_weights=False)
    with pytest.raises(InputError, match=r"needs a config\.json and weights"):
        pretrained.describe(str(tmp_path / "m"), 8, trained=True)
