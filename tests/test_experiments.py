"""The paper's experiments: their files hold what programs know, and one is run, scaled down, killed in the middle, to its table."""

import argparse
import fcntl
import json
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

JUDGE = [
    "--judge-url",
    "http://h/v1",
    "--judge-model",
    "j",
    "--grader-url",
    "http://g/v1",
    "--grader-model",
    "g",
]


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
    found = run.jobs(options(monkeypatch, name, *JUDGE))
    experiment = read(name)
    assert (
        len({job.run for job in found})
        == len(found)
        == len(experiment["seeds"]) * len(experiment["models"]) * len(experiment["methods"])
    )
    assert experiment["baseline"] in experiment["methods"]
    for job in found:
        train, evaluate = parse(TrainConfig, "", job.train), parse(EvalConfig, "", job.evaluate)
        assert (
            train.keep_policies
            and evaluate.policies
            and evaluate.model == str(job.run)
            and train.name == job.run.name
        )
        assert (
            train.resume == "auto"
            and train.seed == job.seed
            and (evaluate.judge_model or "g") == "g"
        )
    for line in (
        (FOLDER / f"{name}.toml").read_text().partition("[train]")[2].partition("[")[0].splitlines()
    ):
        assert "#" in line or not re.match(r"\w+ =", line) or line.startswith("keep_policies")


def test_what_the_paper_and_its_sources_say(monkeypatch):
    """docs/reproduce.md has the sources."""
    (job,) = run.jobs(
        options(monkeypatch, "tools", "--models", "1.5B", "--methods", "rvpo 1", "--seeds", "7")
    )
    config = parse(TrainConfig, "", job.train)
    assert (
        config.model,
        config.task,
        config.prompts,
        config.group,
        config.updates,
        config.steps,
        config.lr,
        config.kl,
        config.max_tokens,
        config.beta,
    ) == ("Qwen/Qwen2.5-1.5B-Instruct", "rlla", 512, 4, 4, 100, 1e-6, 0, 1024, "1")
    (job,) = run.jobs(options(monkeypatch, "single", "--methods", "single", "--seeds", "0", *JUDGE))
    config = parse(TrainConfig, "", job.train)
    assert (config.agg, config.weights, config.group, config.prompts, config.steps, config.lr) == (
        "grpo",
        "category",
        16,
        96,
        300,
        5e-6,
    )
    shared = {job.run for job in run.jobs(options(monkeypatch, "medicine", *JUDGE))} & {
        job.run for job in run.jobs(options(monkeypatch, "beta", *JUDGE))
    }
    assert {path.name for path in shared} == {
        f"rar-medicine-7B-{method}-s{seed}"
        for method in ("rvpo", "gdpo", "hardmin")
        for seed in range(3)
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
    with pytest.raises(
        InputError,
        match=r"runs/rlla-1.5B-rvpo-s0 is another run: its --lr is 1e-05, and 1e-06 in the experiment; move it away",
    ):
        run.check(job, run.MAY_CHANGE)


def test_an_experiment_killed_in_the_middle_and_its_table(monkeypatch, tmp_path):
    """Two methods, three seeds: runner and run are killed, the same line goes on and repeats nothing that is done."""
    words = "medicine", "--tiny", "--methods", "rvpo", "gdpo"
    process, first = start(tmp_path, *words), tmp_path / "runs/tiny-rar-medicine-3B-rvpo-s0"
    end = time.monotonic() + 300
    while (
        not (first / "state/step-1").exists() and process.poll() is None and time.monotonic() < end
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) and not (tmp_path / "runs/tiny-rar-medicine-3B-gdpo-s0").exists()
    out = finish(start(tmp_path, *words), tmp_path)
    assert "rar-medicine, 3B, healthbench: 6 of 6 runs" in out and out.count(
        "train.py --model"
    ) == 6 == out.count("eval.py --task healthbench")
    steps = [
        json.loads(line)["step"]
        for line in (first / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    assert steps == [1, 2, 3]
    rows = {
        cells[1]: cells[2:-1]
        for line in out.splitlines()
        if (cells := [cell.strip() for cell in line.split("|")])[1:2] in (["rvpo"], ["gdpo"])
    }
    curves = {
        m: [
            [
                json.loads(
                    (
                        tmp_path
                        / f"runs/tiny-rar-medicine-3B-{m}-s{seed}-healthbench/step-{step}/results.json"
                    ).read_text()
                )["metrics"]
                for step in (0, 2, 3)
            ]
            for seed in range(3)
        ]
        for m in rows
    }
    for m, (n, begun, best, final, accuracy, *_) in rows.items():
        scores = np.array([[x["overall"]["mean"] for x in curve] for curve in curves[m]])
        assert n == "3"
        for shown, values in (
            (begun, scores[:, 0]),
            (best, scores.max(1)),
            (final, scores[:, -1]),
            (accuracy, [curve[-1]["axis:accuracy"]["mean"] for curve in curves[m]]),
        ):
            assert shown == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    differences = [
        a[-1]["overall"]["mean"] - b[-1]["overall"]["mean"]
        for a, b in zip(curves["rvpo"], curves["gdpo"], strict=True)
    ]
    p = sign_flip(differences)
    items = [
        compare(
            *(
                tmp_path / f"runs/tiny-rar-medicine-3B-{m}-s{seed}-healthbench/step-3/results.json"
                for m in ("gdpo", "rvpo")
            )
        )[0]["p"]
        for seed in range(3)
    ]
    assert (
        rows["rvpo"][-3:]
        == [
            f"{np.mean(differences):+.3f}",
            f"{p:.3f}, {p:.3f}",
            ", ".join(f"{x:.3f}" for x in items),
        ]
        and rows["gdpo"][-3:] == [""] * 3
    )
    assert {
        line["judge"]["missing"]
        for line in map(json.loads, (first / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    } == {0}
    table = finish(start(tmp_path, *words, "--table"), tmp_path)
    assert "train.py" not in table and [
        line for line in table.splitlines() if line.startswith("| rvpo")
    ] == [line for line in out.splitlines() if line.startswith("| rvpo")]


def test_what_another_node_has_is_left_to_it_and_what_this_one_has_is_waited_for(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    (job, *_), called = run.jobs(options(monkeypatch, "tools")), []
    monkeypatch.setattr(run, "call", lambda command, locks: called.append(command))
    with run.locked(job.run.name, False) as held:
        assert held is not None
        run.work(job, 8)
    assert (
        called == []
        and capsys.readouterr().out == "runs/rlla-1.5B-rvpo-s0: another node is at it\n"
    )
    run.work(job, 8)
    assert [next(word for word in command if word.endswith(".py")) for command in called] == [
        str(ROOT / "train.py"),
        str(ROOT / "eval.py"),
    ]
    assert called[0][:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    code = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from experiments import run\nwith run.locked('host', True): print('has it')"
    with (tmp_path / "runs/.locks/host").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE, text=True
        )
        assert (
            process.stdout.readline() == "waiting for a run that is under way on this node\n"
            and process.poll() is None
        )
    assert process.communicate(timeout=60)[0] == "has it\n"


def test_the_table_needs_no_judge(tmp_path):
    out = subprocess.run(
        [sys.executable, ROOT / "experiments/run.py", "medicine", "--table"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "rar-medicine, 14B, healthbench: 0 of 15 runs" in out and not [*tmp_path.iterdir()]


def test_commands_are_what_would_be_run(tmp_path):
    out = subprocess.run(
        [
            sys.executable,
            ROOT / "experiments/run.py",
            "medicine",
            "--commands",
            "--models",
            "14B",
            "--methods",
            "rvpo",
            "--seeds",
            "1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(out) == 2 and out[0].startswith(
        "torchrun --standalone --nproc_per_node=8 train.py --model Qwen/Qwen2.5-14B-Instruct --gpu-memory 0.5 --task rar-medicine"
    )
    assert "--judge-url JUDGE_URL --judge-model JUDGE_MODEL" in out[1] and out[1].endswith(
        "--model runs/rar-medicine-14B-rvpo-s1 --policies --name rar-medicine-14B-rvpo-s1-healthbench"
    )
    assert not (tmp_path / "runs").exists()
