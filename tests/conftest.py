"""What several test files share: settings, ranks, tiny models, evaluations, channels."""

import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch

# `make test` says the same each time, also on a busy machine.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# The ranks of a test are on one machine, whatever its name resolves to.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


# Ranks


def on_ranks(total: int, node: int, *args: Path, module: str = "updates") -> None:
    """Runs the module's main on `total` ranks, `node` of them to a node.

    It runs once more if a rank aborts: gloo does so in its own threads, seldom, on busy machines
    (pytorch/gloo#514, pytorch#190489). What our code does wrong it does twice."""
    codes = _exit_codes(total, node, module, *args)
    if -signal.SIGABRT in codes:
        message = f"a rank aborted, its stack is on stderr; exit codes {codes}; tried again"
        warnings.warn(message, stacklevel=2)
        codes = _exit_codes(total, node, module, *args)
    assert codes == [0] * total  # None: a rank that waited for another


def _exit_codes(total: int, node: int, module: str, *args: Path) -> list[int | None]:
    """The ranks are forks of a server that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "transformers", "torch.distributed.fsdp"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    processes = []
    for rank in range(total):
        environ = {
            "WORLD_SIZE": str(total),
            "LOCAL_WORLD_SIZE": str(node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % node),
        }
        process = context.Process(target=_on_rank, args=(environ, module, *args), daemon=True)
        process.start()
        processes.append(process)
    _wait(processes, seconds=300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _on_rank(environ: dict, module: str, *args: Path) -> None:
    os.environ |= environ
    torch.set_num_threads(1)
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    ranks = importlib.import_module("infra.ranks")  # only now: it reads the environment
    ranks.run_program(importlib.import_module(module).main, *args)


def _wait(processes: list, seconds: float) -> None:
    """Until all have ended, or a second after one has failed: others may yet end by themselves."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = {process.exitcode for process in processes}
        if codes - {None, 0}:
            time.sleep(1)
            return
        if codes == {0}:
            return
        time.sleep(0.05)


# Models


@pytest.fixture(scope="session")
def tiny() -> Path:
    from local import models

    return models.tiny()


@pytest.fixture(scope="session")
def own_head(tiny, tmp_path_factory) -> Path:
    """tiny with an output head of its own; config.json still says that the embeddings are it."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("own") / "head"
    shutil.copytree(tiny, path)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    weights["lm_head.weight"] = torch.randn(1024, 128, generator=generator) * 0.3
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="session")
def dated(tiny, tmp_path_factory) -> Path:
    """tiny, whose chat template begins with the date, as Llama's does."""
    from infra import pretrained

    path = tmp_path_factory.mktemp("dated") / "model"
    shutil.copytree(tiny, path)
    tokenizer = pretrained.load_tokenizer(path)
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_policy(tiny):
    import policy

    return policy.load(tiny, torch.device("cpu"))


@pytest.fixture(scope="session")
def vocabulary() -> int:
    return 1003


@pytest.fixture(scope="session")
def llama(tmp_path_factory, vocabulary) -> Path:
    """Random weights, untied, in shapes that two or four ranks cannot share evenly.

    One rank of four has none of the MLP's rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=9,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def nothing_is_loaded(monkeypatch) -> None:
    """From here on a test fails if the program loads a model's weights."""
    import policy
    from local import hf

    def load(*args, **options):
        pytest.fail("the model was loaded")

    for module in (hf, policy):
        monkeypatch.setattr(module, "load", load)


# Evaluations


@pytest.fixture
def evaluate(monkeypatch, tmp_path, tiny):
    """eval.py in this process, in tmp_path. Returns (results.json, the lines of samples.jsonl)."""
    import programs

    monkeypatch.chdir(tmp_path)

    def evaluated(*words, name: str = "a") -> tuple[dict, list[dict]]:
        programs.evaluate_here("--engine hf --model", tiny, "--name", name, *words)
        folder = tmp_path / "runs" / name
        results = json.loads((folder / "results.json").read_text())
        return results, programs.read_lines(folder / "samples.jsonl")

    return evaluated


# Channels


@pytest.fixture
def graded(monkeypatch):
    """Rewards that differ on random text: built-in ones are nearly constant without training."""
    from rewards import Channel

    set_channels(monkeypatch, [Channel("vowels", vowels), Channel("short", short)])


def vowels(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [len(re.findall("[aeiou]", text)) / max(1, len(text)) for text in responses]


def short(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [1 / (1 + len(text)) for text in responses]


def missing(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [float("nan")] * len(responses)


def constant(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [0.5] * len(responses)


def set_channels(monkeypatch, channels: list, name: str = "tools") -> None:
    """Puts these in place of the task's own."""
    import tasks

    module = tasks.task_module(name)
    make = module.task

    def task(options):
        made = make(options)
        made._channels = channels
        return made

    monkeypatch.setattr(module, "task", task)
