"""What is logged of a step."""

import io
import json
import math
import re
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from programs import TINY, command, launch

from infra import terminal
from infra.log import Log, RunLog, open_tracker
from infra.prompts import Prompt
from infra.resume import finish
from infra.statistics import channel_stats
from rewards import Channel, Example
from rollout import Group, Response

NAN = math.nan


def make(rewards, *names: str, weights=None) -> Group:
    rewards = torch.tensor(rewards, dtype=torch.float64)
    weights = weights or [1.0] * len(names)
    channels = [Channel(name, weight=w) for name, w in zip(names, weights, strict=True)]
    prompt = Prompt([1], Example([{"role": "user", "content": "q"}]))
    responses = [Response([1, 2], [], [], "stop", "r")] * len(rewards)
    return Group(prompt, channels, responses, rewards, torch.zeros(len(rewards)))


def test_channel_stats_by_hand():
    with_signal = make([[1.0, 0.0, NAN], [0.0, 0.0, NAN]], "a", "b", "c")
    without = make([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]], "a", "b", "c")
    stats = channel_stats([with_signal, without], 2.0)
    assert [stats[name]["mean"] for name in "abc"] == [0.75, 0.5, 2.0]
    assert [(stats[name]["min"], stats[name]["max"]) for name in "abc"] == [(0, 1), (0, 1), (2, 2)]
    assert [stats[name]["std"] for name in "abc"] == pytest.approx([0.5, 3**-0.5, 0.0])
    assert [stats[name]["constant"] for name in "abc"] == [0.5, 1.0, 1.0]
    assert [stats[name]["missing"] for name in "abc"] == [0.0, 0.0, 0.5]
    # z of the first group: (+x, 0), (-x, 0). Its first rollout is bound by b, its second by a.
    assert [stats[name]["binding"] for name in "abc"] == [0.5, 0.5, 0.0]
    assert sum(stats[name]["weight"] for name in "abc") == pytest.approx(1.0)
    assert stats["c"]["weight"] == 0


def test_channel_stats_of_channels_with_one_name():
    """Two criteria of one category in the first prompt; the second has one criterion."""
    stats = channel_stats(
        [make([[1.0, 0.0], [0.0, NAN]], "x", "x"), make([[1.0], [1.0]], "y")], 1.0
    )
    expected = {
        "mean": 1 / 3,
        "min": 0,
        "max": 1,
        "std": 3**-0.5,
        "missing": 0.25,
        "constant": 0.5,
        "binding": 1.0,
        "weight": 1.0,
    }
    assert stats["x"] == pytest.approx(expected)
    assert stats["y"]["missing"] == 0 and stats["y"]["mean"] == 1 and stats["y"]["binding"] == 0
    empty = channel_stats([make([[NAN], [NAN]], "z")], 1.0)["z"]
    assert empty["missing"] == 1
    assert all(math.isnan(empty[key]) for key in ("mean", "std", "min", "constant", "binding"))


def test_a_channel_without_weight_is_logged_and_neither_binds_nor_counts():
    group = make([[1.0, 0.0], [0.0, 1.0]], "a", "b", weights=[1.0, 0.0])
    stats = channel_stats([group], 1.0)
    assert stats["b"]["mean"] == 0.5
    assert stats["b"]["binding"] == stats["b"]["weight"] == 0
    assert stats["a"]["weight"] == 1
    without_signal = make([[1.0, 0.0], [1.0, 1.0]], "a", "b", weights=[1.0, 0.0])
    assert math.isnan(channel_stats([without_signal], 1.0)["a"]["binding"])


def figures(**others) -> dict:
    """What an update and the clock say of a step."""
    return {
        "grad_norm": 1.0,
        "entropy": 2.0,
        "beta": 1.0,
        "bad_updates": [],
        "seconds": {"sample": 1.0, "save": 9.0},
        **others,
    }


class Lines(Log):
    def __init__(self):
        self.records = []

    def metrics(self, record):
        self.records.append(record)

    def say(self, line):
        self.line = line


def test_a_line_of_an_evaluation():
    log = Lines()
    log.evaluation(3, [{"joint": 1.0, "a": 0.5}, {"joint": NAN, "a": 1.0}, {"b": NAN}], {})
    unknown = pytest.approx(NAN, nan_ok=True)
    assert log.records == [
        {"step": 3, "eval": {"a": (0.75, 0.25), "b": (unknown, unknown), "joint": (1.0, unknown)}}
    ]
    assert log.line == "held out 3  joint 1.00 | a 0.75 b missing"
    log.evaluation(0, [], {})
    assert log.records[-1] == {"step": 0, "eval": {}} and log.line == "held out 0  joint missing | "


def test_a_line_of_a_step():
    log, group = Lines(), make([[1.0, 0.0], [1.0, 1.0], [NAN, NAN]], "a", "b")
    log.step(1, [group], figures(bad_updates=[0]))
    (record,) = log.records
    assert record["joint"] == 0.5
    assert record["no_signal"] == pytest.approx(1 / 3)
    assert record["tokens_per_second"] == 6
    assert record["length_max"] == 2
    assert "updates left out: [0]" in log.line


def test_a_line_says_what_the_update_works_against():
    log, group = Lines(), make([[1.0, 0.0], [0.0, 1.0]], "a", "b")
    group.advantages = torch.tensor([-1.0, 1.0])
    log.step(1, [group], figures())
    assert "works against a (-1.00) |" in log.line and "against b" not in log.line
    (record,) = log.records
    credit = {name: stats["credit"] for name, stats in record["channels"].items()}
    assert credit == pytest.approx({"a": -1.0, "b": 1.0})


def warnings_of(
    tmp_path, monkeypatch, capsys, values: dict[str, float], steps: int, held_out: int = 0
) -> list[str]:
    """The warnings of a run whose two responses a step have these rewards."""
    log, group = RunLog(tmp_path), make([[*values.values()]] * 2, *values)
    if held_out:
        log.evaluation(0, [values] * held_out, {}, dict.fromkeys(values, 1.0))
    for step in range(1, steps + 1):
        log.step(step, [group], figures())
    return re.findall("^warning: (.*)", capsys.readouterr().out, re.MULTILINE)


REWARDS = {"unhit": 0.0, "gone": NAN, "kept": 1.0}
UNHIT = (
    "it teaches nothing until a response does better; show one in the prompt, "
    "pay for a part of what it asks, or begin with an easier task"
)
GONE = "it teaches nothing; see why its function or its judge gives NaN"


def test_a_reward_that_nobody_hits_is_pointed_out_after_the_first_evaluation(
    tmp_path, monkeypatch, capsys
):
    assert warnings_of(tmp_path, monkeypatch, capsys, REWARDS, 3, held_out=5) == [
        f"reward 'unhit' was 0 on all of the 5 held-out prompts: {UNHIT}",
        f"reward 'gone' was missing on all of the 5 held-out prompts: {GONE}",
    ]


def test_or_after_the_third_step_and_one_that_all_hit_after_the_tenth(
    tmp_path, monkeypatch, capsys
):
    third = [
        f"reward 'unhit' was 0 for every response of 3 steps: {UNHIT}",
        f"reward 'gone' was missing for every response of 3 steps: {GONE}",
    ]
    assert warnings_of(tmp_path, monkeypatch, capsys, REWARDS, 2) == []
    assert warnings_of(tmp_path, monkeypatch, capsys, REWARDS, 9) == third
    assert warnings_of(tmp_path, monkeypatch, capsys, REWARDS, 30) == [
        *third,
        "reward 'kept' was 1 for every response of 10 steps: it teaches nothing",
    ]


def test_the_final_table_keeps_what_is_missing(tmp_path, capsys):
    log = RunLog(tmp_path)
    for step in (0, 1):
        log.evaluation(step, [{"a": NAN, "b": 0.5}, {"a": NAN, "b": 1.0}], {})
    finish(log, 2, 0.7)
    *_, of_a, of_b, _, _ = capsys.readouterr().out.splitlines()
    assert of_a.split() == ["a", "missing", "missing"]
    assert of_b.split() == ["b", "0.750", "(0.250)", "0.750", "(0.250)"]


def test_tracking(tmp_path, monkeypatch):
    """Options, metrics and a table of samples reach a package with wandb's interface; NaN, too."""
    calls = []
    trackio = types.SimpleNamespace(
        Table=lambda columns, data: (columns, data),
        init=lambda **options: calls.append(options),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    tracker = open_tracker(tmp_path, {"track": "trackio", "lr": 0.1}, resumed=False)
    log = RunLog(tmp_path, tracker=tracker)
    group = make([[1.0, NAN], [0.0, 1.0]], "a", "b")
    log.groups(1, [group])
    log.metrics({"step": 1, "joint": 0.5, "bad_updates": [], "seconds": {"sample": 2.0}})
    log.evaluation(1, [{"joint": 1.0}, {"joint": 0.0}], {})
    log.tracker.finish()
    begun, samples, metrics, evaluation, end = calls
    assert begun["config"]["lr"] == 0.1 and begun["name"] == tmp_path.name and end == "finished"
    columns, (first, _) = samples[1]["samples"]
    assert columns == ["prompt", "response", "advantage", "a", "b"]
    assert first[1:4] == ["r", 0.0, 1.0] and math.isnan(first[4])
    assert metrics == (1, {"joint": 0.5, "seconds/sample": 2.0})
    assert evaluation == (1, {"eval/joint": 0.5})


FAILED = (
    "warning: --track wandb failed: RuntimeError: the backend is gone; "
    "the run goes on without it, everything is in metrics.jsonl and samples.jsonl\n"
)
WANDB = """
import os, sys

def Table(columns, data): pass

def fake(name):
    def call(*args, **options):
        print(f"wandb.{name}", file=sys.stderr)
        if os.environ["FAILS"] == name:
            raise RuntimeError("the backend\\nis gone")
    return call

init, log, finish = map(fake, ("init", "log", "finish"))
"""


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Makes one function of a package wandb fail, whenever it is called."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name: monkeypatch.setenv("FAILS", name)


@pytest.mark.parametrize(("name", "ranks", "calls"), [("log", 2, 1), ("finish", 1, 7)])
def test_a_tracker_that_fails_does_not_end_the_run(failing, tmp_path, name, ranks, calls):
    """All that it would have got is in the files. It is not asked again."""
    failing(name)
    words = "--max-tokens 8 --track wandb --name a".split()
    out = launch(*TINY, *words, cwd=tmp_path, ranks=ranks)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count(FAILED) == out.stdout.count("warning: --track") == 1
    assert out.stderr.count("wandb.log") + out.stderr.count("wandb.finish") == calls
    lines = (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2]
    assert (tmp_path / "runs/a/checkpoint").is_dir() and not (tmp_path / "runs/a/state").exists()


def test_a_tracker_that_cannot_begin(failing, tmp_path):
    """A new run is refused before the model is loaded. A resumed one, maybe at night, goes on."""
    (tmp_path / "breaks.py").write_text("""
from pathlib import Path
from rewards import Channel, Task
from tasks import tools

def lengths(prompts, responses, references):
    if Path("runs/a/state/step-1").exists() and not Path("mended").exists():
        raise ValueError("broken")
    return [len(r) for r in responses]

def task(options):
    return Task(tools.prompts, [Channel("length", lengths)])
""")
    words = "--task breaks.py --max-tokens 8 --save-every 1 --track wandb --name a"
    args = [*TINY, *words.split()]
    failing("init")
    out = launch(*args, cwd=tmp_path)
    assert out.returncode == 1 and not (tmp_path / "runs/a").exists()
    assert out.stderr.endswith(
        "error: --track wandb: RuntimeError: the backend is gone; "
        "log in there first, or leave it out\n"
    )
    failing("")
    assert "to go on from step 1: " in launch(*args, cwd=tmp_path).stderr
    (tmp_path / "mended").touch()
    failing("init")
    out = command("--resume", "runs/a", cwd=tmp_path)
    assert out.count(FAILED) == 1 and "runs/a goes on from step 1 of 2\n" in out


def test_a_terminal_without_the_letters_of_a_name(monkeypatch, tmp_path):
    """The run goes on, and so does eval.py; what a letter stands for is printed."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "german.py").write_text("""
from rewards import Channel, Task
from tasks import tools

def lengths(prompts, responses, references):
    return [len(r) / 100 for r in responses]

def task(options):
    return Task(tools.prompts, [Channel("Länge", lengths)])
""")
    args = ["--task", "german.py", "--max-tokens", 8]
    assert "L\\xe4nge 0." in command(*TINY, *args, "--name", "a", cwd=tmp_path)
    words = "--engine hf --model runs/a --limit 2 --name b".split()
    out = command(*args, *words, cwd=tmp_path, script="eval.py")
    assert "L\\xe4nge  0." in out
    assert "L\\xe4nge" in command("runs/b", "runs/b", cwd=tmp_path, script="tools/compare.py")


def test_how_long_a_run_will_go_on(monkeypatch):
    """By its latest ten steps, and by its latest evaluation, of which more come."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    pace = terminal.Pace(20, evaluated=[0, 10, 20])
    now[0] = 40.0
    pace.evaluation()
    for _ in range(4):
        now[0] += 5.0
        pace.step()
    assert pace.left(4) == "3 min left"  # 16 steps of 5 s, two evaluations of 40 s: 160 s
    for _ in range(10):
        now[0] += 700.0
        pace.step()
    assert pace.left(14) == "71 min left"
    assert pace.left(3) == "3.3 h left"
    assert pace.left(20) == "40 s left"


def test_a_run_says_at_first_what_it_trains_on(capsys):
    config = SimpleNamespace(agg="rvpo", beta="0.5:2")
    channels = [Channel("short", help="at most 35 words"), Channel("logged", weight=0)]
    terminal.introduce(config, channels)
    assert capsys.readouterr().out == (
        "rvpo z-scores each reward, and takes a soft minimum across rewards; beta 0.5 to 2, the "
        "paper's schedule (docs/results.md says when to take another)\n"
        "  short   at most 35 words\n"
        "  logged   (weight 0: only logged)\n"
    )
    config = SimpleNamespace(agg="gdpo", beta="0.5:2")
    terminal.introduce(config, [Channel(str(i)) for i in range(20)])
    out = capsys.readouterr().out
    assert "beta" not in out and out.endswith("  11\n  and 8 more\n")


def test_steps_without_a_gradient_are_pointed_out(tmp_path, capsys):
    """Such as those of --mask-truncated, where all responses are cut off."""
    log, group = RunLog(tmp_path), make([[1.0, 0.5], [0.5, 1.0]], "a", "b")
    for step in range(1, 5):
        log.step(step, [group], figures(grad_norm=0.0))
    out = capsys.readouterr().out
    assert out.count("warning: the gradient was 0 in each of the first 3 steps") == 1


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    log, group = RunLog(tmp_path), make([[1.0, 0.5], [0.5, 1.0]], "a", "b")
    monkeypatch.setattr(sys, "stdout", Closed())
    for step in (1, 2):
        log.step(step, [group], figures())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
