"""What README and docs show, typed: options exist, files are there, and what can run without a GPU and a network runs."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("study/*.md"))]


def commands() -> list[str]:
    """Of all fenced blocks, without comments, continued lines joined."""
    text = "\n".join(
        block
        for page in PAGES
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    )
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return sorted({line for line in lines if re.match(r"(python|torchrun|make|pip|vllm) ", line)})


RUN = [
    "python train.py --task examples/polite.py --steps 1 --prompts 2 --name polite",
    "python eval.py --task examples/polite.py --model runs/polite --max-tokens 64",
    "python tools/plot.py runs/polite runs/polite --out both.png",
]  # `runs/A runs/B` in README
NOT_HERE = {  # why
    "make demo": "minutes",
    "make study": "minutes",
    "python study/study.py": "minutes",
    "python tools/step.py": "minutes",
    "python study/text.py": "days",
    "python study/text_report.py": "tests/test_text.py",
    "python study/more.py": "hours",
    "python study/demo.py": "tests/test_text.py",
    "python study/sign.py": "tests/test_sign.py",
    "make gpu": "tests/test_gpu.py",
    "make .venv/ready": "it is what runs this",
    "python train.py --task rubric": "tests/test_judge.py",
    "python tools/gpu.py": "tests/test_gpu.py",
    "python tools/simulate.py": "tests/test_simulate.py",
    "python tools/agree.py": "tests/test_agreement.py",
    "python experiments/cost.py": "tests/test_cost.py",
    "python experiments/run.py": "tests/test_experiments.py",
    "python -m vllm": "minutes",
    "pip install": "network",
    "vllm serve": "GPUs",
    "torchrun --nproc_per_node=8": "GPUs",
    "torchrun --nnodes=2": "GPUs",
    "python train.py --resume runs/NAME": "tests/test_resume.py",
    "python tools/compare.py": "tests/test_eval.py",
    "python eval.py --task bfcl": "tests/test_eval.py",
    "python tools/plot.py runs/A-bfcl": "tests/test_eval.py",
}


def test_every_command_is_run_or_has_a_reason_not_to_be():
    shown = commands()
    assert len(shown) > 15 and {*RUN[:2]} <= {*shown}
    assert [line for line in shown if line not in RUN and not line.startswith((*NOT_HERE,))] == []
    assert all(any(line.startswith(start) for line in shown) for start in NOT_HERE)


@pytest.mark.parametrize(
    "script",
    [
        "train.py",
        "eval.py",
        "tools/step.py",
        "tools/gpu.py",
        "tools/simulate.py",
        "tools/agree.py",
        "study/study.py",
        "experiments/run.py",
        "experiments/cost.py",
    ],
)
def test_every_option_that_is_shown_exists(script):
    known = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    ).stdout
    lines = commands() + [
        line
        for page in PAGES
        for line in re.findall(r"`((?:train|eval)\.py [^`]*)`", page.read_text())
    ]
    shown = {
        word
        for line in lines
        if script in line
        for word in shlex.split(line.partition(script)[2])
        if word.startswith("--")
    }
    assert (
        shown and [option for option in shown if f"{option} " not in known.replace("\n", " ")] == []
    )


def test_every_option_in_the_text_and_every_file_exists():
    helps = [
        subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for script in (
            "train.py",
            "eval.py",
            "tools/step.py",
            "tools/gpu.py",
            "tools/simulate.py",
            "tools/agree.py",
            "study/study.py",
            "study/text.py",
            "study/demo.py",
            "study/more.py",
            "tools/plot.py",
            "experiments/run.py",
            "experiments/cost.py",
            "tests/kill_and_resume.py",
        )
    ]
    others = {
        "--served-model-name",
        "--max-model-len",
        "--gpu-memory-utilization",
        "--enforce-eager",
        "--nproc_per_node",
        "--max-restarts",
        "--shutdown-timeout",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--no-deps",
        "--tensor-parallel-size",
        "--port",
    }
    for page in PAGES:
        text = page.read_text()
        unknown = {
            option
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)
            if option not in others and not any(option in said for said in helps)
        }
        assert not unknown, (page.name, unknown)
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_commands_as_typed(tmp_path):
    for name in ("train.py", "eval.py", "tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in RUN:
        program, *words = shlex.split(line)
        assert program == "python"
        out = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0 and "Traceback" not in out.stderr, (line, out.stderr[-3000:])
    assert (tmp_path / "both.png").exists() and (tmp_path / "runs/polite/checkpoint").is_dir()
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs/polite/metrics.jsonl").read_text().splitlines()
    ]
    assert all(
        set(line["eval"]) == {"joint", "polite", "short"} for line in lines if "eval" in line
    )
    assert {*lines[1]["channels"]} == {"polite", "short"}
    results = json.loads(next(tmp_path.glob("runs/eval-polite-*/results.json")).read_text())
    assert {*results["metrics"]} == {"joint", "polite", "short"} and results["metrics"]["short"][
        "n"
    ] == 2


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 2000
