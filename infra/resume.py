"""How a run is stopped and goes on.

runs/NAME/state/step-N/ holds the policy and AdamW's moments after N steps, sharded, as safetensors, and state.json: all
else that the next step depends on. Nothing in it is a pickle. Any number of ranks loads it. What a step draws at random
follows from (seed, step), so no generator's state is kept.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.fsdp import FSDPModule

from infra.log import LOGS, RunLog
from infra.ranks import RANK, WORLD, InputError, gather, on_rank_0
from infra.run_directory import (
    evaluations,
    finished,
    latest,
    make_run,
    publish,
    retire,
    sync,
    versions,
    write_json,
)
from infra.signals import Stop
from rewards import digest

warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled"
)  # on one rank, as asked for


BAD_STEPS = 5  # stop after as many steps in a row whose loss or gradient is not finite
FIRST_SAVE = 600.0  # seconds until --save-every auto saves for the first time


# What a run may be resumed with, since its numbers follow from the others: where data are (what they are is compared),
# memory and speed, the judge's endpoint, and how often things are saved and evaluated.
MAY_CHANGE = {
    "name",
    "resume",
    "data",
    "eval_data",
    "judge_url",
    "judge_cache",
    "judge_concurrency",
    "judge_timeout",
    "judge_max_missing",
    "tokens_per_microbatch",
    "gradient_checkpointing",
    "gpu_memory",
    "eval_every",
    "keep_policies",
    "save_every",
    "track",
}


def find_run(resume: str | None, name: str | None) -> Path | None:
    """The run to go on with: the one that --resume names; with `auto` that of --name if it has a checkpoint or is
    finished, else None. Raises InputError."""
    if resume is None:
        return None
    if resume == "auto" and not name:
        raise InputError("--resume auto needs --name, to find the run again")
    run = Path("runs") / name if resume == "auto" else Path(resume)
    if latest(run) or finished(run):
        return run
    if resume == "auto":
        return None
    raise InputError(
        f"--resume {run}: no checkpoint is there; name the directory of a run, such as runs/NAME"
    )


def read_config(run: Path, given: dict) -> dict:
    """A run's config.json, with the options that the command line gives anew. Raises InputError for one that must not
    differ; says which do."""
    try:
        saved = json.loads((run / "config.json").read_text())
        before = {"ranks": saved["world_size"], **saved["versions"]}
        saved["data_sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"--resume {run}: its config.json cannot be read ({error})") from error
    changed = {
        name: f"--{name.replace('_', '-')} {value}, the run has {saved.get(name)}"
        for name, value in given.items()
        if name not in ("name", "resume") and value != saved.get(name)
    }
    if refused := [line for name, line in changed.items() if name not in MAY_CHANGE]:
        raise InputError(
            "\n".join(
                [f"--resume {run}: these options cannot be changed, leave them out:", *refused]
            )
        )
    here = {"ranks": WORLD, **versions()}
    other = [
        f"{name} {here.get(name)}, the run had {was}"
        for name, was in before.items()
        if here.get(name) != was
    ]
    if RANK == 0:
        print("".join(f"changed: {line}\n" for line in [*changed.values(), *other]), end="")
    return saved | {name: given[name] for name in changed} | {"resume": str(run)}


def check_data(run: Path, examples: list) -> str:
    """SHA-256 of all that is in the examples. Raises InputError if other ranks have another, or the run had one."""
    sha256, file = digest(examples), run / "config.json"
    if len({*gather([sha256])}) > 1:
        raise InputError(
            "the ranks have different prompts: a task must make the same ones on all (seed what it draws, "
            "sort what comes from a set), and nodes must read the same files"
        )
    if latest(run) and json.loads(file.read_text())["data_sha256"] != sha256:
        raise InputError(
            f"--resume {run}: its data are not what they were when it began (SHA-256 in config.json): "
            "bring them back, or begin a new run"
        )
    return sha256


def check_tokens(run: Path, prompts: list) -> str:
    """SHA-256 of the prompts' tokens. Raises InputError as check_data does."""
    tokens, file = json.dumps([prompt.ids for prompt in prompts]), run / "config.json"
    sha256 = hashlib.sha256(tokens.encode()).hexdigest()
    if len({*gather([sha256])}) > 1:
        raise InputError(
            "the ranks have different tokens of the same prompts: nodes must have the "
            "same tokenizer and chat template"
        )
    before = json.loads(file.read_text()) if latest(run) else {}
    if before.get("tokens_sha256", sha256) != sha256:  # older runs have none
        raise InputError(
            f"--resume {run}: the prompts' tokens are not what they were when it "
            "began (SHA-256 in config.json): bring the model's tokenizer and chat "
            "template back, or begin a new run"
        )
    return sha256


@contextlib.contextmanager
def open_run(options: dict, given: set[str]):
    """The run that options["resume"] names, or a new one. given: names of the options that the command line had. Yields
    (its directory, its options, its state), made before anything is loaded. Ends the program if it is finished. Raises
    InputError."""
    if options["track"] and importlib.util.find_spec(options["track"]) is None:
        raise InputError(
            f"--track {options['track']}: it is not installed; pip install {options['track']}"
        )
    run = find_run(options["resume"], options["name"])
    if len({*gather([run and (run, latest(run))])}) > 1:
        raise InputError(
            f"--resume {options['resume']}: not all ranks see the same checkpoint; runs/ must be on a "
            "file system that all nodes share"
        )
    if run:
        saved = read_config(run, {name: value for name, value in options.items() if name in given})
        options = {name: saved.get(name, value) for name, value in options.items()}
        if finished(run):
            if RANK == 0:
                print(
                    f"{run} is finished, with all of its {options['steps']} steps: nothing is left to do"
                )
            sys.exit()
        state = read(latest(run))
        if RANK == 0:
            print(f"{run} goes on from step {state.step} of {options['steps']}", flush=True)
        yield run, options, state
    else:
        name = (
            options["name"]
            or f"{Path(options['task']).stem}-{options['agg']}-{time.strftime('%m%d-%H%M%S')}"
        )
        with make_run(name, "config.json" if options["resume"] else None) as run:
            yield run, options, State()


@dataclass
class State:
    """Where a run is, between two steps. A run that is resumed repeats the evaluation that comes next."""

    step: int = 0  # steps that are done and logged
    bad_steps: int = 0  # the last of them whose loss or gradient was not finite
    lengths: dict[str, int] = field(default_factory=dict)  # of the logs, in bytes
    optimizer_steps: int = 0  # of the policy


class NoCheckpoints:
    """For a loop whose state need not be saved."""

    def __init__(self):
        self.state = State()

    def save_if_due(self) -> float:
        return 0.0


def tensors(policy, optimizer) -> dict[str, Tensor]:
    """Name -> what is saved of the policy and of AdamW, whose moments are made here where it has none yet, as it would
    make them itself."""
    if isinstance(policy, FSDPModule):
        policy.reshard()  # an update that was broken off may have left embeddings and head gathered
    out = {}
    for name, parameter in policy.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state |= {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        out |= {
            f"policy.{name}": parameter.detach(),
            f"exp_avg.{name}": state["exp_avg"],
            f"exp_avg_sq.{name}": state["exp_avg_sq"],
        }
    return out


def _reason(error: BaseException) -> str:
    """One line; of a failure on several ranks, the first rank's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save(run: Path, policy, optimizer, state: State) -> None:
    """runs/NAME/state/step-N, N being state.step; then older ones are deleted. All ranks must call it. Raises
    InputError on all of them if one fails; an older checkpoint is still there then."""
    path = run / "state" / f"step-{state.step}"
    part = path.with_name(path.name + ".part")
    content = tensors(policy, optimizer)

    def prepare() -> None:
        for left in run.glob("state/*.*"):  # of a run that was killed
            shutil.rmtree(left)
        part.mkdir(parents=True)

    def finish() -> None:
        if lost := sorted(seen - {file.name for file in part.iterdir()}):
            raise OSError(
                f"{lost[0]} of another rank is not in {part}: runs/ must be on a file system that all share"
            )
        for name in LOGS:
            if (run / name).exists():
                sync(run / name)
        write_json(
            part / "state.json",
            {
                **asdict(state),
                "world_size": WORLD,
                "files": {file.name: file.stat().st_size for file in part.iterdir()},
            },
        )
        publish(part, path)
        for old in run.glob("state/step-*"):
            if old != path:
                retire(old)

    # A file for each kind, since each is made in memory first. What several ranks have the lowest one saves: with
    # replicas on several nodes those of the first node.
    kinds = {
        name: ("policy", "exp_avg", "exp_avg_sq").index(name.partition(".")[0]) + 1
        for name in content
    }
    try:
        on_rank_0(prepare)
        dcp.save(
            content,
            no_dist=WORLD == 1,
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            storage_writer=dcp.HuggingFaceStorageWriter(str(part), kinds, save_distributed=True),
        )
        # The writer makes a missing directory in silence: the shards of a rank with another one would be lost.
        seen = {
            name for names in gather([[file.name for file in part.glob("*")]]) for name in names
        }
        on_rank_0(finish)
    except (OSError, CheckpointException) as error:
        if RANK == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"{path} could not be saved: {_reason(error)}") from error


def read(path: Path) -> State:
    """A checkpoint's state.json, once all of its files are known to be there. Raises InputError."""
    try:
        content = json.loads((path / "state.json").read_text())
        sizes = {name: (path / name).stat().st_size for name in content["files"]}
        wrong = [
            f"{name} has {sizes[name]} of {size} bytes"
            for name, size in content["files"].items()
            if sizes[name] != size
        ]
        state = State(**{name: content[name] for name in State.__dataclass_fields__})
    except (OSError, ValueError, LookupError, TypeError) as error:
        wrong = [_reason(error)]
    if wrong:
        raise InputError(
            f"{path} is damaged ({wrong[0]}): delete it to go on from an older one, if there is one"
        )
    return state


def load(path: Path, policy, optimizer) -> State:
    """Fills the policy and AdamW from a checkpoint. Returns its state. Raises InputError on all ranks."""
    state, content = read(path), tensors(policy, optimizer)
    try:
        dcp.load(
            content, no_dist=WORLD == 1, storage_reader=dcp.HuggingFaceStorageReader(str(path))
        )
    except CheckpointException as error:
        raise InputError(f"{path} is no checkpoint of this model: {_reason(error)}") from error
    for moments in optimizer.state.values():
        moments["step"].fill_(state.optimizer_steps)
    return state


class Checkpoints:
    """Saves a run's state while it trains. every: --save-every."""

    def __init__(self, log: RunLog, policy, optimizer, every: str, state: State):
        """Fills the policy and the optimizer from the run's checkpoint, if it has one. Raises InputError."""
        self.log, self.policy, self.optimizer, self.every, self.state = (
            log,
            policy,
            optimizer,
            every,
            state,
        )
        self.begun, path = state.step, latest(log.run)
        self.saved = state.step if path else None  # the step of the newest checkpoint
        if path:
            load(path, policy, optimizer)
        self.failed = None  # a step that could not be saved: it is not tried again
        self.saved_at, self.took = time.perf_counter(), 0.0

    def optimizer_steps(self) -> int:
        return max((int(moments["step"]) for moments in self.optimizer.state.values()), default=0)

    def save_if_due(self) -> float:
        """Called between two steps: what is known now is what a checkpoint holds. Returns the seconds it took. Raises
        InputError if that fails, or if there is no sense in going on."""
        self.state.lengths, self.state.optimizer_steps = self.log.lengths(), self.optimizer_steps()
        if self.every == "auto":  # so that it takes 1% of the time
            due = gather([time.perf_counter() - self.saved_at >= (100 * self.took or FIRST_SAVE)])[
                0
            ]
        else:
            due = int(self.every) and self.state.step % int(self.every) == 0
        if self.state.step == self.begun:
            return 0.0
        if self.state.bad_steps >= BAD_STEPS:
            raise InputError(
                f"a loss or gradient was not finite in each of the last {self.state.bad_steps} steps: see "
                "bad_prompts in metrics.jsonl, and try a lower --lr"
            )
        if not due:
            return 0.0
        began = time.perf_counter()
        self.save()
        self.saved_at = time.perf_counter()
        self.took = self.saved_at - began
        return self.took

    def save(self) -> None:
        """The state, unless it was saved. Raises InputError on all ranks."""
        if self.saved != self.state.step:
            self.failed = self.state.step
            save(self.log.run, self.policy, self.optimizer, self.state)
            self.saved, self.failed = self.state.step, None

    @contextlib.contextmanager
    def saving_what_can_be(self, write_policy: Callable):
        """An InputError or a signal within ends the run before its time, on all ranks: what can be saved is, and the
        message says how to go on."""
        try:
            yield
        except InputError as error:
            how = self._give_up(write_policy)
            if RANK:  # one sentence is enough
                sys.exit(1)
            raise InputError(f"{error}; {how}") from error
        except Stop as stop:
            how = self._give_up()
            if RANK == 0:
                print(f"\n{stop}; {how}", file=sys.stderr, flush=True)
            sys.exit(stop.code)

    def _give_up(self, write_policy: Callable | None = None) -> str:
        """Saves the state, and the policy by itself. Returns how to go on."""
        run, trouble = self.log.run, ""
        try:
            # Otherwise the policy is in the midst of a step, or was found not to be saved.
            if (
                self.optimizer_steps() == self.state.optimizer_steps
                and self.failed != self.state.step
            ):
                self.save()
                if write_policy:
                    write_policy(run / "checkpoint")
                    trouble = f"the policy as it was then is in {run}/checkpoint; "
                return (
                    f"{trouble}to go on from step {self.state.step}: python train.py --resume {run}"
                )
        except InputError as error:
            trouble = f"{error}; "
        last = latest(run)
        return trouble + (
            f"{last} is whole, to go on from it: python train.py --resume {run}"
            if last
            else "no checkpoint is there yet"
        )


def cell(mean: float | None, error: float | None) -> str:
    """Of the table that `finish` prints."""
    if mean is None:
        return f"{'missing':13}"
    return f"{mean:.3f} ({math.nan if error is None else error:.3f})"


def finish(log: RunLog, n_held_out: int) -> None:
    """Of a run whose policy is saved: deletes its state, and prints its first and last evaluation, on rank 0."""
    if RANK:
        return
    run = log.run
    if log.tracker:
        log.tracker.finish()
    if (run / "state").exists():
        retire(run / "state")
    first, *_, last = [line["eval"] for line in evaluations(run)]
    print(f"\n{n_held_out} held-out prompts    before           after     (standard error)")
    for name in [name for name in first if name in last]:
        print(f"{name:>20}  {cell(*first[name])}  {cell(*last[name])}")
    print(f"\n{run}: metrics.jsonl, samples.jsonl, checkpoint/")
