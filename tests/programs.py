"""How tests run train.py and eval.py, and read what a run leaves behind.

`run`, `train_here` and `evaluate_here` work in this process, which has imported all that takes
seconds. `launch`, `command` and `start` begin processes of their own, as a user does.

Words are what a user types: "--steps 3 --kl 0.1". A path or a number is one word.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT
from kill_and_resume import TIMES
from safetensors.torch import load_file
from torch import Tensor, equal

import eval as evaluation
import train
from config import EvalConfig, TrainConfig, parse
from local import models

# A million parameters, and settings of its size.
TINY = (
    "--model",
    models.tiny(),
    "--engine hf --prompts 2 --group 4 --steps 2 --max-tokens 96",
    "--lr 1e-3 --warmup 0 --eval-prompts 4",
)


class Run(NamedTuple):
    """What is in runs/NAME."""

    steps: list[dict]  # metrics.jsonl without times: training steps
    evaluations: list[dict]  # metrics.jsonl: the others
    samples: list[dict]
    weights: dict[str, Tensor]  # of checkpoint/


# In this process


def run(monkeypatch, folder: Path, *words, name: str = "a") -> Run:
    """Trains the tiny model in folder/runs/NAME."""
    monkeypatch.chdir(folder)
    train_here(*TINY, "--name", name, *words)
    return read(folder / "runs" / name)


def train_here(*words) -> None:
    """train.py in the current directory."""
    train.main(parse(TrainConfig, "", split(*words)))


def evaluate_here(*words) -> None:
    """eval.py in the current directory."""
    evaluation.main(parse(EvalConfig, "", split(*words)))


# As a user types it


def command(*words, **where) -> str:
    """What the program prints. Nothing goes wrong."""
    result = launch(*words, **where)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Traceback" not in result.stderr, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def launch(
    *words, cwd: Path | None = None, ranks: int = 1, script: str = "train.py"
) -> subprocess.CompletedProcess:
    return python(*launcher(ranks), ROOT / script, *words, cwd=cwd)


def start(*words, ranks: int = 1, **options) -> subprocess.Popen:
    """train.py, and does not wait for its end."""
    program = [sys.executable, *split(*launcher(ranks), ROOT / "train.py", *words)]
    return subprocess.Popen(program, env=environment(), text=True, **options)


def python(*words, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *split(*words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )


def launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return []
    return ["-m torch.distributed.run --standalone", f"--nproc_per_node={ranks}"]


def environment() -> dict[str, str]:
    """With one thread a rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def split(*words) -> list[str]:
    """As a shell does. What is no text is one word."""
    out = []
    for word in words:
        out += shlex.split(word) if isinstance(word, str) else [str(word)]
    return out


# What is left behind


def read(path: Path) -> Run:
    steps = []
    evaluations = []
    for line in read_lines(path / "metrics.jsonl"):
        if "eval" in line:
            evaluations.append(line)
        else:
            steps.append({key: value for key, value in line.items() if key not in TIMES})
    samples = read_lines(path / "samples.jsonl")
    return Run(steps, evaluations, samples, load_file(path / "checkpoint/model.safetensors"))


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(equal(first[name], second[name]) for name in first)


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest, of any two weights."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)
