"""tools/show.py: the best and the worst of a step, in a terminal that no response can steer."""

import subprocess
import sys

import pytest
from conftest import ROOT
from test_report import CHAT, HOSTILE, sample, write_evaluation, write_run

from infra.ranks import InputError
from tools import runs
from tools.show import chips, printable, show


def shown(*paths, **options) -> str:
    return show([runs.read(path) for path in paths], **options)


def test_best_and_worst_of_the_last_step_in_both_runs(tmp_path):
    other = [{"role": "user", "content": "And this?"}]
    samples = [sample(1, "earlier")]
    samples += [sample(2, text, advantage=a) for text, a in (("low", -1), ("mid", 0), ("top", 2))]
    samples += [sample(2, "lowest", advantage=-3, prompt=other)]
    first = write_run(tmp_path / "a", samples, group=3)
    samples = [sample(2, "another", short=0.0, polite=None, advantage=0.5)]
    second = write_run(tmp_path / "b", samples, agg="gdpo")
    text = shown(first, second)
    heading, of_best, of_worst = text.split("-" * 80)
    assert heading.split("\n")[:2] == [
        f"{first} (rvpo 2), step 2: 4 responses",
        f"{second} (gdpo), step 2: 1 response",
    ]
    lines = [line for line in of_best.splitlines() if line]
    assert lines == [
        "user: Say <b>x</b>.",
        "a (rvpo 2), best: advantage +2.00, 1 word",
        "  top",
        "  [+ short 1] [+ polite 0.5]",
        "a (rvpo 2), worst: advantage -1.00, 1 word",
        "  low",
        "  [+ short 1] [+ polite 0.5]",
        "b (gdpo): advantage +0.50, 1 word",
        "  another",
        "  [- short 0] [? polite]",
    ]
    assert "And this?" in of_worst and "lowest" in of_worst and "b (gdpo)" not in of_worst
    assert "earlier" in shown(first, step=1) and "top" not in shown(first, step=1)


def test_only_responses_that_fail_a_channel(tmp_path):
    samples = [sample(1, "kept", advantage=9), sample(1, "broken", short=0.0, advantage=1)]
    path = write_run(tmp_path / "a", samples)
    text = shown(path, fails="short")
    assert "1 response that fail short" in text and "broken" in text and "kept" not in text
    assert "0 responses that fail polite" in shown(path, fails="polite")  # 0.5 satisfies it
    with pytest.raises(InputError, match="--fails o: name one reward of these: 'short', 'polite'"):
        shown(path, fails="o")
    with pytest.raises(InputError, match="--step 7: .* has the samples of step 1$"):
        shown(path, step=7)


def test_criteria_may_be_named_by_a_part_of_them(tmp_path):
    verdicts = {"1 Says when to see a doctor, in words": 0.0, "2 Recommends rest": None}
    samples = [{**sample(1, "Rest."), "rewards": verdicts}]
    text = shown(write_run(tmp_path / "a", samples), fails="doctor")
    assert "[- 1 Says when to see a doctor, in words 0]" in text and "[? 2 Recommends" in text


def test_an_evaluation(tmp_path):
    path = write_evaluation(tmp_path / "e", [{"response": "Rest."}], {"joint": 1.0}, prompt=CHAT)
    assert shown(path).splitlines()[-4:] == ["", "e (runs/a), 1 word", "  Rest.", "  [+ joint 1]"]


def test_no_response_steers_the_terminal(tmp_path):
    assert printable("a\x1b[31m\x07\r\n\t\u202e\ud83d'") == "a\\x1b[31m\\x07\\r\n \\u202e\\ud83d'"
    assert printable(HOSTILE["arabic"] + HOSTILE["emoji"]) == HOSTILE["arabic"] + HOSTILE["emoji"]
    for name, text in HOSTILE.items():
        path = write_run(tmp_path / name, [sample(1, text)])
        out = shown(path)
        assert len(out) < 2000 and "\x1b" not in out and "\x00" not in out
        out.encode()  # no surrogate is left
    assert "99100 characters" in shown(tmp_path / "long")


def test_rewards_break_between_chips(tmp_path):
    run = runs.read(write_run(tmp_path / "a"))
    lines = chips(run, {f"channel {k}": float(k) for k in range(9)}, width=40).splitlines()
    assert all(len(line) <= 40 and line.endswith("]") for line in lines)


def test_the_command(tmp_path):
    write_run(tmp_path / "runs/a", samples=[])
    command = [sys.executable, ROOT / "tools/show.py", "runs/a"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.stderr == (
        "error: runs/a has no samples: its samples.jsonl is empty, or not there\n"
    )
    (tmp_path / "runs/a/samples.jsonl").write_text('{"step": 1, "response": "x", "rewards": {}}\n')
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith("runs/a (rvpo 2), step 1: 1 response\n")
