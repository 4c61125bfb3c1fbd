"""A task of one's own, trained and evaluated by the real commands."""

import json
import subprocess
import sys

import numpy as np
from conftest import ROOT

import rewards
from config import JudgeOptions, TaskOptions

POLITE = ROOT / "examples" / "polite.py"


def test_polite_is_a_whole_task():
    assert len(POLITE.read_text().splitlines()) <= 20
    task = rewards.load_task(TaskOptions(str(POLITE), None, None, JudgeOptions(), "short=0.5"))
    train, held_out = task.prompts(None, None)
    assert len(train) == 6 and len(held_out) == 2 and not {str(e) for e in train} & {str(e) for e in held_out}
    assert [len(part) for part in task.prompts(4, 1)] == [4, 1] and task.prompts(0, 1)[0] == []
    assert [(channel.name, channel.weight) for channel in task.channels(train[0])] == [("polite", 2), ("short", 0.5)]
    np.testing.assert_array_equal(task.start(train[0], ["A map, Please!", "please " * 20, ""])(), [[1, 1], [1, 0], [0, 1]])


def test_polite_trains_and_evaluates(tiny, tmp_path):
    def run(script: str, *options: str) -> str:
        command = [sys.executable, ROOT / script, "--task", POLITE, "--engine", "hf", "--max-tokens", "16", *options]
        out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr[-3000:]
        return out.stdout

    run("train.py", "--model", tiny, "--steps", "1", "--group", "2", "--prompts", "2", "--eval-prompts", "2", "--name", "polite")
    lines = [json.loads(line) for line in (tmp_path / "runs/polite/metrics.jsonl").read_text().splitlines()]
    assert all(set(line["eval"]) == {"joint", "polite", "short"} for line in lines if "eval" in line)
    assert {*lines[1]["channels"]} == {"polite", "short"}
    assert "joint" in run("eval.py", "--model", "runs/polite", "--limit", "1", "--name", "scores")
    results = json.loads((tmp_path / "runs/scores/results.json").read_text())
    assert {*results["metrics"]} == {"joint", "polite", "short"} and results["metrics"]["short"]["n"] == 1
    assert len((tmp_path / "runs/scores/samples.jsonl").read_text().splitlines()) == 1
