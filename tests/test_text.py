"""The study on a real model and the demo, with the tiny model in its place: what is run, kept,
repeated and reported."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "study"))

import demo
import matched
import text
import text_report

from config import TrainConfig, parse
from tools import stats

TINY = "--engine hf --prompts 2 --group 2 --max-tokens 8 --eval-prompts 4".split()


def outcome(run: text.Run, joint: list[float], short: float = 0.5) -> dict:
    evals = [
        {"step": 3 * i, "short": [short, 0.0], "name": [0.9, 0.0], "joint": [x, 0.0]}
        for i, x in enumerate(joint)
    ]
    return {
        "name": run.name,
        **run._asdict(),
        "minutes": 6.0,
        "cpu": "a",
        "eval": evals,
        "train": {"short": [0.9, short]},
        "credit": {"short": [0.1, None]},
        "longer": [0.5, None],
    }


def test_the_plan_is_matched_and_has_all_that_was_run():
    first = [run for run in text.plan({}) if run not in {*text.at_one_rate()}]
    assert {run.seed for run in first} == {text.TUNING} and len(first) == len({*first}) == 18
    done = {run.name: outcome(run, [0.0, 0.5 if run.lr == "2e-5" else 0.1, 0.0]) for run in first}
    runs = [run for run in text.plan(done) if run.seed != text.TUNING]
    # Also of 0.5:2, which takes rvpo's:
    assert {run.lr for run in runs if run not in {*text.at_one_rate()}} == {"2e-5"}
    for method in text.METHODS:
        kind = "reply", method, text.STEPS, "constant"
        same = [run for run in runs if (run.task, run.method, run.steps, run.schedule) == kind]
        expected = range(10 if method in text.COMPARED else 3)
        assert {run.seed for run in same} == {*expected}
    had = text.STUDY.read()
    assert had.keys() <= {run.name for run in text.plan(had)}
    at_one_rate = {(run.method, run.seed) for run in text.at_one_rate()}
    assert {(method, seed) for method in text.COMPARED for seed in range(3)} <= at_one_rate
    assert ("gdpo masked", 0) in at_one_rate
    of_gdpo = text.Run("reply", "gdpo", "4e-5", 0, text.LONG).options()
    of_masked = text.Run("reply", "gdpo masked", "4e-5", 0, text.LONG).options()
    assert of_masked == [*of_gdpo, "--mask-truncated", "true"]
    assert parse(TrainConfig, "", of_masked).mask_truncated
    of_rvpo = " ".join(text.Run("reply", "rvpo", "1e-5", 3).options())
    of_gdpo = " ".join(text.Run("reply", "gdpo", "1e-5", 3).options())
    _, rest = of_rvpo.split("--task reply --agg rvpo --beta 2 ")
    assert of_gdpo == f"--task reply --agg gdpo {rest}"
    for method in text.METHODS:  # train.py refuses a beta that is not used
        parse(TrainConfig, "", text.Run("reply", method, "1e-5", 3).options())


def test_the_report_by_hand():
    done = {}
    for method, seed, joint in (
        ("rvpo", 0, [0.1, 0.9, 0.5]),
        ("gdpo", 0, [0.1, 0.2, 0.1]),
        ("rvpo", 1, [0.1, 0.3, 0.7]),
        ("gdpo", 1, [0.1, 0.0, 0.3]),
    ):
        run = text.Run("reply", method, "1e-5", seed)
        done[run.name] = outcome(run, joint, short=0.5 + seed / 10)
    report = text_report.report(done)
    lines = report.splitlines()
    of_rvpo = next(line for line in lines if line.startswith("| rvpo | 1e-5"))
    assert of_rvpo == (
        "| rvpo | 1e-5 | 2 | 0.550 ± 0.071 | 0.800 ± 0.141 | 0.600 ± 0.141 | 0.550 ± 0.071 | "
        "never, never | short 0.55 |  |  |"
    )
    of_gdpo = next(line for line in lines if line.startswith("| gdpo | 1e-5"))
    assert "| 0.250 ± 0.071 | 0.200 ± 0.141 |" in of_gdpo
    # Two seeds can say no more; the limit is kept as often as with rvpo.
    assert of_gdpo.endswith("| 0.500, 0.500 | 1.000, 1.000 |")
    assert "| gdpo | +0.10 (2) |  |  |  |  | +0.50 |" in report
    assert text_report.lost(outcome(text.Run("reply", "rvpo", "1e-5", 0), [0.0], short=0.4)) == "2"
    assert "4 runs, 0.4 hours" in report


def test_who_regains_the_limit_by_hand():
    run = text.Run("reply", "grpo", "4e-5", 1, text.LONG)
    line = outcome(run, [0.1, 1.0], short=1.0)
    line["train"] = {
        "short": [0.9, 0.4, 0.0, 0.0625, 0.75],
        "name": [0.5, 0.9, 0.96, 1.0, 1.0],  # full from step 3 on
        "truncated": [0.0, 0.5, 1.0, 0.5, 0.0],
        "entropy": [3.0, 2.0, None, 1.5, 1.0],
    }
    line["would pay"] = {
        method: {"all": [0.1, 0.2, None, 0.3, 0.4], "lacking": [None] * 5}
        for method in text.COMPARED
    }
    line["would pay"]["rvpo"] = {"all": [None] * 5, "lacking": [0.1, 0.2, None, -0.3, 0.4]}
    never = line | {"train": {"short": [0.9], "name": [1.0]}}
    cells = {"grpo": [line], "rvpo": [never]}
    table = text_report.returns(cells)
    assert "| grpo | 1 | 2 | 3 | 2 of 64 | 0.75 | 1.50 | 5 | 1.00 |" in table
    assert "| rvpo | 1 | never |  |  |  |  |  | 1.00 |" in table
    assert text_report.course(never) is None
    lost_for_good = line | {"train": {name: of_run[:3] for name, of_run in line["train"].items()}}
    counts = text_report.regained({"gdpo": [lost_for_good] * 3, "grpo": [line] * 3, "rvpo": []})
    assert "| gdpo | 0 of 3 | 1.000 ± 0.000 |  |" in counts
    assert "| grpo | 3 of 3 | 1.000 ± 0.000 | 0.100, 0.100 |" in counts
    assert stats.fisher(5, 5, 0, 3) == pytest.approx(1 / 56)
    assert stats.fisher(3, 4, 1, 4) == pytest.approx(34 / 70)  # Fisher's tea
    pays = text_report.first_pay(cells)
    assert "| rvpo |  | -0.300 (1) |" in pays and "| grpo | 0.300 (1) |  |" in pays


def test_a_run_is_kept_and_repeated_to_the_digit(tiny, monkeypatch, tmp_path, capsys):
    study = text.STUDY._replace(file=tmp_path / "text.jsonl")
    monkeypatch.setattr(matched, "RUNS", tmp_path / "runs")
    options = text.Run.options

    def with_tiny(run):
        return [*options(run), "--model", str(tiny), *TINY]

    monkeypatch.setattr(text.Run, "options", with_tiny)
    run = text.Run("reply", "rvpo", "1e-3", 7, steps=6)
    kept = matched.execute(study, run)
    lacking = kept["would pay"]["rvpo"]["lacking"]  # the tiny model satisfies nothing else
    np.testing.assert_allclose(lacking, kept["paid"]["short"], atol=1e-4)
    cut_off = kept["paid"]["cut off"]
    assert len(cut_off) == 6 and {*cut_off} != {None}  # random text has no end: all are cut off
    assert [x["step"] for x in kept["eval"]] == [0, 3, 6]
    assert len(kept["train"]["short"]) == len(kept["credit"]["short"]) == 6
    (tmp_path / "text.jsonl").write_text(json.dumps(kept) + "\n")
    matched.again(study, run.name)
    assert capsys.readouterr().out.count("the same\n") == 8
    with pytest.raises(SystemExit, match="no such run"):
        matched.again(study, "other")


def test_the_demo(tiny, tmp_path):
    def run_demo(*words):
        command = [sys.executable, ROOT / "study/demo.py", "--model", tiny, *TINY, *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    out = run_demo("--name", "d", "--steps", "2")
    assert out.returncode == 0, out.stderr
    assert re.search(r"rvpo step +2/2  joint 0\.\d\d \| short .* \| \d+ s left", out.stdout)
    assert re.search(r"gdpo held out +2/2  joint 0\.\d\d \| short", out.stdout)
    assert "  short      at most 35 words\n" in out.stdout
    *_, samples = out.stdout.partition("with standard errors.")
    assert samples.count("user: Hi, I am ") == 2 and samples.count(" short 1]") > 0
    assert (tmp_path / "runs" / "d.html").stat().st_size > 10_000
    _, _, lines = out.stdout.partition("  held out ")
    row = next(line for line in lines.splitlines() if line.strip().startswith("short")).split()
    assert len(row) == 11  # a name and five means with their errors
    assert (tmp_path / "runs" / "d.png").stat().st_size > 10_000
    curves = demo.read_curves(tmp_path / "runs" / "d.jsonl")
    assert [*curves] == ["rvpo", "gdpo"]
    assert [line["step"] for line in curves["gdpo"] if "train" in line] == [1, 2]
    assert demo.table(curves) in out.stdout
    out = run_demo("--name", "d", "--steps", "2")
    assert out.returncode == 1
    assert out.stderr == "error: runs/d-rvpo exists: choose another --name, or delete it\n"
    out = run_demo("--name", "e", "--steps", "2", "--group", "1")
    assert out.returncode == 1 and "--group" in out.stderr and "Traceback" not in out.stderr
