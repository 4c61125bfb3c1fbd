"""Runs that are killed, stopped or broken, and resumed."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_and_resume
import pytest
import ranks
import torch
from conftest import ROOT, on_ranks
from judge_server import Server
from judge_server import graded as verdicts

import checkpoint
import files
import model
import policy as policies
import rewards
import rvpo
import stop
import train
from rewards import InputError, Reward

SHORT = ["--max-tokens", 16, "--save-every", 1, "--steps", 4]


@pytest.fixture(autouse=True)
def handlers():
    """train.main installs handlers for good."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    stop._signals.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def run(monkeypatch, tmp_path, *args, name: str | None = "a") -> Path:
    """train.py in this process."""
    monkeypatch.chdir(tmp_path)
    base = ["--model", "tiny", "--engine", "hf", "--name", name, *SHORT] if name else []
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*base, *args])])
    train.main()
    return tmp_path / "runs" / (name or "a")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def at_step(monkeypatch, step: int, what):
    """what() when the rewards of that step are asked for."""
    real = train.seed_rewards
    due = []
    monkeypatch.setattr(train, "seed_rewards", lambda seed, now: (due.clear(), due.extend([1] * (now == step)), real(seed, now)))

    def triggered(p, responses, references):
        if due:
            what()
        return [len(r) / 100 for r in responses]

    monkeypatch.setitem(rewards.TASKS, "tools", [Reward("mine", triggered), Reward("vowels", lambda p, rs, ref: [r.count("e") / 9 for r in rs])])


def same(a: Path, b: Path) -> None:
    assert kill_and_resume.differences(a, b) == []


# Stopped and resumed

def test_two_killed_runs_are_resumed_to_the_bit():
    assert kill_and_resume.main(["--kills", "2", "--steps", "4"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same(monkeypatch, tmp_path, capsys, number):
    """Received while a step's rewards are computed: that step is done again."""
    at_step(monkeypatch, -1, None)
    run(monkeypatch, tmp_path, "--eval-every", 2, "--updates", 2, name="alone")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            run(patch, tmp_path, "--eval-every", 2, "--updates", 2, "--save-every", 0)
    assert ended.value.code == 128 + number
    assert f"stopped by {number.name}; to go on from step 2: python train.py --resume runs/a\n" in capsys.readouterr().err
    assert not (tmp_path / "runs/a/checkpoint").exists()
    stop._signals.clear()
    run(monkeypatch, tmp_path, "--resume", "runs/a", "--save-every", 3, "--eval-every", 2, name=None)
    assert "changed: --save-every 3, the run has 0\n" in capsys.readouterr().out
    same(tmp_path / "runs/alone", tmp_path / "runs/a")
    assert not (tmp_path / "runs/a/state").exists()
    run(monkeypatch, tmp_path, "--resume", "runs/a", name=None)
    assert capsys.readouterr().out == "runs/a is finished, with all of its 4 steps: nothing is left to do\n"


def test_a_signal_during_the_update(monkeypatch, tmp_path):
    """Before its first optimizer step the step is given up, later it is finished. Either way the rest is the same."""
    options = ["--prompts", 4, "--updates", 2, "--tokens-per-microbatch", 300, "--steps", 3]  # four micro-batches a step
    at_step(monkeypatch, -1, None)
    run(monkeypatch, tmp_path, *options, name="alone")
    real = rvpo.policy_loss
    for call, saved in ((5, "step-1"), (7, "step-2")):
        calls = []

        def loss(*args, calls=calls, call=call):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(rvpo, "policy_loss", loss)
            with pytest.raises(SystemExit):
                run(patch, tmp_path, *options, "--save-every", 0, name=saved)
        assert files.latest(tmp_path / "runs" / saved).name == saved
        stop._signals.clear()
        run(monkeypatch, tmp_path, "--resume", f"runs/{saved}", name=None)
        same(tmp_path / "runs/alone", tmp_path / "runs" / saved)


def launch(*args, cwd: Path, ranks: int = 2, **options) -> subprocess.Popen:
    return kill_and_resume.start("a", cwd, ranks, "--engine", "hf", *SHORT, *args, **options)


def until(condition, process: subprocess.Popen, log: Path) -> None:
    kill_and_resume.wait(condition, process)
    assert condition(), log.read_text()[-3000:]


def test_ranks_are_stopped_by_a_signal_to_one_and_resumed_as_one_or_four(tmp_path):
    """Rewards without chance: each rank draws its own numbers."""
    args = ["--resume", "auto", "--steps", 6, "--save-every", "0", "--prompts", 3]
    process = launch(*args, cwd=tmp_path, kind="child-without-chance")
    log = tmp_path / "a.log"
    until(lambda: (tmp_path / "runs/a/samples.jsonl").exists(), process, log)
    began = time.monotonic()
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
    assert process.wait(60) == 1 and time.monotonic() - began < 30
    assert log.read_text().count("stopped by SIGTERM; to go on from step ") == 1 and "]: Traceback" not in log.read_text()
    shutil.copytree(tmp_path / "runs", tmp_path / "stopped")
    losses = {}
    for total in (2, 1, 4):
        shutil.rmtree(tmp_path / "runs")
        shutil.copytree(tmp_path / "stopped", tmp_path / "runs")
        process = launch(*args, cwd=tmp_path, ranks=total, kind="child-without-chance")
        assert process.wait(300) == 0, log.read_text()[-3000:]
        steps = [line for line in lines(tmp_path / "runs/a/metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
        losses[total] = [line["loss"] for line in steps]
    assert f"changed: ranks 4, the run had 2\n" in log.read_text()
    for total in (1, 4):
        assert max(abs(a - b) for a, b in zip(losses[total], losses[2], strict=True)) < 1e-5


def test_torchrun_starts_again_when_a_rank_dies(tmp_path):
    process = launch("--resume", "auto", cwd=tmp_path, restarts=1)
    log = tmp_path / "a.log"
    until(lambda: (tmp_path / "runs/a/state/step-1").exists(), process, log)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    assert process.wait(60) == 0, log.read_text()[-3000:]
    steps = [line["step"] for line in lines(tmp_path / "runs/a/metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4, 4]  # evaluations are 0 and the last


def moments(policy, seed: int = 0):
    """An AdamW that has taken a step on gradients that depend on names only."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, fused=True)
    for i, parameter in enumerate(policy.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 + i)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("total", [2, 4])
def test_a_checkpoint_of_some_ranks_is_loaded_by_others(tmp_path, llama, total):
    """One rank's by several, then theirs by one; of parameters in shapes that ranks cannot share evenly."""
    policy = policies.load(llama, ranks.CPU)
    optimizer = moments(policy)
    checkpoint.save(tmp_path / "one", policy, optimizer, {"step": 3}, keep=1)
    on_ranks(total, total, tmp_path / "many", llama, llama, tmp_path / "one")
    again = policies.load(llama, ranks.CPU)
    other = torch.optim.AdamW(again.parameters(), fused=True)
    assert checkpoint.load(tmp_path / "many/state/step-4", again, other)["world_size"] == total
    saved, loaded = checkpoint.tensors(policy, optimizer), checkpoint.tensors(again, other)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert {state["step"].item() for state in other.state.values()} == {1}
    assert not [*tmp_path.rglob("*.metadata"), *tmp_path.rglob("*.pt"), *tmp_path.rglob("*.distcp")]  # no pickle
