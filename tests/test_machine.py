"""What is said of a machine that lacks something, and how the programs end."""

import ctypes
import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT

from config import TrainConfig, parse
from infra.ranks import InputError
from local import cpu, machine


def without(monkeypatch, module: str) -> None:
    real = importlib.util.find_spec

    def find(name, *rest):
        return None if name == module else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def lack_libnuma(monkeypatch) -> None:
    def refuse(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)


def test_a_machine_without_libnuma(monkeypatch):
    assert machine.problem(vllm=False) is None
    lack_libnuma(monkeypatch)
    assert machine.problem(vllm=False) is None
    said = machine.problem(vllm=True)
    assert "apt-get install libnuma1" in said
    assert said.endswith("or leave vLLM out with make VLLM=no, and transformers will sample")
    remedy = r".*apt-get install libnuma1.*, or take --engine hf"
    with pytest.raises(InputError, match=r"libnuma\.so\.1, and this machine lacks it: " + remedy):
        cpu.prepare()


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 15, 0)])
def test_a_python_for_which_the_lists_do_not_resolve(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    said = machine.problem(vllm=False)
    supported = "3.11 to 3.14 are supported: name another one"
    assert said.startswith(f"this is Python 3.{version[1]}, and {supported}")


def test_python_without_venv(monkeypatch):
    without(monkeypatch, "ensurepip")
    assert "apt-get install python3-venv" in machine.problem(vllm=False)


def test_the_set_up_stops_with_one_sentence(tmp_path):
    """The command of the Makefile, in a Python that cannot load libraries."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes\ndef refuse(name): raise OSError(name)\nctypes.CDLL = refuse\n"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "local/machine.py", "yes"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: vLLM needs the library libnuma.so.1")


def test_where_vllm_is_not_installed_transformers_samples(monkeypatch, capsys):
    without(monkeypatch, "vllm")
    config = parse(TrainConfig, "", [])
    config.say_engine()
    assert config.engine == "hf"
    said = capsys.readouterr().out
    assert said == "vLLM is not installed: transformers samples (--engine hf), which is slower\n"


PROGRAM = """
import atexit, os, sys
from infra import ranks

def work():
    {work}

atexit.register(os.abort)
print("begun")
ranks.run_program(work)
"""


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise ranks.InputError('no such file')", 1, "error: no such file\n"),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('error: no')", 1, "error: no\n"),
        ("raise KeyboardInterrupt", 130, "stopped by Ctrl-C\n"),
        ("1 / 0", 1, None),
    ],
)
def test_a_program_ends_with_the_code_that_it_means(work, code, said):
    """Also where a library would crash while Python is taken down."""
    command = [sys.executable, "-c", PROGRAM.format(work=work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "begun\n")
    if said is None:
        assert "Traceback" in done.stderr
    else:
        assert done.stderr == said
