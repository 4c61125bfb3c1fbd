"""Runs that are killed, stopped or broken, and resumed."""

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
import torch
import updates
from conftest import ROOT, on_ranks, set_channels
from judge_server import Server
from judge_server import graded as verdicts
from test_train import TINY

import policy as policies
import rollout
import rvpo
import train
import update
from config import TrainConfig, parse
from infra import pretrained, prompts, resume, run_directory, signals
from infra import state as states
from infra.ranks import InputError
from infra.state import State
from local import hf
from rewards import Channel, Example, Task

# A task of one's own: what is imported with it may be changed by it.
GRADED = """
from rewards import Channel, Task
from tasks import tools

def task(options):
    return Task(tools.prompts, [Channel("vowels", lambda p, rs, ref: [r.count("e") / 9 for r in rs]), Channel("short", lambda p, rs, ref: [1 / (1 + len(r)) for r in rs])])
"""
SHORT = ["--max-tokens", 16, "--save-every", 1, "--steps", 4]


@pytest.fixture(autouse=True)
def handlers():
    """train.main installs handlers for good."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    signals._signals.clear()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def run(monkeypatch, tmp_path, *args, name: str | None = "a") -> Path:
    """train.py in this process."""
    monkeypatch.chdir(tmp_path)
    base = [*TINY, "--name", name, *SHORT] if name else []
    train.main(parse(TrainConfig, "", [*map(str, [*base, *args])]))
    return tmp_path / "runs" / (name or "a")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def at_step(monkeypatch, step: int, what):
    """what() when the rewards of that step are asked for."""
    real = rollout.Sampler.sample
    due = []
    monkeypatch.setattr(
        rollout.Sampler,
        "sample",
        lambda self, prompts, group, now: (
            due.clear(),
            due.extend([1] * (now == step)),
            real(self, prompts, group, now),
        )[2],
    )

    def triggered(p, responses, references):
        if due:
            what()
        return [len(r) / 100 for r in responses]

    for task in ("tools", "rlla"):
        set_channels(
            monkeypatch,
            [
                Channel("mine", triggered),
                Channel("vowels", lambda p, rs, ref: [r.count("e") / 9 for r in rs]),
            ],
            task,
        )


def same(a: Path, b: Path) -> None:
    assert kill_and_resume.differences(a, b) == []


# Stopped and resumed


def test_a_run_that_is_killed_while_it_saves_is_resumed_to_the_bit():
    """One of the twenty of kill_and_resume.py."""
    assert kill_and_resume.main(["--kills", "1", "--steps", "3"]) == 0


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
    assert (
        f"stopped by {number.name}; to go on from step 2: python train.py --resume runs/a\n"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "runs/a/checkpoint").exists()
    signals._signals.clear()
    run(
        monkeypatch, tmp_path, "--resume", "runs/a", "--save-every", 3, "--eval-every", 2, name=None
    )
    out = capsys.readouterr().out
    assert (
        "changed: --save-every 3, the run has 0\n" in out
        and "runs/a goes on from step 2 of 4\n" in out
    )
    same(tmp_path / "runs/alone", tmp_path / "runs/a")
    assert not (tmp_path / "runs/a/state").exists()
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, "--resume", "runs/a", name=None)
    assert (
        not ended.value.code
        and capsys.readouterr().out
        == "runs/a is finished, with all of its 4 steps: nothing is left to do\n"
    )


def test_a_run_that_is_resumed_on_another_day_has_its_own_prompts(monkeypatch, tmp_path, dated):
    """Whose template holds the date. Another template is refused, but by runs of before tokens were compared."""
    days = iter(["2024-02-28", "2024-02-28", "2024-02-29", "2024-02-29", "2024-02-29"])
    monkeypatch.setattr(prompts, "today", lambda date: date or next(days))
    at_step(monkeypatch, -1, None)
    shutil.copytree(dated, tmp_path / "dated")
    run(monkeypatch, tmp_path, "--model", "dated", name="alone")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit):
            run(patch, tmp_path, "--model", "dated")
    signals._signals.clear()
    template, file = tmp_path / "dated/chat_template.jinja", tmp_path / "runs/a/config.json"
    before, config = template.read_text(), json.loads(file.read_text())
    template.write_text(before + " ")
    assert refused(monkeypatch, "--resume", "runs/a") == (
        "--resume runs/a: the prompts' tokens are not what they were when it began (SHA-256 in config.json): bring the model's tokenizer and chat template back, or begin a new run"
    )
    file.write_text(
        json.dumps({key: value for key, value in config.items() if key != "tokens_sha256"})
    )
    with monkeypatch.context() as patch:
        patch.setattr(policies, "load", lambda *args, **options: 1 / 0)
        assert "ZeroDivisionError" in refused(patch, "--resume", "runs/a")
    template.write_text(before)
    file.write_text(json.dumps(config))
    run(monkeypatch, tmp_path, "--resume", "runs/a", name=None)
    same(tmp_path / "runs/alone", tmp_path / "runs/a")


def test_a_signal_during_the_update(monkeypatch, tmp_path):
    """Before its first optimizer step the step is given up, later it is finished. Either way the rest is the same."""
    options = [
        "--prompts",
        4,
        "--updates",
        2,
        "--tokens-per-microbatch",
        300,
        "--steps",
        3,
    ]  # four micro-batches a step
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
        assert run_directory.latest(tmp_path / "runs" / saved).name == saved
        signals._signals.clear()
        run(monkeypatch, tmp_path, "--resume", f"runs/{saved}", name=None)
        same(tmp_path / "runs/alone", tmp_path / "runs" / saved)


def test_a_second_signal_ends_it_at_once(tmp_path):
    """While a save hangs in a library, where Python runs no handler; but not one within two seconds, by which a launcher
    repeats the first. What happens is said at once."""
    (tmp_path / "hanging.py").write_text(
        GRADED.replace(
            "def task(options):",
            """def task(options):
    import hashlib
    from infra import state
    state.save = lambda *args: (print("saving", flush=True), hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1))""",
        )
    )
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train.py",
            *TINY,
            "--task",
            "hanging.py",
            "--name",
            "a",
            "--steps",
            "99",
            "--save-every",
            "1",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("saving" in line for line in process.stdout)
    process.terminate()
    process.terminate()
    assert any(
        "stopping, and saving the state; a second signal (Ctrl-C again) ends the run at once, without saving"
        in line
        for line in process.stderr
    )
    time.sleep(signals.AGAIN + 0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(300) == 143
    assert not list((tmp_path / "runs/a").glob("state/*"))


def test_a_process_that_a_reward_forks_can_be_ended_and_the_run_goes_on(tmp_path):
    """Such as one that runs code for too long. Fifty times, some of them before the process has begun."""
    (tmp_path / "forks.py").write_text(
        f"import multiprocessing, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        + """
from infra import signals
signals.catch_signals()
for _ in range(50):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    process.terminate()
    process.join(10)
    assert process.exitcode == -15
time.sleep(signals.AGAIN)
signals.check_signals()
"""
    )
    result = subprocess.run(
        [sys.executable, tmp_path / "forks.py"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and "stopping" not in result.stderr, result.stderr


def launch(*args, cwd: Path, ranks: int = 2, **options) -> subprocess.Popen:
    return kill_and_resume.start("a", cwd, ranks, "--engine", "hf", *SHORT, *args, **options)


def until(condition, process: subprocess.Popen, log: Path) -> None:
    kill_and_resume.wait(condition, process)
    assert condition(), log.read_text()[-3000:]


def test_ranks_are_stopped_by_a_signal_to_one_and_resumed_as_one_or_four(tmp_path):
    """Rewards without chance: each rank draws its own numbers."""
    args = ["--resume", "auto", "--steps", 6, "--save-every", "0", "--prompts", 3]
    process = launch(*args, cwd=tmp_path, chance=False)
    log = tmp_path / "a.log"
    until(lambda: (tmp_path / "runs/a/samples.jsonl").exists(), process, log)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
    assert process.wait(300) == 1
    assert (
        log.read_text().count("stopped by SIGTERM; to go on from step ") == 1
        and "]: Traceback" not in log.read_text()
    )
    shutil.copytree(tmp_path / "runs", tmp_path / "stopped")
    losses = {}
    for total in (1, 4):
        shutil.rmtree(tmp_path / "runs")
        shutil.copytree(tmp_path / "stopped", tmp_path / "runs")
        process = launch(*args, cwd=tmp_path, ranks=total, chance=False)
        assert process.wait(300) == 0, log.read_text()[-3000:]
        steps = [line for line in lines(tmp_path / "runs/a/metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
        losses[total] = [line["loss"] for line in steps]
    assert "changed: ranks 4, the run had 2\n" in log.read_text()
    assert max(abs(a - b) for a, b in zip(losses[1], losses[4], strict=True)) < 1e-5


def test_ctrl_c_reaches_every_rank_and_the_launcher_which_repeats_it(tmp_path):
    """As from a terminal. The state is saved all the same, and one rank says so."""
    process = launch("--resume", "auto", "--steps", 99, "--save-every", "0", cwd=tmp_path)
    log = tmp_path / "a.log"
    until(lambda: (tmp_path / "runs/a/samples.jsonl").exists(), process, log)
    for pid in (*((tmp_path / f"pid-{rank}").read_text() for rank in (0, 1)), process.pid):
        os.kill(int(pid), signal.SIGINT)
    assert process.wait(60) == 1
    said = log.read_text()
    assert (
        said.count("stopping, and saving the state;")
        == said.count("stopped by SIGINT; to go on from step ")
        == 1
    )
    assert run_directory.latest(tmp_path / "runs/a") and "]: Traceback" not in said


def test_torchrun_starts_again_when_a_rank_dies(tmp_path):
    """All within a minute: the other rank does not wait for the dead one."""
    process = launch("--resume", "auto", cwd=tmp_path, restarts=1)
    log = tmp_path / "a.log"
    until(lambda: (tmp_path / "runs/a/state/step-1").exists(), process, log)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    assert process.wait(60) == 0, log.read_text()[-3000:]
    steps = [line["step"] for line in lines(tmp_path / "runs/a/metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4, 4]  # evaluations are 0 and the last


def test_a_late_rank_without_a_name(tmp_path):
    """It has the time of two seconds later in its own default name: the run is still one, and can be resumed. What would
    abort while the interpreter is taken down does not make a failure of it."""
    (tmp_path / "late.py").write_text(
        "import atexit, os, time\nfrom infra import ranks\natexit.register(os.abort)\ntime.sleep(2.2 * ranks.RANK)\n"
        + GRADED
    )
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "train.py",
    ]
    options = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen(
        [
            *launcher,
            *TINY,
            "--task",
            "late.py",
            "--max-tokens",
            "8",
            "--save-every",
            "1",
            "--steps",
            "15",
        ],
        **options,
    )
    kill_and_resume.wait(lambda: [*tmp_path.glob("runs/*/state/step-[1-9]")], process)
    process.terminate()
    process.wait(60)
    (run,) = (tmp_path / "runs").iterdir()
    (state,) = (run / "state").glob("step-*")
    files_of_ranks = {
        name.partition("-model")[0]
        for name in json.loads((state / "state.json").read_text())["files"]
    }
    assert len(files_of_ranks) == 2
    again = subprocess.run(
        [*launcher, "--resume", f"runs/{run.name}"],
        **options,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name] and (
        run / "checkpoint"
    ).is_dir()


def test_ranks_with_different_prompts(monkeypatch, tmp_path):
    """Each would pair its own with the responses to another's: a wrong gradient, and nobody would notice."""
    monkeypatch.setattr(resume, "gather", lambda local: [*local, "another digest"])
    with pytest.raises(
        InputError, match="the ranks have different prompts: a task must make the same ones on all"
    ):
        resume.check_data(tmp_path, [])


def test_a_checkpoint_that_lacks_the_shards_of_a_rank(monkeypatch, tmp_path, tiny_policy):
    """As on nodes that do not share a file system: the other rank sees a file that is not here."""
    monkeypatch.setattr(
        states,
        "gather",
        lambda local: (
            [*local, ["shard-00002-model-00001-of-00001.safetensors"]]
            if local and isinstance(local[0], list)
            else local
        ),
    )
    with pytest.raises(
        InputError,
        match="could not be saved: shard-00002-model-00001-of-00001.safetensors of another rank is not in .*must be on a file system that all share",
    ):
        states.save(tmp_path, tiny_policy, update.make_optimizer(tiny_policy, 0.0), State(step=3))
    assert not [*tmp_path.glob("state/step-*")]


def moments(policy, seed: int = 0):
    """An AdamW that has taken a step on gradients that depend on names only."""
    optimizer = update.make_optimizer(policy, 0.01)
    for i, parameter in enumerate(policy.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 + i)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("total", [2, 4])
def test_a_checkpoint_of_some_ranks_is_loaded_by_others(tmp_path, llama, total):
    """One rank's by several, then theirs by one; of parameters in shapes that ranks cannot share evenly."""
    policy = policies.load(llama, updates.CPU)
    optimizer = moments(policy)
    states.save(tmp_path / "one", policy, optimizer, State(step=3, optimizer_steps=1))
    on_ranks(total, total, tmp_path / "many", llama, llama, tmp_path / "one")
    again = policies.load(llama, updates.CPU)
    other = update.make_optimizer(again, 0.01)
    assert states.load(tmp_path / "many/state/step-4", again, other).step == 4
    assert (
        json.loads((tmp_path / "many/state/step-4/state.json").read_text())["world_size"] == total
    )
    saved, loaded = states.tensors(policy, optimizer), states.tensors(again, other)
    assert saved.keys() == loaded.keys() and all(
        torch.equal(saved[name], loaded[name]) for name in saved
    )
    assert {state["step"].item() for state in other.state.values()} == {1}
    assert not [
        *tmp_path.rglob("*.metadata"),
        *tmp_path.rglob("*.pt"),
        *tmp_path.rglob("*.distcp"),
    ]  # no pickle


def test_a_directory_that_was_half_deleted_does_not_block_the_next(tmp_path):
    for name in ("x", "x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    run_directory.retire(tmp_path / "x")
    assert not [*tmp_path.iterdir()]


# What is refused


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """runs/a, stopped after two of four steps by a reward that fails."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "reward_model": {"ground_truth": "<think> </think>\n<response> yes </response>"},
        }
        for i in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: 1 / 0)
        with pytest.raises(InputError) as error:
            run(patch, tmp_path, "--task", "rlla", "--data", "rows.jsonl")
    assert str(error.value).startswith(
        "reward 'mine' raised ZeroDivisionError: division by zero (test_resume.py, line "
    )
    assert str(error.value).endswith(
        "); the policy as it was then is in runs/a/checkpoint; to go on from step 2: python train.py --resume runs/a"
    )
    monkeypatch.setattr(
        policies, "load", lambda *args, **options: pytest.fail("the model was loaded")
    )
    return tmp_path / "runs/a"


def refused(monkeypatch, *args) -> str:
    with pytest.raises(InputError) as error:
        train.main(parse(TrainConfig, "", [*map(str, args)]))
    return str(error.value)


def test_options_that_cannot_change_are_refused_one_line_each(monkeypatch, stopped):
    assert refused(
        monkeypatch, "--resume", "runs/a", "--lr", 1, "--steps", 9, "--save-every", 3
    ) == (
        "--resume runs/a: these options cannot be changed, leave them out:\n--steps 9, the run has 4\n--lr 1.0, the run has 0.001"
    )


def test_data_that_changed_are_refused(monkeypatch, stopped):
    rows = Path("rows.jsonl")
    rows.rename("moved.jsonl")
    monkeypatch.setattr(policies, "load", lambda *args, **options: 1 / 0)
    # the same rows under another name: as far as the model
    assert "ZeroDivisionError" in refused(
        monkeypatch, "--resume", "runs/a", "--data", "moved.jsonl"
    )
    rows.write_text(Path("moved.jsonl").read_text().replace("question 3", "question 4"))
    assert refused(monkeypatch, "--resume", "runs/a") == (
        "--resume runs/a: its data are not what they were when it began (SHA-256 in config.json): bring them back, or begin a new run"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: os.truncate(next(state.glob("*.safetensors")), 5000), "has 5000 of"),
        (lambda state: next(state.glob("*.safetensors")).unlink(), "No such file or directory"),
        (lambda state: (state / "state.json").write_text("{"), "Expecting property name"),
        (lambda state: (state / "state.json").write_text("[]"), "list indices must be integers"),
    ],
)
def test_a_damaged_checkpoint(monkeypatch, stopped, damage, message):
    damage(stopped / "state/step-2")
    said = refused(monkeypatch, "--resume", "runs/a")
    assert (
        said.startswith("runs/a/state/step-2 is damaged (") and message in said and "\n" not in said
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--resume", "runs/b"],
            "--resume runs/b: no checkpoint is there; name the directory of a run, such as runs/NAME",
        ),
        (["--resume", "auto"], "--resume auto needs --name, to find the run again"),
        (
            ["--save-every", "often"],
            "--save-every often: should be auto, or a number of steps, such as 20",
        ),
        (
            [
                "--task",
                "rubric",
                "--data",
                "x",
                "--judge-model",
                "m",
                "--judge-url",
                "http://me:secret@host/v1",
            ],
            "--judge-url holds a password, which would be written to runs/: a judge's key goes into the environment variable JUDGE_API_KEY",
        ),
        (
            ["--resume", "auto", "--name", "mine"],
            "runs/mine holds something else than a run: choose another --name",
        ),
    ],
)
def test_bad_options(monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/results.json").write_text("{}")
    assert refused(monkeypatch, *args).startswith(message)


def test_a_checkpoint_of_another_model(tiny, llama, tmp_path):
    policy = policies.load(llama, updates.CPU)
    states.save(tmp_path, policy, moments(policy), State(step=3, optimizer_steps=1))
    other = policies.load(tiny, updates.CPU)
    with pytest.raises(InputError) as error:
        states.load(tmp_path / "state/step-3", other, update.make_optimizer(other, 0.01))
    assert str(error.value).startswith(
        f"{tmp_path}/state/step-3 is no checkpoint of this model: "
    ) and "\n" not in str(error.value)
    print(error.value)


@pytest.fixture
def small(tmp_path):
    """A file system of 20 MB: room for one checkpoint of the tiny model, which has 11.8 MB, but for no second."""
    disk = tmp_path / "runs"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filled", "wb", buffering=0) as filled, pytest.raises(OSError):
        while True:
            filled.write(bytes(4096))


def test_a_disk_that_fills_up(monkeypatch, tmp_path, small):
    at_step(monkeypatch, -1, None)
    with pytest.raises(InputError) as error:
        run(monkeypatch, tmp_path)
    assert str(error.value) == (
        "runs/a/state/step-2 could not be saved: [Errno 28] No space left on device; runs/a/state/step-1 is whole, "
        "to go on from it: python train.py --resume runs/a"
    )
    assert [path.name for path in (small / "a/state").iterdir()] == ["step-1"]
    fill(small)
    with pytest.raises(InputError) as error:
        run(monkeypatch, tmp_path, "--resume", "runs/a", name=None)
    assert str(error.value).startswith(
        "runs/a/state/step-2 could not be saved: [Errno 28] No space left on device; runs/a/state/step-1 is whole"
    )
    (small / "filled").unlink()
    with monkeypatch.context() as patch:  # while step 4 is sampled
        at_step(patch, 3, lambda: fill(small))
        with pytest.raises(InputError) as error:
            run(patch, tmp_path, "--resume", "runs/a", "--save-every", 0, name=None)
    assert str(error.value) == (
        "runs/a/samples.jsonl cannot be written: [Errno 28] No space left on device; runs/a/state/step-3 could not be saved: "
        "[Errno 28] No space left on device; runs/a/state/step-1 is whole, to go on from it: python train.py --resume runs/a"
    )
    (small / "filled").unlink()
    path = run(monkeypatch, tmp_path, "--resume", "runs/a", name=None)
    assert [line["step"] for line in lines(path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 4]
    same(run(monkeypatch, tmp_path, "--save-every", 0, name="alone"), path)


def test_a_directory_that_can_only_be_read(monkeypatch, tmp_path, small):
    def remount():
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)

    at_step(monkeypatch, 1, remount)
    with pytest.raises(InputError) as error:
        run(monkeypatch, tmp_path)
    at = "[Errno 30] Read-only file system: 'runs/a/"
    assert str(error.value) == (
        f"runs/a/samples.jsonl cannot be written: {at}samples.jsonl'; runs/a/checkpoint could not be written: {at}checkpoint.part'; "
        "runs/a/state/step-1 is whole, to go on from it: python train.py --resume runs/a"
    )
    with pytest.raises(InputError) as error:
        run(monkeypatch, tmp_path, "--resume", "runs/a", name=None)
    assert str(error.value) == f"runs/a: {at}config.json.part'"
    with pytest.raises(InputError) as error:
        run(monkeypatch, tmp_path, name="b")
    assert str(error.value) == "runs/b cannot be made: [Errno 30] Read-only file system: 'runs/b'"


# Numbers that go wrong

NO_PROBABILITIES = "the model gives NaN for the next token: its weights are damaged, or training has diverged: begin again with a lower --lr"


def test_a_policy_that_has_diverged_ends_the_run(monkeypatch, tmp_path):
    """transformers' sampling once ended in a traceback, and the state was lost."""
    real = update.update

    def diverge(learner, *args):
        metrics = real(learner, *args)
        learner.policy.lm.model.norm.weight.data[3] = float("nan")
        return metrics

    monkeypatch.setattr(train, "update", diverge)
    with pytest.raises(InputError) as error:
        run(monkeypatch, tmp_path, "--save-every", 0)
    assert (
        str(error.value)
        == f"{NO_PROBABILITIES}; the policy as it was then is in runs/a/checkpoint; to go on from step 1: python train.py --resume runs/a"
    )
    assert (tmp_path / "runs/a/state/step-1").is_dir()


class Odd:
    """An engine like vLLM, which samples something from NaN."""

    def generate(self, prompts, group, seeds):
        yield 0, [rollout.Response([5, 0], [-1.0, float("nan")], [1, 1], "length", "x")] * group


def test_responses_without_probabilities_are_not_graded(monkeypatch):
    """Raised by `score`, which all ranks reach: another one would wait for the one that fails."""
    task = Task(None, [Channel("c", lambda *_: pytest.fail("it was graded"))])
    sampler = rollout.Sampler(Odd(), task, 0)
    sampled = sampler.sample([prompts.Prompt([1], Example([]))], 2, 0)
    with pytest.raises(InputError, match=NO_PROBABILITIES):
        sampler.score([prompts.Prompt([1], Example([]))], sampled)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_transformers_does_not_sample_from_nan(tiny, temperature):
    tokenizer = pretrained.load_tokenizer(tiny)
    engine = hf.HFEngine(
        hf.load(tiny, torch.device("cpu")), rollout.Decoding(tokenizer, [2], temperature, 4)
    )
    engine.model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match=NO_PROBABILITIES):
        next(engine.generate([[5, 6, 7]], 1, [0]))


def test_a_loss_that_is_not_finite(tmp_path):
    """On one rank only, in the second update of steps 2, 4, 5, 6: all leave it out, three such steps in a row end the run."""
    (tmp_path / "nan.py").write_text(
        GRADED.replace(
            "def task(options):",
            """def task(options):
    import rvpo
    from infra import ranks, state
    real, calls = rvpo.policy_loss, []

    def loss(*args):
        calls.append(1)
        value, stats = real(*args)
        step, u = divmod(len(calls) - 1, 2)
        return value * (float("nan") if ranks.RANK == ranks.WORLD - 1 and u == 1 and step + 1 in (2, 4, 5, 6) else 1), stats

    rvpo.policy_loss = loss
    state.BAD_STEPS = 3""",
        )
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [
            *launcher,
            ROOT / "train.py",
            *TINY,
            "--task",
            "nan.py",
            "--name",
            "a",
            "--steps",
            "9",
            "--max-tokens",
            "8",
            "--updates",
            "2",
            "--prompts",
            "4",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (
        result.stderr.count(
            "error: a loss or gradient was not finite in each of the last 3 steps: see bad_prompts in "
            "metrics.jsonl, and try a lower --lr; the policy as it was then is in runs/a/checkpoint; to go on from step 6: "
            "python train.py --resume runs/a\n"
        )
        == 1
    ), result.stderr[-3000:]
    steps = [line for line in lines(tmp_path / "runs/a/metrics.jsonl") if "loss" in line]
    assert [line["bad_updates"] for line in steps] == [[], [1], [], [1], [1], [1]] and [
        line["bad_prompts"] for line in steps
    ] == [[], [2, 3], []] + 3 * [[2, 3]]
    state = json.loads((tmp_path / "runs/a/state/step-6/state.json").read_text())
    assert (
        state["bad_steps"] == 3
        and state["optimizer_steps"] == 8
        and all(line["grad_norm"] > 0 for line in steps)
    )
    weights = policies.load(tmp_path / "runs/a/checkpoint", updates.CPU)
    assert all(parameter.isfinite().all() for parameter in weights.parameters())


def test_a_reward_that_never_varies_is_pointed_out_once(monkeypatch, tmp_path, capsys):
    set_channels(
        monkeypatch,
        [
            Channel("same", lambda p, rs, ref: [0.5] * len(rs)),
            Channel("gone", lambda p, rs, ref: [float("nan")] * len(rs)),
            Channel("rare", lambda p, rs, ref: [float("q" in r) for r in rs]),
        ],
    )
    run(monkeypatch, tmp_path, "--steps", 12, "--save-every", 0)
    out = capsys.readouterr().out
    assert (
        out.count(
            "warning: reward 'same' was 0.5 on all of the 4 held-out prompts: it teaches nothing until a response does better"
        )
        == 1
    )
    assert (
        out.count(
            "warning: reward 'gone' was missing on all of the 4 held-out prompts: it teaches nothing"
        )
        == 1
        and out.count("'gone'") == out.count("'same'") == 1
    )


def test_by_default_saving_waits_and_then_takes_a_hundredth(monkeypatch, tmp_path):
    for first, saves in (
        (0.0, [0, 1, 0, 0]),
        (600.0, [0, 0, 0, 0]),
    ):  # the second save is due 100 times as long after
        monkeypatch.setattr(states, "FIRST_SAVE", first)
        out = run(monkeypatch, tmp_path, "--save-every", "auto", name=f"first{first:.0f}")
        assert [
            x["seconds"]["save"] > 0 for x in lines(out / "metrics.jsonl") if "seconds" in x
        ] == saves


# Secrets and the judge


def test_no_file_holds_the_judges_key(monkeypatch, tmp_path):
    """Not even when the endpoint quotes it in an error that is logged; and the sentence of a judge that dies."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret-0123456789")
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "prompt": f"question {i}",
                    "rubric": [{"description": "says 1"}, {"description": "says 2"}],
                }
            )
            + "\n"
            for i in range(9)
        )
    )

    last = [30]  # that is answered

    def answer(body, n):
        return (401, f"wrong key: {server.requests[-1]['key']}") if n > last[0] else verdicts(body)

    server = Server(answer)
    args = [
        "--task",
        "rubric",
        "--data",
        "rows.jsonl",
        "--judge-url",
        server.url,
        "--judge-model",
        "m",
        "--judge-cache",
        "runs/cache",
        "--steps",
        3,
    ]
    try:
        run(monkeypatch, tmp_path, *args, "--judge-max-missing", 1)
        last[0] = len(server.requests) + 9
        with pytest.raises(InputError) as error:
            run(monkeypatch, tmp_path, *args, "--seed", 1, name="b")
    finally:
        server.stop()
    assert server.requests[0]["key"] == "Bearer sk-very-secret-0123456789"
    assert (
        "% of the judge's verdicts are missing, more than --judge-max-missing 0.2 allows; the last reason was: HTTP 401: wrong key: Bearer ***; "
        "the policy as it was then is in runs/b/checkpoint; to go on from step 0: python train.py --resume runs/b"
        in str(error.value)
    )
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 15 and "***" in (tmp_path / "runs/a/metrics.jsonl").read_text()
    assert not [path for path in written if b"very-secret" in path.read_bytes()]
