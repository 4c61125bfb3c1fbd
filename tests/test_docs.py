"""What README and docs show, typed: options exist, files are there, and commands run that need no
GPU and no network. What takes too long has a reason here, or a test elsewhere."""

import contextlib
import functools
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import tasks
from config import TrainConfig

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("study/*.md")),
]


def blocks(page, language: str = "") -> list[str]:
    """What stands between fences of this language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands() -> list[str]:
    """Of all blocks, without comments, continued lines joined."""
    text = "\n".join(block for page in PAGES for block in blocks(page))
    lines = text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return sorted({line for line in lines if re.match(r"(python|torchrun|make|pip|vllm) ", line)})


RUN = [
    "python train.py --task examples/polite.py --steps 1 --prompts 2 --name polite",
    "python eval.py --task examples/polite.py --model runs/polite --max-tokens 64",
    "python tools/plot.py runs/polite runs/polite --out both.png",
    "python tools/report.py runs/polite runs/polite --out report.html",
    "python tools/show.py runs/polite --step 1",
]
NOT_HERE = {  # why
    "make demo": "minutes",
    "python study/study.py": "minutes",
    "python tools/step.py": "minutes",
    "python study/text.py": "days",
    "python study/text_report.py": "tests/test_text.py",
    "python study/more.py": "hours",
    "python study/rubric.py": "hours",
    "python study/rubric_report.py": "tests/test_rubric.py",
    "python study/on_gpu.py": "GPUs",
    "python study/sign.py": "tests/test_sign.py",
    "make gpu": "tests/test_gpu.py",
    "make .venv/ready": "it is what runs this",
    "python train.py --task rubric": "tests/test_judge.py",
    "python tools/gpu.py": "tests/test_gpu.py",
    "python tools/simulate.py": "tests/test_simulate.py",
    "python experiments/cost.py": "tests/test_cost.py",
    "python experiments/fits.py": "half an hour",
    "python experiments/run.py": "tests/test_experiments.py",
    "python -m vllm": "minutes",
    "pip install": "network",
    "vllm serve": "GPUs",
    "torchrun --nproc_per_node=8": "GPUs",
    "torchrun --nnodes=2": "GPUs",
    "python train.py --resume runs/NAME": "tests/test_resume.py",
    "python train.py --model Qwen": "GPUs",
    "python tools/compare.py": "tests/test_eval.py",
    "python eval.py --task bfcl": "tests/test_eval.py",
    "python eval.py --task mine.py": "tests/test_eval.py",
    "python tools/plot.py runs/A-bfcl": "tests/test_eval.py",
    "python tools/report.py runs/A runs/B": "RUN has it with a run that exists",
    "python tools/show.py runs/A": "RUN has it with a run that exists",
}


def test_every_command_is_run_or_has_a_reason_not_to_be():
    shown = commands()
    assert len(shown) > 15 and {*RUN[:2]} <= {*shown}
    assert [line for line in shown if line not in RUN and not line.startswith((*NOT_HERE,))] == []
    text = "\n" + "\n".join(shown)
    assert [start for start in NOT_HERE if f"\n{start}" not in text] == []


SCRIPTS = (
    "train.py",
    "eval.py",
    "tools/step.py",
    "tools/gpu.py",
    "tools/simulate.py",
    "study/study.py",
    "experiments/run.py",
    "experiments/cost.py",
    "experiments/fits.py",
)
MORE_SCRIPTS = (  # whose options only sentences name
    "study/text.py",
    "study/demo.py",
    "study/more.py",
    "tools/plot.py",
    "tools/show.py",
    "tests/kill_and_resume.py",
)
OTHERS = {  # options of vllm, torchrun and pip
    "--served-model-name",
    "--max-model-len",
    "--gpu-memory-utilization",
    "--enable-lora",
    "--enforce-eager",
    "--tensor-parallel-size",
    "--port",
    "--nproc_per_node",
    "--max-restarts",
    "--shutdown-timeout",
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--no-deps",
}


@functools.cache
def help_of(script: str) -> str:
    command = [sys.executable, ROOT / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_that_is_shown_exists(script):
    lines = commands()
    for page in PAGES:
        lines += re.findall(r"`((?:train|eval)\.py [^`]*)`", page.read_text())
    shown = set()
    for line in lines:
        if script in line:
            words = shlex.split(line.partition(script)[2])
            shown |= {word for word in words if word.startswith("--")}
    known = help_of(script).replace("\n", " ")
    assert shown
    assert [option for option in shown if f"{option} " not in known] == []


def test_every_option_in_the_text_and_every_file_exists():
    helps = "\n".join(map(help_of, SCRIPTS + MORE_SCRIPTS))
    for page in PAGES:
        text = page.read_text()
        options = {*re.findall(r"(?<![\w-])--[a-z][\w-]+", text)} - OTHERS
        assert [option for option in options if option not in helps] == [], page.name
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_commands_as_typed(tmp_path):
    folders = [ROOT / name for name in ("infra", "tools", "tasks", "local", "examples")]
    for path in [*ROOT.glob("*.py"), *folders]:
        (tmp_path / path.name).symlink_to(path)
    for line in RUN:
        program, *words = shlex.split(line)
        assert program == "python"
        out = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0 and "Traceback" not in out.stderr, (line, out.stderr[-3000:])
    assert (tmp_path / "both.png").exists() and (tmp_path / "runs/polite/checkpoint").is_dir()
    metrics = (tmp_path / "runs/polite/metrics.jsonl").read_text()
    for line in map(json.loads, metrics.splitlines()):
        if "eval" in line:
            assert set(line["eval"]) == {"joint", "polite", "short"}
        else:
            assert set(line["channels"]) == {"polite", "short"}
    (results,) = tmp_path.glob("runs/eval-polite-*/results.json")
    measured = json.loads(results.read_text())["metrics"]
    assert {*measured} == {"joint", "polite", "short"} and measured["short"]["n"] == 2


def test_pages_are_short():
    pages = [page for page in PAGES if page.parent.name != "study"]  # those are tables
    words = {page.name: len(page.read_text().split()) for page in pages}
    assert words.pop("README.md") <= 1500
    assert {name: n for name, n in words.items() if n > 1200} == {}


def test_readme_has_its_pictures():
    pictures = re.findall(r"^!\[.+\]\((.+)\)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert pictures == ["docs/method.png", "docs/demo.png"]


def test_the_three_lines_of_readme_print_what_it_says():
    three_lines, _ = blocks(ROOT / "README.md", "python")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(three_lines, {})  # noqa: S102
    assert out.getvalue() in blocks(ROOT / "README.md")


def test_the_task_of_readme_is_one(tmp_path):
    _, task_file = blocks(ROOT / "README.md", "python")
    (tmp_path / "mine.py").write_text(task_file)
    config = TrainConfig(task=str(tmp_path / "mine.py"))
    task = tasks.load_task(config)
    train, held_out = tasks.load_prompts(task, config.task, 8, 2)
    task.try_out(train[0])
    rewards = task.start(train[0], ["Please, please, a spoon.", "word " * 21])()
    assert rewards.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert len(train) == 3 and len(held_out) == 1
