"""Finds a model, and what can be known of it without its weights: `describe` is the whole of it.

--model becomes a directory that transformers and vLLM load. What either of them would get wrong
without a word, such as a missing file or an adapter, is refused here. Weights are loaded by
policy.py and by the engines.
"""

import contextlib
import json
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from infra.ranks import RANK, InputError

transformers_logging.disable_progress_bar()

# Model types whose log-probs tests compare with transformers'.
TRAINABLE = "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"
POINTER = b"version https://git-lfs"
NARROW = re.compile(r"[FIU][1-8](_\w+)?")  # dtypes of less than 16 bits in safetensors: F8_E4M3, I8
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


class Pretrained(NamedTuple):
    """What is known of a model without its weights."""

    path: Path
    tokenizer: object
    stops: list[int]  # the tokens that end a response
    dtype: torch.dtype
    room: int  # tokens of the longest prompt that leaves room for a response
    embeddings: int  # all token ids are below


def describe(
    name: str, max_tokens: int, trained: bool = False, with_weights: bool = True
) -> Pretrained:
    """What is known of --model. trained: also refuse what policy.py's attention and output head
    would get wrong without a word (softcapping, ALiBi, ...). with_weights: False if they need not
    be there. Raises InputError."""
    with readable(name):
        path = resolve(name, with_weights)
        if trained and with_weights:
            refuse_quantized(path)
        tokenizer = load_tokenizer(path)
        stops = stop_tokens(path, tokenizer)
        config = AutoConfig.from_pretrained(path)
        room = config.max_position_embeddings - max_tokens
    if room < 1:
        raise InputError(
            f"--max-tokens {max_tokens}: the model's context has no room for a prompt beside them"
        )
    if not stops:
        raise InputError(
            f"--model {name}: nothing would end a response: set eos_token in "
            "tokenizer_config.json, or eos_token_id in generation_config.json"
        )
    check_ids(stops, tokenizer, config.vocab_size, f"--model {name}: what ends a response")
    if trained:
        refuse_untrainable(name, config)
    dtype = config.dtype or torch.float32
    return Pretrained(path, tokenizer, stops, dtype, room, config.vocab_size)


@contextlib.contextmanager
def readable(name: str):
    """Whatever a broken checkpoint, vLLM or CUDA raises within becomes one InputError, and its
    traceback a file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason, *_ = (str(error).strip() or "no reason given").splitlines()
        with tempfile.NamedTemporaryFile("w", prefix="rvpo-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        raise InputError(
            f"--model {name} cannot be loaded ({type(error).__name__}: {reason}); all of it is in "
            f"{file.name}"
        ) from error


def announce(name: str) -> None:
    """Called before loading, which may take minutes of silence."""
    if RANK == 0:
        print(f"loading {name}", file=sys.stderr, flush=True)


# Its directory


def resolve(name: str, with_weights: bool = True) -> Path:
    """--model -> a directory that transformers and vLLM load. name: smollm2 (see
    local/smollm2.py), a directory (a run's, too) or a hub id. Raises InputError."""
    if name == "smollm2":
        from local.smollm2 import smollm2

        return smollm2()
    path = Path(name).expanduser()
    if not path.is_dir():
        path = _download(name, with_weights)
    if (path / "checkpoint").is_dir():  # a run of train.py
        path /= "checkpoint"
    check_directory(name, path, with_weights)
    return path


def _download(name: str, with_weights: bool) -> Path:
    import httpx
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"--model {name}: no such file or directory, and no hub id "
            "(those look like Qwen/Qwen2.5-7B)"
        )
    try:
        wanted = ["*.json", "*.txt", "*.jinja", "*.model"]
        if with_weights:
            wanted.append("*.safetensors")
        path = snapshot_download(
            name,
            allow_patterns=wanted,
            ignore_patterns=["*consolidated*.safetensors"],  # Mistral's second copy of all weights
        )
        return Path(path)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise InputError(
            f"--model {name}: no such directory, and the hub did not deliver it "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def check_directory(name: str, path: Path, with_weights: bool = True) -> None:
    """Raises InputError for a --model that lacks files, or has some that would be left out."""
    for file in path.iterdir():
        if file.is_file() and is_pointer(file):
            raise InputError(
                f"--model {name}: {file} is only git-lfs's pointer to the file: "
                "run `git lfs pull` there"
            )
    config = path / "config.json"
    if config.is_file() and "data_sha256" in json.loads(config.read_text()):
        raise InputError(
            f"--model {name}: this run of train.py is not finished and has no "
            f"checkpoint/ yet: go on with `python train.py --resume {path}`, or name "
            f"a policy that it has kept, {path}/policies/step-N"
        )
    merged = path.parent
    if path.name == "adapter" and (merged / "config.json").is_file():
        raise InputError(f"--model {name}: name {merged}, the model with this adapter merged")
    if (path / "adapter_config.json").is_file():
        remove = ", or remove adapter_config.json and adapter_model.safetensors"
        raise InputError(
            f"--model {name}: {path} has an adapter (adapter_config.json), which is "
            "not applied here: merge it into its model (peft's merge_and_unload) and "
            f"name the result{remove if config.is_file() else ''}"
        )
    if config.is_file() and not with_weights:
        return
    if not config.is_file() or not weight_files(path):
        raise InputError(
            f"--model {name}: {path} needs a config.json and weights "
            "(model.safetensors, or model.safetensors.index.json and its files); name "
            "the directory of a checkpoint, such as runs/NAME/checkpoint"
        )
    weights(path)  # a truncated file is found now


def is_pointer(file: Path) -> bool:
    """Whether git-lfs has not fetched the file's content."""
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def weight_files(path: Path) -> list[Path]:
    """The files with a checkpoint's weights, as transformers chooses them: model.safetensors, else
    what model.safetensors.index.json names. [] if there is neither: pickles are not read. Raises
    InputError if vLLM, which chooses by itself, would read others."""
    single = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    named = set()
    if index.is_file():
        named = {path / file for file in json.loads(index.read_text())["weight_map"].values()}
    chosen = {single} if single.is_file() else named
    if missing := [file.name for file in chosen if not file.is_file()]:
        raise InputError(f"{path} lacks {min(missing)}, which model.safetensors.index.json names")
    of_vllm = named or {*path.glob("*.safetensors")}
    if chosen and (others := of_vllm - chosen):
        raise InputError(
            f"{path} has two sets of weights, transformers would load {single.name} "
            f"and vLLM {min(others).name}: remove the files that are not the model's"
        )
    return sorted(chosen)


def weights(path: Path) -> dict:
    """{name of a tensor: its open file} of a checkpoint. Only the headers are read."""
    opened = [safe_open(file, "pt") for file in weight_files(path)]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - it is no dict


# Its tokens


def load_tokenizer(path: Path):
    """Raises InputError if it cannot make a prompt of a chat."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Without its files transformers makes an empty one.
    if "hello" not in tokenizer.decode(tokenizer("hello").input_ids):
        raise InputError(
            f"{path}: the tokenizer cannot encode 'hello'; is its tokenizer.json missing?"
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"{path}: the tokenizer has no chat template, so a chat cannot become a prompt: "
            "choose a model that has one"
        )
    return tokenizer


def stop_tokens(path: Path, tokenizer) -> list[int]:
    """The ids that end a response: the tokenizer's, the generation config's, and the one that ends
    a turn in the chat template, which a base model's own settings lack."""
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the file is optional
        configured = None
    if not isinstance(configured, list):
        configured = [configured]
    stops = {tokenizer.eos_token_id, *configured} - {None}
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    _, _, turns_end = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("!")
    for token in tokenizer(turns_end, add_special_tokens=False).input_ids[:1]:
        if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder:
            stops.add(token)
    return sorted(stops)


def check_ids(ids: list[int], tokenizer, embeddings: int, what: str) -> None:
    """Raises InputError if one of the ids has no embedding. A tokenizer may have such tokens, if no
    prompt has them."""
    if (largest := max(ids)) >= embeddings:
        raise InputError(
            f"{what} has the token {tokenizer.decode([largest])!r}, id {largest}, but "
            f"the model has only {embeddings} embeddings: take the tokenizer that "
            "belongs to it, or resize them (transformers' resize_token_embeddings)"
        )


# Whether it can be trained


def refuse_untrainable(name: str, config) -> None:
    """Raises InputError for a model that policy.py does not compute as transformers does."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("longrope", "dynamic"):  # they depend on the longest sequence of a micro-batch
        raise InputError(
            f"--model {name}: training with {rope} position embeddings is not supported"
        )
    if config.model_type not in TRAINABLE:
        raise InputError(
            f"--model {name}: training {config.model_type} models is not supported; "
            f"{', '.join(TRAINABLE)} are"
        )
    window = getattr(config, "sliding_window", None)
    layers = {*(getattr(config, "layer_types", None) or ())}
    unknown = layers - {"full_attention", "sliding_attention"}
    if unknown or (window is not None and window < 1):
        what = f"layers of type {min(unknown)}" if unknown else f"a sliding window of {window}"
        raise InputError(f"--model {name}: training with {what} is not supported")


def refuse_quantized(path: Path) -> None:
    """Raises InputError if the weights are codes: without their scales they mean nothing."""
    config = json.loads((path / "config.json").read_text())
    if config.get("quantization_config"):
        raise _quantized(path, "its config.json has a quantization_config")
    for name, file in weights(path).items():
        dtype = file.get_slice(name).get_dtype()
        if NARROW.fullmatch(dtype):
            raise _quantized(path, f"{name} is {dtype}")


def _quantized(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} is quantized ({why}) and cannot be trained: name the model that it "
        "was made from, such as Qwen/Qwen3-8B for Qwen/Qwen3-8B-FP8"
    )


def has_own_head(path: Path) -> bool:
    """Whether the weights have an output head that differs from the embeddings, although
    config.json says that they are one (tie_word_embeddings). transformers and vLLM go by the
    weights."""
    files = weights(path)
    config = AutoConfig.from_pretrained(path)
    if not config.tie_word_embeddings or not {HEAD, EMBEDDINGS} <= files.keys():
        return False
    head = files[HEAD].get_slice(HEAD)  # (words, hidden), still on disk
    embeddings = files[EMBEDDINGS].get_slice(EMBEDDINGS)
    if head.get_shape() != embeddings.get_shape():
        return True
    words, _ = head.get_shape()
    for row in range(0, words, 4096):
        rows = slice(row, row + 4096)
        if not torch.equal(head[rows].float(), embeddings[rows].float()):
            return True
    return False
