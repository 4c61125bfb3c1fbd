"""The check of a GPU machine, run on the CPU; and what it counts as needed work."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, needs_vllm

from local import models
from tools import gpu, step


def check(root: Path, out: Path, *options) -> tuple[int, dict, str]:
    """Runs tools/gpu.py of that directory. Returns its exit code, results.json with its checks by
    name, and what it printed."""
    command = [sys.executable, root / "tools/gpu.py", "--out", out, *options]
    result = subprocess.run(command, cwd=out.parent, capture_output=True, text=True)
    assert out.exists(), result.stderr[-3000:]
    content = json.loads(out.read_text())
    content["checks"] = {line["check"]: line for line in content["checks"]}
    return result.returncode, content, result.stdout


@needs_vllm
def test_all_of_it_on_a_cpu(tmp_path):
    """A run that is killed and resumed, vLLM after a push, updates: all of them have figures."""
    code, content, table = check(ROOT, tmp_path / "results.json", "--quick")
    lines = content["checks"]
    figures = {name: line["figures"] for name, line in lines.items()}
    assert code == 0 and {name: line["outcome"] for name, line in lines.items()} == {
        "device": "skipped",
        "tests": "skipped",
        "run": "pass",
        "sync": "pass",
        "update": "pass",
        "update without recomputing": "pass",
        "update lora": "pass",
        "update compiled": "skipped",
        "update liger": "skipped",
        "update flash 3": "skipped",
        "update lora 3B, 24 GB": "skipped",
        "weights": "pass",
        "sharded run": "skipped",
        "sharded update": "skipped",
    }, (tmp_path / "results.log").read_text()[-3000:]
    assert all(bool(line["reason"]) == (line["outcome"] == "skipped") for line in lines.values())
    assert figures["run"]["steps"] == [1, 2, 3] and figures["run"]["gap"] < 1e-3
    sync = figures["sync"]
    assert 0 < sync["gap"] <= sync["rms"] < 1e-3
    assert sync["stale_gap"] > 0.1 and sync["tokens"] > 500
    update, plain = figures["update"], figures["update without recomputing"]
    assert update["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    tokens = update["tokens_per_second"] * update["seconds_update"]
    assert tokens == pytest.approx(8 * (100 + 4 * 23))
    assert {*content} == {"date", "command", "versions", "checks"}
    assert "torch" in content["versions"] and "--quick" in content["command"]
    *rows, last = table.splitlines()
    assert [row.split("  ")[0] for row in rows] == [*lines]
    assert last.split()[-2] == str(tmp_path / "results.json")


@needs_vllm
def test_a_push_that_loses_the_weights(tmp_path):
    """FAIL, with the figures, and exit code 1."""
    for name in ("infra", "tools", "local", "tasks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    code = (ROOT / "rollout.py").read_text()
    push = 'self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})'
    only_once = f'getattr(self, "lost", 0) or {push}; self.lost = 1'
    assert push in code
    (tmp_path / "rollout.py").write_text(code.replace(push, only_once))
    code, content, table = check(tmp_path, tmp_path / "results.json", "--only", "sync")
    line = content["checks"]["sync"]
    assert code == 1 and [*content["checks"]] == ["device", "sync"] and line["outcome"] == "FAIL"
    assert line["figures"]["gap"] > 0.1
    assert "apart, limit 0.001" in line["reason"] and line["reason"] in table


def test_what_was_found_before_an_end_is_kept(monkeypatch, tmp_path):
    """Ctrl-C, or a machine that is taken away."""

    def found_by(log, check, *_):
        if check == "run":
            raise KeyboardInterrupt
        return {"tests_passed": 3} if check == "tests" else {"gpus": 0}

    out = tmp_path / "results.json"
    args = SimpleNamespace(out=out, only="", quick=False, gap_limit=None, ranks=0)
    monkeypatch.setattr(gpu, "found_by", found_by)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(args)
    assert [line["check"] for line in json.loads(out.read_text())["checks"]] == ["device", "tests"]


def test_an_update_has_no_pad_token(monkeypatch):
    """Its embedding is 0 in random weights: 17 layers of RMSNorm overflow in its gradient."""

    def update(learner, groups, *_):
        tokens = set()
        for group in groups:
            tokens.update(group.prompt.ids)
            for response in group.responses:
                tokens.update(response.tokens)
        assert len(tokens) > 100 and learner.policy.lm.config.pad_token_id not in tokens
        return {"grad_norm": 1.0}

    monkeypatch.setattr(gpu.updates, "update", update)
    assert gpu.update("tiny", "off")["grad_norm"] == 1.0


def test_a_check_that_breaks_says_why(tmp_path):
    options = {"name": "no/such/model", "checkpointing": "on"}
    found = gpu.found_by(tmp_path / "log", "update", 1, options)
    assert [*found] == ["FAIL"] and found["FAIL"].startswith(
        "error: --model no/such/model: no such file or directory"
    )
    torchrun = """\
[rank1]: Traceback
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried
torch.x.ChildFailedError:
====
"""
    assert gpu.reason(torchrun) == "torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert gpu.reason("") == "it printed nothing"


def test_the_tests_say_how_many_they_are(monkeypatch):
    """On a GPU none may be skipped: the kernel's own is."""

    def pytest_says(output: str, code: int):
        done = subprocess.CompletedProcess([], code, output)
        monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)

    pytest_says("..s.\n== slowest ==\n58 passed, 1 skipped in 9.84s\n", 0)
    counts = {"tests_passed": 58, "tests_skipped": 1}
    for cuda, failed in ((False, {}), (True, {"FAIL": "the kernel's own test was skipped"})):
        monkeypatch.setattr(gpu, "CUDA", cuda)
        assert gpu.tests() == counts | failed
    failure = "FAILED tests/test_policy.py::test_the_gpu_kernel_itself - assert 1"
    pytest_says(f"{failure}\n1 failed, 58 passed in 9.84s\n", 1)
    assert gpu.tests() == {"tests_passed": 58, "tests_failed": 1, "FAIL": failure}


@needs_vllm
def test_what_is_checked_where(monkeypatch):
    """Sizes, ranks and limits follow from the machine."""
    args = SimpleNamespace(gap_limit=None, quick=False, ranks=0)
    there = {"gpus": 8, "memory_gib": 79.1, "free_gib": 78.6, "name": "NVIDIA H100 80GB HBM3"}
    plan = gpu.plan(args, **there)
    skipped = [name for name, what in plan.items() if isinstance(what, str)]
    assert skipped == ["update liger", "update flash 3"]  # their packages are not installed
    assert plan["sharded update"] == ("update", 8, {"name": "random-1.5B", "checkpointing": "on"})
    assert plan["sharded run"] == (
        "run",
        1,
        {"name": "random-0.5B", "engine": "vllm", "limit": 0.05, "ranks": 8},
    )
    plan = gpu.plan(args, **there | {"gpus": 1, "memory_gib": 23.6})
    assert plan["update"][2]["name"] == plan["sync"][2]["name"] == "random-0.5B"
    assert plan["sharded update"] == "needs two GPUs"
    assert gpu.plan(args)["sync"] == ("sync", 1, {"name": "tiny", "limit": 1e-3})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.plan(args)["run"][2]["engine"] == "hf"
    assert gpu.sync("tiny", 1e-3) == {"skipped": "vLLM is not installed"}


def test_the_peak_beside_the_simulation(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/simulate.py").write_text("""
import json, sys
expected = "--json --size 1.5B --gradient-checkpointing on --prompt 1000 --lora 16 8192"
assert {*expected.split()} <= {*sys.argv}
print("a line\\n" + json.dumps({"peak_gib": 28.0}))
""")
    assert gpu.simulated("random-1.5B", "on", 16, 8192, 30.0) == {"simulated_gib": 28.0}
    assert "FAIL" in gpu.simulated("random-1.5B", "on", 16, 8192, 33.0)


TORCH_2_11 = """
import torch
from torch.nn.attention import varlen

def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, return_aux=None, scale=None, window_size=(-1, -1),
):
    assert (scale, window_size, query.shape[1], key.shape[1]) == (0.2, (-1, 0), 4, 2)
    return query

varlen.varlen_attn, torch.__version__ = varlen_attn, type(torch.__version__)("2.11.0")
import policy
row = policy.pack([([5, 6], [[7, 8]])], torch.device("cpu"))
heads = [torch.zeros(n, 3, 8) for n in (4, 2, 2)]
assert policy._attend_on_cuda(*heads, 0.2, row.sequences).shape == (1, 3, 4, 8)
"""


def test_attention_with_torch_2_11():
    """Its kernel takes keys of fewer heads, and has no argument that says so."""
    subprocess.run([sys.executable, "-c", TORCH_2_11], check=True, cwd=ROOT)


def test_needed_work_by_hand(monkeypatch):
    """Six operations for each weight and token, twelve for each element of a query's head and pair.

    A prompt of 1000 tokens has 16 responses of 256, of which the last token is not computed."""
    layers, hidden, _, _, wide, words, _ = models.QWEN["1.5B"]
    # Queries and output, keys and values, MLP:
    weights = layers * (2 * hidden * hidden + 2 * hidden * 256 + 3 * hidden * wide)
    tokens, pairs = 1000 + 16 * 255, 1000**2 / 2 + 16 * 255 * (1000 + 255 / 2)
    by_hand = 6 * weights * tokens + 12 * layers * hidden * pairs + 6 * words * hidden * 16 * 256
    shape = {"prompt_tokens": 1000, "response_tokens": 256, "group": 16}
    needed = step.needed_flops(models.qwen("1.5B"), **shape, prompts=1)
    assert needed == pytest.approx(by_hand, rel=1e-3) and 48e12 < by_hand < 49e12
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    config = models.AutoModelForCausalLM.from_pretrained(models.tiny()).config
    tiny = step.needed_flops(config, **shape, prompts=3)
    used = step.utilization(2.0, 4, model="tiny", **shape, prompts=3)
    assert used == {"mfu": pytest.approx(tiny / 2 / 4 / 989e12)}
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L4")
    assert step.utilization(2.0, model="tiny", **shape, prompts=3) == {}
