"""Random models: a tiny one for tests, and weights in the shapes of Qwen2.5 for benchmarks."""

import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from infra import pretrained
from local.shapes import QWEN
from local.smollm2 import cached
from tasks import tools


def resolve(name: str) -> Path:
    """A directory. name: 'tiny', 'random-SIZE' with a size of QWEN, or any --model of train.py."""
    if name == "tiny":
        return tiny()
    kind, _, size = name.partition("-")
    if kind == "random" and size in QWEN:
        return random_qwen(size)
    return pretrained.resolve(name)


def tiny() -> Path:
    """A directory with a random Qwen2 of a million parameters and a tokenizer of 1,024 words."""
    return cached("tiny-qwen2", _make_tiny)


def _make_tiny(out: Path) -> None:
    _make_tokenizer().save_pretrained(out)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=1024,
            hidden_size=128,  # head_dim is 32: vLLM's CPU attention has no 16
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(out)


def _make_tokenizer() -> PreTrainedTokenizerFast:
    texts = [
        message["content"]
        for example in tools.examples(200, "train")
        for message in example.messages
    ]
    pad, begin, end = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=[pad, begin, end])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=pad
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen(size: str) -> Qwen2Config:
    """size: of QWEN."""
    layers, hidden, heads, kv_heads, intermediate, vocabulary, tied = QWEN[size]
    return Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


def skeleton(config):
    """The model of a transformers config, without memory."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    lm.tie_weights()
    return lm


def random_qwen(size: str) -> Path:
    """A directory with random bfloat16 weights of that size, up to gigabytes, and tiny's tokenizer,
    which knows only some of the model's words."""
    out = Path(tempfile.gettempdir()) / f"rvpo-random-{size}"
    if not out.exists():
        torch.manual_seed(0)
        config = qwen(size)
        config.eos_token_id = 2
        config.pad_token_id = 0
        part = out.with_suffix(".part")
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(part)
        pretrained.load_tokenizer(tiny()).save_pretrained(part)
        part.rename(out)
    return out
