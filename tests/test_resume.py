"""Runs that are killed, stopped or broken, and resumed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import kill_and_resume
import pytest
import torch
import updates
from conftest import ROOT, constant, missing, nothing_is_loaded, on_ranks, set_channels
from judge_server import Server, graded
from programs import (
    TINY,
    launch,
    python,
    read_lines,
    same_weights,
    split,
    start,
    train_here,
    write_lines,
)

import policy as policies
import rollout
import rvpo
import train
import update
from infra import pretrained, prompts, resume, run_directory, signals
from infra import state as states
from infra.ranks import InputError
from infra.state import State
from local import hf
from rewards import Channel, Example, Task

SHORT = "--max-tokens 16 --save-every 1 --steps 4"
# A task of one's own: it may change what it imports.
GRADED = """
from rewards import Channel, Task
from tasks import tools

def letters(prompts, responses, references):
    return [response.count("e") / 9 for response in responses]

def short(prompts, responses, references):
    return [1 / (1 + len(response)) for response in responses]

def task(options):
    return Task(tools.prompts, [Channel("letters", letters), Channel("short", short)])
"""


@pytest.fixture(autouse=True)
def handlers():
    """train.main installs handlers for good."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    signals._signals.clear()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def begin(monkeypatch, folder: Path, *words, name: str = "a") -> Path:
    """Four steps of the tiny model, in this process."""
    monkeypatch.chdir(folder)
    train_here(*TINY, SHORT, "--name", name, *words)
    return folder / "runs" / name


def go_on(monkeypatch, folder: Path, *words, name: str = "a") -> Path:
    monkeypatch.chdir(folder)
    train_here(f"--resume runs/{name}", *words)
    return folder / "runs" / name


NEVER = -1


def at_step(monkeypatch, step: int, what: Callable | None = None) -> None:
    """Calls what() when the rewards of that step are asked for. Rewards differ on any text."""
    real = rollout.Sampler.sample
    due = False

    def sample(self, prompts, group, now):
        nonlocal due
        due = now == step
        return real(self, prompts, group, now)

    def mine(prompts, responses, references):
        if due:
            what()
        return [len(response) / 100 for response in responses]

    def letters(prompts, responses, references):
        return [response.count("e") / 9 for response in responses]

    monkeypatch.setattr(rollout.Sampler, "sample", sample)
    for task in ("tools", "rlla"):
        set_channels(monkeypatch, [Channel("mine", mine), Channel("letters", letters)], task)


def begin_and_stop(monkeypatch, folder: Path, number: int, *words) -> int:
    """Begins a run that gets the signal in its third step. Returns the exit code."""
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            begin(patch, folder, *words)
    signals._signals.clear()
    return ended.value.code


def assert_same(a: Path, b: Path) -> None:
    assert kill_and_resume.differences(a, b) == []


# Stopped and resumed


@pytest.mark.parametrize("rank", ["0", "4"], ids=["all weights", "lora"])
def test_a_run_that_is_killed_while_it_saves_is_resumed_to_the_bit(rank):
    """One of the twenty of kill_and_resume.py."""
    assert kill_and_resume.main(["--kills", "1", "--steps", "3", "--lora", rank]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same(monkeypatch, tmp_path, capsys, number):
    """Received while a step's rewards are computed: that step is done again."""
    words = "--eval-every 2 --updates 2"
    at_step(monkeypatch, NEVER)
    alone = begin(monkeypatch, tmp_path, words, name="alone")
    code = begin_and_stop(monkeypatch, tmp_path, number, words, "--save-every 0")
    assert code == 128 + number
    how = f"stopped by {number.name}; to go on from step 2: python train.py --resume runs/a\n"
    assert how in capsys.readouterr().err
    assert not (tmp_path / "runs/a/checkpoint").exists()

    resumed = go_on(monkeypatch, tmp_path, "--save-every 3 --eval-every 2")
    out = capsys.readouterr().out
    assert "changed: --save-every 3, the run has 0\n" in out
    assert "runs/a goes on from step 2 of 4\n" in out
    assert_same(alone, resumed)
    assert not (resumed / "state").exists()

    with pytest.raises(SystemExit) as ended:
        go_on(monkeypatch, tmp_path)
    assert not ended.value.code
    finished = "runs/a is finished, with all of its 4 steps: nothing is left to do\n"
    assert capsys.readouterr().out == finished


def test_a_run_that_is_resumed_on_another_day_has_its_own_prompts(monkeypatch, tmp_path, dated):
    """Its chat template holds the date. With another template it is refused, unless it began before
    tokens were compared."""
    days = iter(["2024-02-28", "2024-02-28", "2024-02-29", "2024-02-29", "2024-02-29"])
    monkeypatch.setattr(prompts, "today", lambda date: date or next(days))
    at_step(monkeypatch, NEVER)
    shutil.copytree(dated, tmp_path / "dated")
    alone = begin(monkeypatch, tmp_path, "--model dated", name="alone")
    begin_and_stop(monkeypatch, tmp_path, signal.SIGINT, "--model dated")

    template, file = tmp_path / "dated/chat_template.jinja", tmp_path / "runs/a/config.json"
    before, config = template.read_text(), file.read_text()
    template.write_text(before + " ")
    assert refused("--resume runs/a") == (
        "--resume runs/a: the prompts' tokens are not what they were when it began (SHA-256 in "
        "config.json): bring the model's tokenizer and chat template back, or begin a new run"
    )
    of_before = json.loads(config)
    del of_before["tokens_sha256"]
    file.write_text(json.dumps(of_before))
    with monkeypatch.context() as patch:
        fail_at_the_model(patch)
        assert "ZeroDivisionError" in refused("--resume runs/a")

    template.write_text(before)
    file.write_text(config)
    assert_same(alone, go_on(monkeypatch, tmp_path))


def test_a_signal_during_the_update(monkeypatch, tmp_path):
    """Before its first optimizer step the step is given up, later it is finished. Either way the
    rest is the same."""
    # Four micro-batches a step.
    words = "--prompts 4 --updates 2 --tokens-per-microbatch 300 --steps 3"
    at_step(monkeypatch, NEVER)
    alone = begin(monkeypatch, tmp_path, words, name="alone")
    for call, saved in ((5, "step-1"), (7, "step-2")):
        with monkeypatch.context() as patch:
            at_loss(patch, call, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit):
                begin(patch, tmp_path, words, "--save-every 0", name=saved)
        signals._signals.clear()
        assert run_directory.latest(tmp_path / "runs" / saved).name == saved
        assert_same(alone, go_on(monkeypatch, tmp_path, name=saved))


def at_loss(monkeypatch, number: int, what: Callable) -> None:
    """Calls what() before the loss is computed for this time."""
    real = rvpo.policy_loss
    calls = 0

    def loss(*args, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            what()
        return real(*args, **options)

    monkeypatch.setattr(rvpo, "policy_loss", loss)


HANGING = f"""{GRADED}
import hashlib
from infra import state

def hang(*args):
    print("saving", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

state.save = hang
"""


def test_a_second_signal_ends_it_at_once(tmp_path):
    """While a save hangs in a library, where Python runs no handler. One within two seconds does
    not: a launcher repeats the first. What happens is said at once."""
    (tmp_path / "hanging.py").write_text(HANGING)
    words = "--task hanging.py --name a --steps 99 --save-every 1"
    pipe = subprocess.PIPE
    process = start(*TINY, words, cwd=tmp_path, stdout=pipe, stderr=pipe)
    assert any("saving" in line for line in process.stdout)
    process.terminate()
    process.terminate()
    said = (
        "stopping, and saving the state; "
        "a second signal (Ctrl-C again) ends the run at once, without saving"
    )
    assert any(said in line for line in process.stderr)
    time.sleep(signals.AGAIN + 0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(300) == 143
    assert not list((tmp_path / "runs/a").glob("state/*"))


FORKS = f"""
import multiprocessing, sys, time

sys.path.insert(0, {str(ROOT)!r})
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


def test_a_process_that_a_reward_forks_can_be_ended_and_the_run_goes_on(tmp_path):
    """Such as one that runs code for too long. Fifty times, some of them before the process has
    begun."""
    (tmp_path / "forks.py").write_text(FORKS)
    result = python(tmp_path / "forks.py")
    assert result.returncode == 0 and "stopping" not in result.stderr, result.stderr


# Several ranks


def start_noisy(*words, cwd: Path, ranks: int = 2, **options) -> subprocess.Popen:
    """A run of kill_and_resume.py's task, named a. It writes to a.log."""
    words = split("--engine hf", SHORT, *words)
    return kill_and_resume.start("a", cwd, ranks, *words, **options)


def until(condition: Callable, process: subprocess.Popen, log: Path) -> None:
    kill_and_resume.wait(condition, process)
    assert condition(), log.read_text()[-3000:]


def training_steps(run: Path) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def test_ranks_are_stopped_by_a_signal_to_one_and_resumed_as_one_or_four(tmp_path):
    """Rewards without chance: each rank draws its own numbers."""
    words = "--resume auto --steps 6 --save-every 0 --prompts 3"
    runs, log = tmp_path / "runs", tmp_path / "a.log"
    process = start_noisy(words, cwd=tmp_path, chance=False)
    until((runs / "a/samples.jsonl").exists, process, log)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
    assert process.wait(300) == 1
    assert log.read_text().count("stopped by SIGTERM; to go on from step ") == 1
    assert "]: Traceback" not in log.read_text()
    shutil.copytree(runs, tmp_path / "stopped")
    losses = {}
    for total in (1, 4):
        shutil.rmtree(runs)
        shutil.copytree(tmp_path / "stopped", runs)
        process = start_noisy(words, cwd=tmp_path, ranks=total, chance=False)
        assert process.wait(300) == 0, log.read_text()[-3000:]
        steps = training_steps(runs / "a")
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
        losses[total] = [line["loss"] for line in steps]
    assert "changed: ranks 4, the run had 2\n" in log.read_text()
    assert losses[1] == pytest.approx(losses[4], rel=0, abs=1e-5)


def test_ctrl_c_reaches_every_rank_and_the_launcher_which_repeats_it(tmp_path):
    """As from a terminal. The state is saved all the same, and one rank says so."""
    process = start_noisy("--resume auto --steps 99 --save-every 0", cwd=tmp_path)
    log = tmp_path / "a.log"
    until((tmp_path / "runs/a/samples.jsonl").exists, process, log)
    for rank in (0, 1):
        os.kill(int((tmp_path / f"pid-{rank}").read_text()), signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1
    said = log.read_text()
    assert said.count("stopping, and saving the state;") == 1
    assert said.count("stopped by SIGINT; to go on from step ") == 1
    assert "]: Traceback" not in said
    assert run_directory.latest(tmp_path / "runs/a")


def test_torchrun_starts_again_when_a_rank_dies(tmp_path):
    """All within a minute: the other rank does not wait for the dead one."""
    process = start_noisy("--resume auto", cwd=tmp_path, restarts=1)
    log = tmp_path / "a.log"
    until((tmp_path / "runs/a/state/step-1").exists, process, log)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    assert process.wait(60) == 0, log.read_text()[-3000:]
    steps = [line["step"] for line in read_lines(tmp_path / "runs/a/metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4, 4]  # evaluations are 0 and the last


LATE = f"""
import atexit, os, time
from infra import ranks

atexit.register(os.abort)
time.sleep(2.2 * ranks.RANK)
{GRADED}
"""


def test_a_late_rank_without_a_name(tmp_path):
    """Its own default name has the time of two seconds later: the run is still one, and can be
    resumed. What would abort while the interpreter is taken down does not make a failure of it."""
    (tmp_path / "late.py").write_text(LATE)
    words = "--task late.py --max-tokens 8 --save-every 1 --steps 15"
    process = start(*TINY, words, cwd=tmp_path, ranks=2)
    kill_and_resume.wait(lambda: [*tmp_path.glob("runs/*/state/step-[1-9]")], process)
    process.terminate()
    process.wait(60)
    (run,) = (tmp_path / "runs").iterdir()
    (state,) = (run / "state").glob("step-*")
    files = json.loads((state / "state.json").read_text())["files"]
    assert len({name.partition("-model")[0] for name in files}) == 2  # of each rank
    again = launch(f"--resume runs/{run.name}", cwd=tmp_path, ranks=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [*(tmp_path / "runs").iterdir()] == [run]
    assert (run / "checkpoint").is_dir()


def test_ranks_with_different_prompts(monkeypatch, tmp_path):
    """Each would pair its own with the responses to another's: a wrong gradient, and nobody would
    notice."""
    monkeypatch.setattr(resume, "gather", lambda local: [*local, "another digest"])
    message = "the ranks have different prompts: a task must make the same ones on all"
    with pytest.raises(InputError, match=message):
        resume.check_data(tmp_path, [])


def test_a_checkpoint_that_lacks_the_shards_of_a_rank(monkeypatch, tmp_path, tiny_policy):
    """As on nodes that do not share a file system: the other rank sees a file that is not here."""
    shard = "shard-00002-model-00001-of-00001.safetensors"

    def gather(local: list) -> list:
        of_files = local and isinstance(local[0], list)
        return [*local, [shard]] if of_files else local

    monkeypatch.setattr(states, "gather", gather)
    optimizer = update.make_optimizer(tiny_policy, 0.0)
    message = (
        f"could not be saved: {shard} of another rank is not in .*"
        "must be on a file system that all share"
    )
    with pytest.raises(InputError, match=message):
        states.save(tmp_path, tiny_policy, optimizer, State(step=3))
    assert not [*tmp_path.glob("state/step-*")]


def moments(policy) -> torch.optim.AdamW:
    """An AdamW that has taken a step on gradients that depend on names only."""
    optimizer = update.make_optimizer(policy, 0.01)
    for i, parameter in enumerate(policy.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 + i)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("total", [2, 4])
def test_a_checkpoint_of_some_ranks_is_loaded_by_others(tmp_path, llama, total):
    """One rank's by several, then theirs by one; of parameters in shapes that ranks cannot share
    evenly."""
    policy = policies.load(llama, updates.CPU)
    optimizer = moments(policy)
    states.save(tmp_path / "one", policy, optimizer, State(step=3, optimizer_steps=1))
    on_ranks(total, total, tmp_path / "many", llama, llama, tmp_path / "one")
    path = tmp_path / "many/state/step-4"
    assert json.loads((path / "state.json").read_text())["world_size"] == total
    again = policies.load(llama, updates.CPU)
    other = update.make_optimizer(again, 0.01)
    assert states.load(path, again, other).step == 4
    assert same_weights(states.tensors(policy, optimizer), states.tensors(again, other))
    assert {state["step"].item() for state in other.state.values()} == {1}
    for pickles in ("*.metadata", "*.pt", "*.distcp"):
        assert not [*tmp_path.rglob(pickles)]


def test_a_directory_that_was_half_deleted_does_not_block_the_next(tmp_path):
    for name in ("x", "x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    run_directory.retire(tmp_path / "x")
    assert not [*tmp_path.iterdir()]


# What is refused


def refused(*words) -> str:
    """The sentence of train.py."""
    with pytest.raises(InputError) as error:
        train_here(*words)
    return str(error.value)


def fail_at_the_model(monkeypatch) -> None:
    """All that is checked before is accepted: then a ZeroDivisionError follows."""
    monkeypatch.setattr(policies, "load", lambda *args, **options: 1 / 0)


def question(number: int) -> dict:
    """A row of rlla."""
    return {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "reward_model": {"ground_truth": "<think> </think>\n<response> yes </response>"},
    }


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """runs/a, stopped after two of four steps by a reward that fails."""
    write_lines(tmp_path / "rows.jsonl", [question(number) for number in range(9)])
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: 1 / 0)
        with pytest.raises(InputError) as error:
            begin(patch, tmp_path, "--task rlla --data rows.jsonl")
    said = str(error.value)
    place = "reward 'mine' raised ZeroDivisionError: division by zero (test_resume.py, line "
    assert said.startswith(place)
    assert said.endswith(
        "); the policy as it was then is in runs/a/checkpoint; to go on from step 2: "
        "python train.py --resume runs/a"
    )
    monkeypatch.chdir(tmp_path)
    nothing_is_loaded(monkeypatch)
    return tmp_path / "runs/a"


def test_options_that_cannot_change_are_refused_one_line_each(stopped):
    assert refused("--resume runs/a --lr 1 --steps 9 --save-every 3") == (
        "--resume runs/a: these options cannot be changed, leave them out:\n"
        "--steps 9, the run has 4\n"
        "--lr 1.0, the run has 0.001"
    )


def test_data_that_changed_are_refused(monkeypatch, stopped):
    rows = Path("rows.jsonl")
    rows.rename("moved.jsonl")
    fail_at_the_model(monkeypatch)
    assert "ZeroDivisionError" in refused("--resume runs/a --data moved.jsonl")
    rows.write_text(Path("moved.jsonl").read_text().replace("question 3", "question 4"))
    assert refused("--resume runs/a") == (
        "--resume runs/a: its data are not what they were when it began (SHA-256 in config.json): "
        "bring them back, or begin a new run"
    )


def cut_weights(state: Path) -> None:
    os.truncate(next(state.glob("*.safetensors")), 5000)


def delete_weights(state: Path) -> None:
    next(state.glob("*.safetensors")).unlink()


def cut_json(state: Path) -> None:
    (state / "state.json").write_text("{")


def replace_json(state: Path) -> None:
    (state / "state.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "has 5000 of"),
        (delete_weights, "No such file or directory"),
        (cut_json, "Expecting property name"),
        (replace_json, "list indices must be integers"),
    ],
)
def test_a_damaged_checkpoint(stopped, damage, message):
    damage(stopped / "state/step-2")
    said = refused("--resume runs/a")
    assert said.startswith("runs/a/state/step-2 is damaged (")
    assert message in said and "\n" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--resume runs/b",
            "--resume runs/b: no checkpoint is there; "
            "name the directory of a run, such as runs/NAME",
        ),
        ("--resume auto", "--resume auto needs --name, to find the run again"),
        (
            "--save-every often",
            "--save-every often: should be auto, or a number of steps, such as 20",
        ),
        (
            "--task rubric --data x --judge-model m --judge-url http://me:secret@host/v1",
            "--judge-url holds a password, which would be written to runs/: "
            "a judge's key goes into the environment variable JUDGE_API_KEY",
        ),
        (
            "--resume auto --name mine",
            "runs/mine holds something else than a run: choose another --name",
        ),
    ],
)
def test_bad_options(monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/results.json").write_text("{}")
    assert refused(words).startswith(message)


def test_a_checkpoint_of_another_model(tiny, llama, tmp_path):
    policy = policies.load(llama, updates.CPU)
    states.save(tmp_path, policy, moments(policy), State(step=3, optimizer_steps=1))
    other = policies.load(tiny, updates.CPU)
    path = tmp_path / "state/step-3"
    with pytest.raises(InputError) as error:
        states.load(path, other, update.make_optimizer(other, 0.01))
    assert str(error.value).startswith(f"{path} is no checkpoint of this model: ")
    assert "\n" not in str(error.value)


# Disks


@pytest.fixture
def small(tmp_path):
    """A file system of 20 MB: room for one checkpoint of the tiny model, which has 11.8 MB, and not
    for a second."""
    disk = tmp_path / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filled", "wb", buffering=0) as filled, contextlib.suppress(OSError):
        while True:
            filled.write(bytes(4096))


FULL = "[Errno 28] No space left on device"
STEP_1_IS_WHOLE = "runs/a/state/step-1 is whole, to go on from it: python train.py --resume runs/a"


def test_a_disk_that_fills_up(monkeypatch, tmp_path, small):
    at_step(monkeypatch, NEVER)
    with pytest.raises(InputError) as error:
        begin(monkeypatch, tmp_path)
    not_saved = f"runs/a/state/step-2 could not be saved: {FULL}; {STEP_1_IS_WHOLE}"
    assert str(error.value) == not_saved
    assert [path.name for path in (small / "a/state").iterdir()] == ["step-1"]

    fill(small)
    assert refused("--resume runs/a") == not_saved
    (small / "filled").unlink()

    with monkeypatch.context() as patch:  # while step 4 is sampled
        at_step(patch, 3, lambda: fill(small))
        said = refused("--resume runs/a --save-every 0")
    assert said == (
        f"runs/a/samples.jsonl cannot be written: {FULL}; "
        f"runs/a/state/step-3 could not be saved: {FULL}; {STEP_1_IS_WHOLE}"
    )
    (small / "filled").unlink()

    resumed = go_on(monkeypatch, tmp_path)
    steps = [line["step"] for line in read_lines(resumed / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4, 4]
    assert_same(begin(monkeypatch, tmp_path, "--save-every 0", name="alone"), resumed)


def test_a_directory_that_can_only_be_read(monkeypatch, tmp_path, small):
    def remount():
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)

    at_step(monkeypatch, 1, remount)
    with pytest.raises(InputError) as error:
        begin(monkeypatch, tmp_path)
    read_only = "[Errno 30] Read-only file system"
    assert str(error.value) == (
        f"runs/a/samples.jsonl cannot be written: {read_only}: 'runs/a/samples.jsonl'; "
        f"runs/a/checkpoint could not be written: {read_only}: 'runs/a/checkpoint.part'; "
        f"{STEP_1_IS_WHOLE}"
    )
    assert refused("--resume runs/a") == f"runs/a: {read_only}: 'runs/a/config.json.part'"
    said = refused(*TINY, SHORT, "--name b")
    assert said == f"runs/b cannot be made: {read_only}: 'runs/b'"


# Numbers that go wrong

NO_PROBABILITIES = (
    "the model gives NaN for the next token: its weights are damaged, or training has diverged: "
    "begin again with a lower --lr"
)


def test_a_policy_that_has_diverged_ends_the_run(monkeypatch, tmp_path):
    """transformers' sampling once ended in a traceback, and the state was lost."""
    real = update.update

    def diverge(learner, *args):
        metrics = real(learner, *args)
        learner.policy.lm.model.norm.weight.data[3] = float("nan")
        return metrics

    monkeypatch.setattr(train, "update", diverge)
    with pytest.raises(InputError) as error:
        begin(monkeypatch, tmp_path, "--save-every 0")
    assert str(error.value) == (
        f"{NO_PROBABILITIES}; the policy as it was then is in runs/a/checkpoint; "
        "to go on from step 1: python train.py --resume runs/a"
    )
    assert (tmp_path / "runs/a/state/step-1").is_dir()


class Odd:
    """An engine like vLLM, which samples something from NaN."""

    def generate(self, prompts, group, seeds):
        yield 0, [rollout.Response([5, 0], [-1.0, float("nan")], [1, 1], "length", "x")] * group


def test_responses_without_probabilities_are_not_graded():
    """Raised by `score`, which all ranks reach: another one would wait for the one that fails."""

    def grade(prompts, responses, references):
        pytest.fail("it was graded")

    sampler = rollout.Sampler(Odd(), Task(None, [Channel("c", grade)]), 0)
    batch = [prompts.Prompt([1], Example([]))]
    sampled = sampler.sample(batch, 2, 0)
    with pytest.raises(InputError, match=NO_PROBABILITIES):
        sampler.score(batch, sampled)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_transformers_does_not_sample_from_nan(tiny, temperature):
    decoding = rollout.Decoding(pretrained.load_tokenizer(tiny), [2], temperature, 4)
    engine = hf.HFEngine(hf.load(tiny, torch.device("cpu")), decoding)
    engine.model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match=NO_PROBABILITIES):
        next(engine.generate([[5, 6, 7]], 1, [0]))


# On the last rank the second update's loss is NaN in some steps.
NOT_FINITE = f"""{GRADED}
import rvpo
from infra import ranks, state

real = rvpo.policy_loss
calls = 0

def loss(*args, **options):
    global calls
    step, update = divmod(calls, 2)
    calls += 1
    value, stats = real(*args, **options)
    bad = update == 1 and step + 1 in (2, 4, 5, 6) and ranks.RANK == ranks.WORLD - 1
    return value * (float("nan") if bad else 1), stats

rvpo.policy_loss = loss
state.BAD_STEPS = 3
"""


@pytest.fixture(scope="module")
def not_finite(tmp_path_factory):
    """A run of two ranks whose second update is bad in steps 2, 4, 5 and 6; and what it said."""
    folder = tmp_path_factory.mktemp("not_finite")
    (folder / "nan.py").write_text(NOT_FINITE)
    words = "--task nan.py --name a --steps 9 --max-tokens 8 --updates 2 --prompts 4"
    result = launch(*TINY, words, cwd=folder, ranks=2)
    return folder / "runs/a", result.stderr


def test_several_steps_in_a_row_that_are_not_finite_end_the_run(not_finite):
    run, said = not_finite
    message = (
        "error: a loss or gradient was not finite in each of the last 3 steps: see bad_prompts in "
        "metrics.jsonl, and try a lower --lr; the policy as it was then is in runs/a/checkpoint; "
        "to go on from step 6: python train.py --resume runs/a\n"
    )
    assert said.count(message) == 1, said[-3000:]
    state = json.loads((run / "state/step-6/state.json").read_text())
    assert state["bad_steps"] == 3


def test_all_ranks_leave_out_the_update_that_is_not_finite_on_one(not_finite):
    run, _ = not_finite
    steps = training_steps(run)
    assert [line["bad_updates"] for line in steps] == [[], [1], [], [1], [1], [1]]
    bad = [2, 3]  # the second update's prompts
    assert [line["bad_prompts"] for line in steps] == [[], bad, [], bad, bad, bad]
    assert all(line["grad_norm"] > 0 for line in steps)
    state = json.loads((run / "state/step-6/state.json").read_text())
    assert state["optimizer_steps"] == 8
    policy = policies.load(run / "checkpoint", updates.CPU)
    assert all(parameter.isfinite().all() for parameter in policy.parameters())


def test_a_reward_that_never_varies_is_pointed_out_once(monkeypatch, tmp_path, capsys):
    def rare(prompts, responses, references):
        return [float("q" in response) for response in responses]

    channels = [Channel("same", constant), Channel("gone", missing), Channel("rare", rare)]
    set_channels(monkeypatch, channels)
    begin(monkeypatch, tmp_path, "--steps 12 --save-every 0")
    out = capsys.readouterr().out
    same = (
        "warning: reward 'same' was 0.5 on all of the 4 held-out prompts: "
        "it teaches nothing until a response does better"
    )
    gone = "warning: reward 'gone' was missing on all of the 4 held-out prompts: it teaches nothing"
    assert out.count(same) == out.count("'same'") == 1
    assert out.count(gone) == out.count("'gone'") == 1


def test_by_default_saving_waits_and_then_takes_a_hundredth(monkeypatch, tmp_path):
    """The second save is due 100 times as long after the first as that took."""
    for first, expected in ((0.0, [False, True, False, False]), (600.0, [False] * 4)):
        monkeypatch.setattr(states, "FIRST_SAVE", first)
        run = begin(monkeypatch, tmp_path, "--save-every auto", name=f"first{first:.0f}")
        saved = [line["seconds"]["save"] > 0 for line in training_steps(run)]
        assert saved == expected


# Secrets and the judge


def test_no_file_holds_the_judges_key(monkeypatch, tmp_path):
    """Not even when the endpoint quotes it in an error that is logged; and the sentence of a judge
    that dies."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret-0123456789")
    rubric = [{"description": "says 1"}, {"description": "says 2"}]
    rows = [{"prompt": f"question {i}", "rubric": rubric} for i in range(9)]
    write_lines(tmp_path / "rows.jsonl", rows)
    last = 30  # the last request that is answered

    def answer(body: dict, number: int):
        if number > last:
            return 401, f"wrong key: {server.requests[-1]['key']}"
        return graded(body, number)

    server = Server(answer)
    words = f"--task rubric --data rows.jsonl {server.options} --judge-cache runs/cache --steps 3"
    try:
        begin(monkeypatch, tmp_path, words, "--judge-max-missing 1")
        last = len(server.requests) + 9
        with pytest.raises(InputError) as error:
            begin(monkeypatch, tmp_path, words, "--seed 1", name="b")
    finally:
        server.stop()
    assert server.requests[0]["key"] == "Bearer sk-very-secret-0123456789"
    assert (
        "% of the judge's verdicts are missing, more than --judge-max-missing 0.2 allows; "
        "the last reason was: HTTP 401: wrong key: Bearer ***; "
        "the policy as it was then is in runs/b/checkpoint; "
        "to go on from step 0: python train.py --resume runs/b"
    ) in str(error.value)
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 15
    assert "***" in (tmp_path / "runs/a/metrics.jsonl").read_text()
    assert not [path for path in written if b"very-secret" in path.read_bytes()]
