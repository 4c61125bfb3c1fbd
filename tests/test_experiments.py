"""The paper's experiments: their files hold what the programs know; one is run to its table.

It is scaled down, and killed in the middle."""

import argparse
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from config import TrainConfig, parse
from eval import EvalConfig
from experiments import run
from experiments.files import FOLDER, NAMES, read
from infra.ranks import InputError
from tools.compare import compare
from tools.stats import sign_flip

JUDGE = "--judge-url http://h/v1 --judge-model j --grader-url http://g/v1 --grader-model g".split()


def options(monkeypatch, *words) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    return run.options()


def start(cwd, *words) -> subprocess.Popen:
    with (cwd / "out.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, ROOT / "experiments/run.py", *words],
            cwd=cwd,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(process: subprocess.Popen, cwd) -> str:
    assert process.wait(600) == 0, (cwd / "out.log").read_text()[-3000:]
    return (cwd / "out.log").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_files_hold_options_that_exist_each_with_its_source(name, monkeypatch):
    jobs = run.jobs(options(monkeypatch, name, *JUDGE))
    experiment = read(name)
    combinations = [len(experiment[part]) for part in ("seeds", "models", "methods")]
    assert len({job.run for job in jobs}) == len(jobs) == math.prod(combinations)
    assert experiment["baseline"] in experiment["methods"]
    for job in jobs:
        train, evaluate = parse(TrainConfig, "", job.train), parse(EvalConfig, "", job.evaluate)
        assert train.keep_policies and evaluate.policies
        assert evaluate.model == str(job.run) and train.name == job.run.name
        assert train.resume == "auto" and train.seed == job.seed
        assert evaluate.judge_model in (None, "g")
    _, _, rest = (FOLDER / f"{name}.toml").read_text().partition("[train]")
    of_train, *_ = rest.partition("[")
    for line in re.findall(r"^\w+ =.*", of_train, re.MULTILINE):
        assert "#" in line or line.startswith("keep_policies")


def test_what_the_paper_and_its_sources_say(monkeypatch):
    """docs/reproduce.md has the sources."""
    words = ["--models", "1.5B", "--methods", "rvpo 1", "--seeds", "7"]
    (job,) = run.jobs(options(monkeypatch, "tools", *words))
    tools = {
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "task": "rlla",
        "prompts": 512,
        "group": 4,
        "updates": 4,
        "steps": 100,
        "lr": 1e-6,
        "kl": 0,
        "max_tokens": 1024,
        "beta": "1",
    }
    assert parse(TrainConfig, "", job.train).model_dump().items() >= tools.items()
    (job,) = run.jobs(options(monkeypatch, "single", "--methods", "single", "--seeds", "0", *JUDGE))
    single = {
        "agg": "grpo",
        "weights": "category",
        "group": 16,
        "prompts": 96,
        "steps": 300,
        "lr": 5e-6,
    }
    assert parse(TrainConfig, "", job.train).model_dump().items() >= single.items()
    medicine = run.jobs(options(monkeypatch, "medicine", *JUDGE))
    beta = run.jobs(options(monkeypatch, "beta", *JUDGE))
    methods = "rvpo", "gdpo", "hardmin"
    assert {job.run.name for job in medicine} & {job.run.name for job in beta} == {
        f"rar-medicine-7B-{method}-s{seed}" for method in methods for seed in range(3)
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["medicine"], "--judge-url: rar-medicine needs a judge"),
        (["science", "--judge-url", "http://h/v1"], "--judge-model: rar-science needs a judge"),
        (["tools", "--models", "7B"], "--models 7B: tools has 1.5B, 3B"),
        (["tools", "--methods", "dpo"], "--methods dpo: tools has rvpo, rvpo 1, gdpo, grpo"),
    ],
)
def test_bad_input(words, message, monkeypatch):
    with pytest.raises(InputError, match=message):
        run.jobs(options(monkeypatch, *words))


def test_a_finished_run_with_other_options_is_not_taken_for_the_experiment_s(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (job, *_) = run.jobs(options(monkeypatch, "tools"))
    run.check(job, run.MAY_CHANGE)
    config = {**parse(TrainConfig, "", job.train).model_dump(), "lr": 1e-5}
    (job.run / "checkpoint").mkdir(parents=True)
    (job.run / "config.json").write_text(json.dumps(config))
    (job.run / "metrics.jsonl").write_text(json.dumps({"step": 100, "eval": {}}))
    reason = "its --lr is 1e-05, and 1e-06 in the experiment; move it away"
    with pytest.raises(InputError, match=f"runs/rlla-1.5B-rvpo-s0 is another run: {reason}"):
        run.check(job, run.MAY_CHANGE)


def test_an_experiment_killed_in_the_middle_and_its_table(tmp_path):
    """Runner and run are killed. The same line goes on, and repeats nothing that is done."""
    words = "medicine", "--tiny", "--methods", "rvpo", "gdpo"
    process, first = start(tmp_path, *words), tmp_path / "runs/tiny-rar-medicine-3B-rvpo-s0"
    deadline = time.monotonic() + 300
    while not (first / "state/step-1").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) and not (tmp_path / "runs/tiny-rar-medicine-3B-gdpo-s0").exists()
    out = finish(start(tmp_path, *words), tmp_path)
    assert "rar-medicine, 3B, healthbench: 6 of 6 runs" in out
    assert out.count("train.py --model") == out.count("eval.py --task healthbench") == 6
    lines = map(json.loads, (first / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {line["judge"]["missing"] for line in steps} == {0}

    rows = {name: table_row(out, name) for name in ("rvpo", "gdpo")}
    for name, (n, begun, best, final, accuracy, *_) in rows.items():
        scores = np.array([overall(tmp_path, name, seed) for seed in range(3)])  # (seeds, steps)
        axis = [measured(tmp_path, name, seed, 3)["axis:accuracy"]["mean"] for seed in range(3)]
        assert n == "3"
        assert begun == mean_and_deviation(scores[:, 0])
        assert best == mean_and_deviation(scores.max(1))
        assert final == mean_and_deviation(scores[:, -1])
        assert accuracy == mean_and_deviation(axis)
    differences, of_items = [], []
    for seed in range(3):
        *_, of_rvpo = overall(tmp_path, "rvpo", seed)
        *_, of_gdpo = overall(tmp_path, "gdpo", seed)
        differences.append(of_rvpo - of_gdpo)
        first_metric, *_ = compare(*(results(tmp_path, m, seed, 3) for m in ("gdpo", "rvpo")))
        of_items.append(f"{first_metric['p']:.3f}")
    p = sign_flip(differences)
    difference = f"{np.mean(differences):+.3f}"
    assert rows["rvpo"][-3:] == [difference, f"{p:.3f}, {p:.3f}", ", ".join(of_items)]
    assert rows["gdpo"][-3:] == [""] * 3

    table = finish(start(tmp_path, *words, "--table"), tmp_path)
    assert "train.py" not in table and table_row(table, "rvpo") == rows["rvpo"]


def table_row(text: str, name: str) -> list[str]:
    """The cells that follow the name."""
    (row,) = re.findall(rf"^\| {name} \|(.*)\|$", text, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def results(cwd, method: str, seed: int, step: int):
    run = f"runs/tiny-rar-medicine-3B-{method}-s{seed}-healthbench"
    return cwd / run / f"step-{step}/results.json"


def measured(cwd, method: str, seed: int, step: int) -> dict:
    return json.loads(results(cwd, method, seed, step).read_text())["metrics"]


def overall(cwd, method: str, seed: int) -> list[float]:
    """The run's mean score at the start, after two steps and at the end."""
    return [measured(cwd, method, seed, step)["overall"]["mean"] for step in (0, 2, 3)]


def mean_and_deviation(values) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def test_what_another_node_has_is_left_to_it_and_what_this_one_has_is_waited_for(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    job, *_ = run.jobs(options(monkeypatch, "tools"))
    called = []
    monkeypatch.setattr(run, "call", lambda command, locks: called.append(command))
    with run.locked(job.run.name, False) as held:
        assert held is not None
        run.work(job, 8)
    assert called == []
    assert capsys.readouterr().out == "runs/rlla-1.5B-rvpo-s0: another node is at it\n"
    run.work(job, 8)
    train, evaluate = called
    assert train[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    assert str(ROOT / "train.py") in train and str(ROOT / "eval.py") in evaluate
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from experiments import run
with run.locked('host', True):
    print('has it')
"""
    command = [sys.executable, "-c", code, ROOT]
    with (tmp_path / "runs/.locks/host").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        waiting = "waiting for a run that is under way on this node\n"
        assert process.stdout.readline() == waiting and process.poll() is None
    out, _ = process.communicate(timeout=60)
    assert out == "has it\n"


def test_the_table_needs_no_judge(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run.main(options(monkeypatch, "medicine", "--table"))
    assert "rar-medicine, 14B, healthbench: 0 of 15 runs" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_commands_are_what_would_be_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = "medicine --commands --models 14B --methods rvpo --seeds 1"
    run.main(options(monkeypatch, *words.split()))
    train, evaluate = capsys.readouterr().out.splitlines()
    assert train.startswith(
        "torchrun --standalone --nproc_per_node=8 train.py --model Qwen/Qwen2.5-14B-Instruct "
        "--gpu-memory 0.5 --task rar-medicine"
    )
    assert "--judge-url JUDGE_URL --judge-model JUDGE_MODEL" in evaluate
    name = "rar-medicine-14B-rvpo-s1"
    assert evaluate.endswith(f"--model runs/{name} --policies --name {name}-healthbench")
    assert not (tmp_path / "runs").exists()
