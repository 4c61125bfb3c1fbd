"""The state of a run, saved while it trains: whole or absent, and loaded by any number of ranks.

runs/NAME/state/step-N/ holds the policy and AdamW's moments after N steps, sharded, as safetensors, and state.json: all
else that the next step depends on. Nothing in it is a pickle. What a step draws at random follows from (seed, step), so
no generator's state is kept.
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.fsdp import FSDPModule

import policy as policies
from files import LOGS, latest, publish, retire, sync, write_json
from rewards import InputError
from rollout import RANK, WORLD, gather, on_rank_0

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on one rank, as asked for


def tensors(policy, optimizer) -> dict[str, Tensor]:
    """Name -> what is saved of the policy and of AdamW, whose moments are made here where it has none yet, as it would
    make them itself."""
    if isinstance(policy, FSDPModule):
        policy.reshard()  # an update that was broken off may have left embeddings and head gathered
    out = {}
    for name, parameter in policy.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state |= {"step": torch.zeros((), device=parameter.device), "exp_avg": torch.zeros_like(parameter),
                      "exp_avg_sq": torch.zeros_like(parameter)}
        out |= {f"policy.{name}": parameter.detach(), f"exp_avg.{name}": state["exp_avg"],
                f"exp_avg_sq.{name}": state["exp_avg_sq"]}
    return out


def _reason(error: BaseException) -> str:
    """One line; of a failure on several ranks, the first rank's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save(run: Path, policy, optimizer, progress: dict, keep: int) -> None:
    """runs/NAME/state/step-N, N being progress["step"]; then all but the newest `keep` are deleted. All ranks must call
    it. Raises InputError on all of them if one fails; older checkpoints are still there then."""
    path = run / "state" / f"step-{progress['step']}"
    part = path.with_name(path.name + ".part")
    content = tensors(policy, optimizer)

    def prepare() -> None:
        for left in run.glob("state/*.*"):  # of a run that was killed
            shutil.rmtree(left)
        part.mkdir(parents=True)

    def finish(seen: set[str]) -> None:
        if lost := sorted(seen - {file.name for file in part.iterdir()}):
            raise OSError(f"{lost[0]} of another rank is not in {part}: runs/ must be on a file system that all share")
        for name in LOGS:
            if (run / name).exists():
                sync(run / name)
        steps = {int(state["step"]) for state in optimizer.state.values()}
        write_json(part / "state.json", {**progress, "optimizer_steps": max(steps), "world_size": WORLD,
                                         "files": {file.name: file.stat().st_size for file in part.iterdir()}})
        publish(part, path)
        others = sorted(run.glob("state/step-*"), key=lambda old: int(old.name[5:]))
        for old in others[:-keep]:
            retire(old)

    # A file for each kind, since each is made in memory first. What several ranks have the lowest one saves: with
    # replicas on several nodes those of the first node.
    kinds = {name: ("policy", "exp_avg", "exp_avg_sq").index(name.partition(".")[0]) + 1 for name in content}
    try:
        on_rank_0(prepare)
        # HuggingFaceStorageWriter makes a missing directory in silence: a rank with another one would lose its shards.
        dcp.save(content, no_dist=WORLD == 1, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                 storage_writer=dcp.HuggingFaceStorageWriter(str(part), kinds, save_distributed=True))
        seen = {file.name for names in gather([[*part.glob("*")]]) for file in names}  # by any rank
        on_rank_0(lambda: finish(seen))
    except (OSError, CheckpointException) as error:
        if RANK == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"{path} could not be saved: {_reason(error)}") from error


def read(path: Path) -> dict:
    """A checkpoint's state.json, once all of its files are known to be there. Raises InputError."""
    try:
        state = json.loads((path / "state.json").read_text())
        sizes = {name: (path / name).stat().st_size for name in state["files"]}
        wrong = [f"{name} has {sizes[name]} of {size} bytes" for name, size in state["files"].items()
                 if sizes[name] != size]
    except (OSError, ValueError, LookupError, TypeError) as error:
        wrong = [_reason(error)]
    if wrong:
        raise InputError(f"{path} is damaged ({wrong[0]}): delete it to go on from an older one, if there is one")
    return state


def load(path: Path, policy, optimizer) -> dict:
    """Fills the policy and AdamW from a checkpoint. Returns its state.json. Raises InputError on all ranks."""
    state, content = read(path), tensors(policy, optimizer)
    try:
        dcp.load(content, no_dist=WORLD == 1, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except CheckpointException as error:
        raise InputError(f"{path} is no checkpoint of this model: {_reason(error)}") from error
    for moments in optimizer.state.values():
        moments["step"].fill_(state["optimizer_steps"])
    return state


def save_state(args: argparse.Namespace, run: Path, policy, optimizer, progress: dict) -> None:
    """Where the run is, unless that was saved. Raises InputError on all ranks; it is not tried a second time."""
    step = progress["step"]
    if step in (None, progress["saved"]):
        return
    progress["step"] = None
    save(run, policy, optimizer, progress | {"step": step, "saved": step}, args.keep)
    progress |= {"step": step, "saved": step}


def give_up(args: argparse.Namespace, run: Path, policy, optimizer, progress: dict, tokenizer, dtype) -> str:
    """Save what can be saved of a run that ends before its time; with a tokenizer, the policy by itself, too. Returns
    how to go on. All ranks must call it."""
    trouble = ""
    try:
        save_state(args, run, policy, optimizer, progress)
        if progress["step"] is not None:
            if tokenizer:
                policies.save(policy, tokenizer, run / "checkpoint", dtype)
                trouble = f"the policy as it was then is in {run}/checkpoint; "
            return f"{trouble}to go on from step {progress['step']}: python train.py --resume {run}"
    except InputError as error:
        trouble = f"{error}; "
    last = latest(run)
    return trouble + (f"{last} is whole, to go on from it: python train.py --resume {run}" if last else
                      "no checkpoint is there yet")
