"""Finding a model, and all that is to be known of it before its weights are loaded."""

import contextlib
import math
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from ranks import InputError
from rewards import Example

transformers_logging.disable_progress_bar()

TRAINABLE = "llama", "mistral", "phi3", "qwen2", "qwen3"  # model types whose log-probs tests compare with transformers'


class Prompt(NamedTuple):
    ids: list[int]  # tokens
    example: Example  # what they were made of


@contextlib.contextmanager
def readable(name: str):
    """Whatever a broken checkpoint, vLLM or CUDA raises becomes one InputError, and its traceback a file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        with tempfile.NamedTemporaryFile("w", prefix="rvpo-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        raise InputError(f"--model {name} cannot be loaded ({type(error).__name__}: {reason}); all of it is in "
                         f"{file.name}") from error


def resolve(name: str) -> Path:
    """--model -> a directory that transformers and vLLM load: smollm2 (see local/smollm2.py), a directory (a run's,
    too) or a hub id. Weights are not loaded. Raises InputError."""
    if name == "smollm2":
        from local.smollm2 import smollm2

        return smollm2()
    path = Path(name).expanduser()
    if not path.is_dir():
        path = _download(name)
    if (path / "checkpoint").is_dir():  # a run of train.py
        path /= "checkpoint"
    if not (path / "config.json").is_file() or not [*path.glob("*.safetensors")]:  # no pickles
        raise InputError(f"--model {name}: {path} needs a config.json and weights (*.safetensors); name the directory "
                         "of a checkpoint, such as runs/NAME/checkpoint")
    for file in path.glob("*.safetensors"):
        safe_open(file, "pt")  # reads the header: a truncated file is found now
    return path


def _download(name: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"--model {name}: no such file or directory, and no hub id (those look like Qwen/Qwen2.5-7B)")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise InputError(f"--model {name}: no such directory, and the hub did not deliver it "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from error


def load_tokenizer(path: Path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    if "hello" not in tokenizer.decode(tokenizer("hello").input_ids):  # transformers makes do with an empty one
        raise InputError(f"{path}: the tokenizer cannot encode 'hello'; is its tokenizer.json missing?")
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: the tokenizer has no chat template, so a chat cannot become a prompt: choose a "
                         "model that has one")
    return tokenizer


def stop_tokens(path: Path, tokenizer) -> list[int]:
    """The ids that end a response: the tokenizer's, the generation config's, and the one that ends a turn in the chat
    template, of which a base model knows nothing."""
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the file is optional
        configured = None
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
                                         tokenize=False)
    after = tokenizer(turn.rpartition("!")[2], add_special_tokens=False).input_ids[:1]
    ends_turn = [i for i in after if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder]
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *configured, *ends_turn} - {None})


def describe(name: str, max_tokens: int, trained: bool = False):
    """What can be known of --model without its weights: (path, tokenizer, stop tokens, dtype, the longest prompt that
    leaves room for max_tokens). trained: refuse what policy.py's attention and output head would get wrong without a
    word (softcapping, ALiBi, ...). Raises InputError."""
    with readable(name):
        path = resolve(name)
        tokenizer = load_tokenizer(path)
        stops, config = stop_tokens(path, tokenizer), AutoConfig.from_pretrained(path)
        room = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf) - max_tokens
    if room < 1:
        raise InputError(f"--max-tokens {max_tokens}: the model's context has no room for a prompt beside them")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if trained and rope in ("longrope", "dynamic"):  # they depend on the longest sequence of a micro-batch
        raise InputError(f"--model {name}: training with {rope} position embeddings is not supported")
    if trained and config.model_type not in TRAINABLE:
        raise InputError(f"--model {name}: training {config.model_type} models is not supported; "
                         f"{', '.join(TRAINABLE)} are")
    return path, tokenizer, stops, config.dtype or torch.float32, room


def encode(tokenizer, examples: list[Example], limit: int) -> list[Prompt]:
    """Through the chat template. Raises InputError for a prompt of more than `limit` tokens."""
    prompts = []
    for i, example in enumerate(examples):
        where = f"prompt {i} ('...{example.messages[-1]['content'][-40:]!a}')"
        try:
            ids = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{where} does not go through the model's chat template: {error}") from error
        if not 0 < len(ids) <= limit:
            raise InputError(f"{where} has {len(ids)} tokens, and beside --max-tokens the model's context has room "
                             f"for {limit}: leave it out of the data, or lower --max-tokens")
        prompts.append(Prompt(ids, example))
    return prompts
