import importlib
import multiprocessing
import os
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

hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None
)  # `make test` says the same each time, also when busy
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault(
    "GLOO_SOCKET_IFNAME", "lo"
)  # ranks of tests are on one machine, whatever its name resolves to


def _on_rank(environ: dict, module: str, *args: Path) -> None:
    os.environ |= environ
    torch.set_num_threads(1)
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    importlib.import_module("infra.ranks").run_program(
        importlib.import_module(module).main, *args
    )  # only now: it reads the environment


def on_ranks(total: int, node: int, *args: Path, module: str = "updates") -> None:
    """The module's main on that many ranks, `node` of them to a node: forks of a server that has imported what takes
    seconds. Again, once, if one aborts: gloo does, seldom and on busy machines only, in threads of its own
    (pytorch/gloo#514, pytorch#190489), and takes the process with it. What the code does wrong it does twice."""
    codes = _once(total, node, *args, module=module)
    if -signal.SIGABRT in codes:
        warnings.warn(
            f"a rank aborted, its stack is on stderr: the ranks' exit codes are {codes}; tried again",
            stacklevel=2,
        )
        codes = _once(total, node, *args, module=module)
    assert codes == [0] * total  # None: a rank that waited for another


def _once(total: int, node: int, *args: Path, module: str) -> list[int | None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "transformers", "torch.distributed.fsdp"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environ = {
            "WORLD_SIZE": total,
            "LOCAL_WORLD_SIZE": node,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free.getsockname()[1],
        }
    ranks = [
        context.Process(
            target=_on_rank,
            args=(
                {name: str(x) for name, x in environ.items()}
                | {"RANK": str(rank), "LOCAL_RANK": str(rank % node)},
                module,
                *args,
            ),
            daemon=True,
        )
        for rank in range(total)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 300
    while (
        None in (codes := [process.exitcode for process in ranks])
        and {*codes} <= {None, 0}
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    if any(codes):  # others may have an end of their own to come
        time.sleep(1)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


@pytest.fixture(scope="session")
def tiny() -> Path:
    from local import models

    return models.tiny()


@pytest.fixture(scope="session")
def own_head(tiny, tmp_path_factory) -> Path:
    """tiny with an output head of its own, while its config.json still says that the embeddings are the head."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("own") / "head"
    shutil.copytree(tiny, path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = (
        torch.randn(1024, 128, generator=torch.Generator().manual_seed(1)) * 0.3
    )
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
    """Random weights, untied, in shapes that two or four ranks cannot share evenly; one rank of four has none of the
    MLP's rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
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
        ).save_pretrained(path)
    return path


@pytest.fixture
def graded(monkeypatch):
    """Rewards on which random text differs: the built-in ones are nearly constant for a model that has learned nothing."""
    from rewards import Channel

    set_channels(
        monkeypatch,
        [
            Channel(
                "vowels",
                lambda p, responses, ref: [
                    sum(c in "aeiou" for c in r) / max(1, len(r)) for r in responses
                ],
            ),
            Channel("short", lambda p, responses, ref: [1 / (1 + len(r)) for r in responses]),
        ],
    )


def set_channels(monkeypatch, channels: list, name: str = "tools") -> None:
    """These in place of a task's own."""
    import tasks

    module = tasks.task_module(name)
    make = module.task

    def task(options):
        made = make(options)
        made._channels = channels
        return made

    monkeypatch.setattr(module, "task", task)
