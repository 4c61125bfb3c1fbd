"""The state that a run is resumed from: what it is, when it is saved, and its form on disk.

runs/NAME/state/step-N/ holds the policy and AdamW's moments after N steps, sharded, as safetensors,
and state.json: all else that the next step depends on. Nothing in it is a pickle. Any number of
ranks can load it. What a step draws at random follows from (seed, step), so no generator's state is
kept. Finding the run to go on with is in resume.py.
"""

import contextlib
import json
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
from infra.run_directory import latest, publish, retire, sync, write_json
from infra.signals import Stop

# With one rank torch.distributed is not used, on purpose. The checkpoint package warns of that.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

BAD_STEPS = 5  # stop after as many steps in a row whose loss or gradient is not finite
FIRST_SAVE = 600.0  # seconds until --save-every auto saves for the first time
KINDS = "policy", "exp_avg", "exp_avg_sq"  # of tensors: each is saved in files of its own


@dataclass
class State:
    """Where a run is, between two steps. A resumed run evaluates first, if it is time for that."""

    step: int = 0  # steps that are done and logged
    bad_steps: int = 0  # how many of the last ones had a loss or gradient that was not finite
    lengths: dict[str, int] = field(default_factory=dict)  # of the logs, in bytes
    optimizer_steps: int = 0  # of the policy


class NoCheckpoints:
    """What `train.fit` asks of checkpoints, for a loop whose state need not be saved.

    `fit` begins at `state.step`, and counts `state.step` and `state.bad_steps` up after each step.
    A subclass saves what else it wants to.
    """

    def __init__(self, state: State | None = None):
        self.state = state or State()

    def save_if_due(self) -> float:
        """Called on all ranks before each step and after the last. Returns the seconds it took. An
        InputError, which must be raised on all ranks, ends the run."""
        return 0.0


class Checkpoints(NoCheckpoints):
    """Saves a run's state while it trains, and when it is given up."""

    def __init__(self, log: RunLog, policy, optimizer, every: str, state: State):
        """Fills the policy and the optimizer from the state on disk, if there is one. every:
        --save-every. Raises InputError."""
        super().__init__(state)
        self.log = log
        self.policy = policy
        self.optimizer = optimizer
        self.every = every
        self.first_step = state.step  # of this process
        self.saved_step = None  # the step of the newest state on disk
        if path := latest(log.run):
            load(path, policy, optimizer)
            self.saved_step = state.step
        self.failed_step = None  # one that could not be saved: it is not tried again
        self.saved_at = time.perf_counter()
        self.took = 0.0  # seconds, the last time

    def save_if_due(self) -> float:
        """Raises InputError, too, if the last steps were all bad: there is no sense in going on."""
        self.state.lengths = self.log.lengths()
        self.state.optimizer_steps = self.optimizer_steps()
        if self.state.step == self.first_step:
            return 0.0
        if self.state.bad_steps >= BAD_STEPS:
            raise InputError(
                f"a loss or gradient was not finite in each of the last {self.state.bad_steps} "
                "steps: see bad_prompts in metrics.jsonl, and try a lower --lr"
            )
        if not self._due():
            return 0.0
        began = time.perf_counter()
        self.save()
        self.saved_at = time.perf_counter()
        self.took = self.saved_at - began
        return self.took

    def save(self) -> None:
        """Saves the state, unless it is saved already. Raises InputError on all ranks."""
        step = self.state.step
        if self.saved_step == step:
            return
        self.failed_step = step
        save(self.log.run, self.policy, self.optimizer, self.state)
        self.saved_step = step
        self.failed_step = None

    def optimizer_steps(self) -> int:
        """How many the policy has taken."""
        return max((int(moments["step"]) for moments in self.optimizer.state.values()), default=0)

    @contextlib.contextmanager
    def saving_what_can_be(self, write_policy: Callable):
        """An InputError or a signal within ends the program, on all ranks. What can be saved is
        saved, and the message says how to go on."""
        try:
            yield
        except InputError as error:
            how = self._give_up(write_policy)
            if RANK > 0:  # one sentence is enough
                sys.exit(1)
            raise InputError(f"{error}; {how}") from error
        except Stop as stop:
            how = self._give_up()
            if RANK == 0:
                print(f"\n{stop}; {how}", file=sys.stderr, flush=True)
            sys.exit(stop.code)

    def _due(self) -> bool:
        if self.every != "auto":
            every = int(self.every)
            return every > 0 and self.state.step % every == 0
        wait = FIRST_SAVE
        if self.took:
            wait = 100 * self.took  # so that saving takes 1% of the time
        due, *_ = gather([time.perf_counter() - self.saved_at >= wait])  # by rank 0's clock
        return due

    def _give_up(self, write_policy: Callable | None = None) -> str:
        """Saves the state, and the policy by itself. Returns how to go on."""
        run, step = self.log.run, self.state.step
        resume = f"python train.py --resume {run}"
        trouble = ""
        # Has the policy taken optimizer steps since the last whole step? Then it cannot be saved.
        within_a_step = self.optimizer_steps() != self.state.optimizer_steps
        if not within_a_step and self.failed_step != step:
            try:
                self.save()
                if write_policy is None:
                    return f"to go on from step {step}: {resume}"
                write_policy(run / "checkpoint")
                return (
                    f"the policy as it was then is in {run}/checkpoint; "
                    f"to go on from step {step}: {resume}"
                )
            except InputError as error:
                trouble = f"{error}; "
        if newest := latest(run):
            return f"{trouble}{newest} is whole, to go on from it: {resume}"
        return f"{trouble}no checkpoint is there yet"


# On disk


def tensors(policy, optimizer) -> dict[str, Tensor]:
    """{name: what is saved of the policy and of AdamW}."""
    if isinstance(policy, FSDPModule):
        policy.reshard()  # a broken-off update may have left embeddings and head gathered
    make_moments(optimizer)
    saved = {}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:  # the model that LoRA begins with
            continue
        moments = optimizer.state[parameter]
        saved[f"policy.{name}"] = parameter.detach()
        saved[f"exp_avg.{name}"] = moments["exp_avg"]
        saved[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
    return saved


def make_moments(optimizer) -> None:
    """AdamW's moments, as its first step would make them, unless it has them already."""
    (trained,) = optimizer.param_groups
    for parameter in trained["params"]:
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), device=parameter.device)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)


def save(run: Path, policy, optimizer, state: State) -> None:
    """Writes runs/NAME/state/step-N, N being state.step, then deletes older ones. All ranks must
    call it. Raises InputError on all ranks if one fails; an older state is still there then."""
    path = run / "state" / f"step-{state.step}"
    part = path.with_name(path.name + ".part")
    content = tensors(policy, optimizer)

    def prepare() -> None:
        for left in run.glob("state/*.*"):  # of a run that was killed
            shutil.rmtree(left)
        part.mkdir(parents=True)

    try:
        on_rank_0(prepare)
        _write_tensors(content, part)
        # On a node that does not share runs/ the writer makes the directory, without a word. Files
        # written there would be lost.
        seen = set().union(*gather([[file.name for file in part.glob("*")]]))
        on_rank_0(lambda: _complete(run, path, part, state, seen))
    except (OSError, CheckpointException) as error:
        if RANK == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"{path} could not be saved: {_reason(error)}") from error


def read(path: Path) -> State:
    """What state.json holds, once all files of the state are known to be whole. Raises
    InputError."""
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
    """Fills the policy and AdamW from disk. Returns the state. Raises InputError on all ranks."""
    state = read(path)
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        dcp.load(tensors(policy, optimizer), no_dist=WORLD == 1, storage_reader=reader)
    except CheckpointException as error:
        raise InputError(f"{path} is no checkpoint of this model: {_reason(error)}") from error
    for moments in optimizer.state.values():
        moments["step"].fill_(state.optimizer_steps)
    return state


def _write_tensors(content: dict[str, Tensor], part: Path) -> None:
    # A file for each kind: the writer makes each file in memory first.
    files = {name: 1 + KINDS.index(name.partition(".")[0]) for name in content}
    dcp.save(
        content,
        no_dist=WORLD == 1,
        # What several ranks hold, the lowest saves: with replicas on several nodes, the first node.
        planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
        storage_writer=dcp.HuggingFaceStorageWriter(str(part), files, save_distributed=True),
    )


def _complete(run: Path, path: Path, part: Path, state: State, seen: set[str]) -> None:
    """Adds state.json, and puts the state in its place. seen: the files that any rank sees."""
    sizes = {file.name: file.stat().st_size for file in part.iterdir()}
    if lost := sorted(seen - sizes.keys()):
        raise OSError(
            f"{lost[0]} of another rank is not in {part}: "
            "runs/ must be on a file system that all share"
        )
    for name in LOGS:
        if (run / name).exists():
            sync(run / name)
    write_json(part / "state.json", {**asdict(state), "world_size": WORLD, "files": sizes})
    publish(part, path)
    for older in run.glob("state/step-*"):
        if older != path:
            retire(older)


def _reason(error: BaseException) -> str:
    """One line; of a failure on several ranks, the first rank's."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return (str(error).strip() or type(error).__name__).splitlines()[0]
