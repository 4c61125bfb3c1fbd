"""Opens the directory of a run, a new one or one that goes on, and closes it in the end.

A run goes on only if its numbers will be those of a run that was never stopped: with the same
options, prompts and tokens. What is on disk for that, and when it is saved, is in state.py.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from config import TrainConfig, option
from infra import state
from infra.log import RunLog
from infra.ranks import RANK, WORLD, InputError, gather
from infra.run_directory import evaluations, finished, latest, make_run, retire, versions
from infra.state import State
from rewards import digest

# Options that a resumed run may be given anew, since its numbers do not depend on them.
MAY_CHANGE = {
    # which run
    "name",
    "resume",
    # where its data are: what they are is compared by itself
    "data",
    "eval_data",
    # the judge's endpoint
    "judge_url",
    "judge_cache",
    "judge_concurrency",
    "judge_timeout",
    "judge_max_missing",
    # memory and speed
    "tokens_per_microbatch",
    "gradient_checkpointing",
    "gpu_memory",
    # how often it is evaluated and saved, and where it is logged
    "eval_every",
    "keep_policies",
    "save_every",
    "track",
}


@contextlib.contextmanager
def open_run(options: dict, given: set[str]) -> Iterator[tuple[Path, dict, State]]:
    """The run that options["resume"] names, or a new one, before anything is loaded.

    given: names of the options that the command line had. Yields the run's directory, its options
    and its state. Ends the program if the run is finished. Raises InputError.
    """
    if (tracker := options["track"]) and importlib.util.find_spec(tracker) is None:
        raise InputError(f"--track {tracker}: it is not installed; pip install {tracker}")
    run = find_run(options["resume"], options["name"])
    if not _same_on_all_ranks(run and (run, latest(run))):
        raise InputError(
            f"--resume {options['resume']}: not all ranks see the same checkpoint; runs/ must be "
            "on a file system that all nodes share"
        )
    if run is None:
        # With --resume auto a run that was killed before its first save begins anew.
        again = "config.json" if options["resume"] else None
        with make_run(options["name"] or default_name(options), again) as run:
            yield run, options, State()
        return
    saved = read_config(run, {name: value for name, value in options.items() if name in given})
    options = {name: saved.get(name, value) for name, value in options.items()}
    if finished(run):
        if RANK == 0:
            print(
                f"{run} is finished, with all of its {options['steps']} steps: "
                "nothing is left to do"
            )
        sys.exit()
    begun = state.read(latest(run))
    if RANK == 0:
        print(f"{run} goes on from step {begun.step} of {options['steps']}", flush=True)
    yield run, options, begun


def finish(log: RunLog, n_held_out: int, temperature: float) -> None:
    """Closes a run whose policy is saved: deletes its state, and prints its first and its last
    evaluation. Does nothing except on rank 0."""
    if RANK > 0:
        return
    run = log.run
    if log.tracker:
        log.tracker.finish()
    if (run / "state").exists():
        retire(run / "state")
    first, *_, last = [line["eval"] for line in evaluations(run)]
    print(f"\n{n_held_out} held-out prompts, one sample each at temperature {temperature:g}")
    print(f"{'':>20}  before         after          (standard error)")
    for name, before in first.items():
        if name in last:
            print(f"{name:>20}  {_cell(*before)}  {_cell(*last[name])}")
    print(f"\n{run}: metrics.jsonl, samples.jsonl, checkpoint/")


def find_run(resume: str | None, name: str | None) -> Path | None:
    """The run to go on with: the one that --resume names. `auto` means the run of --name, if it has
    a saved state or is finished. None: a new one is wanted. Raises InputError."""
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


def default_name(options: dict) -> str:
    """Of a run without --name: task, aggregation and the time."""
    return f"{Path(options['task']).stem}-{options['agg']}-{time.strftime('%m%d-%H%M%S')}"


def read_config(run: Path, given: dict) -> dict:
    """A run's config.json, with the given options in place of its own. Says what is different now.
    Raises InputError for an option that must not change."""
    try:
        saved = json.loads((run / "config.json").read_text())
        then = {"ranks": saved["world_size"], **saved["versions"]}
        saved["data_sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"--resume {run}: its config.json cannot be read ({error})") from error
    changed = {
        name: value
        for name, value in given.items()
        # An old run lacks options that came later: it had their defaults.
        if name not in ("name", "resume") and value != saved.get(name, default(name))
    }
    differences, refused = [], []
    for name, value in changed.items():
        line = f"{option(name)} {value}, the run has {saved.get(name, default(name))}"
        differences.append(line)
        if name not in MAY_CHANGE:
            refused.append(line)
    if refused:
        advice = f"--resume {run}: these options cannot be changed, leave them out:"
        raise InputError("\n".join([advice, *refused]))
    now = {"ranks": WORLD, **versions()}
    for name, value in then.items():
        if now.get(name) != value:
            differences.append(f"{name} {now.get(name)}, the run had {value}")
    if RANK == 0:
        print("".join(f"changed: {line}\n" for line in differences), end="")
    return {**saved, **changed, "resume": str(run)}


def default(name: str) -> object:
    return TrainConfig.model_fields[name].default


def check_data(run: Path, examples: list) -> str:
    """SHA-256 of all that is in the examples. Raises InputError if it differs between ranks, or
    from what it was when the run began."""
    sha256 = digest(examples)
    if not _same_on_all_ranks(sha256):
        raise InputError(
            "the ranks have different prompts: a task must make the same ones on all (seed what it "
            "draws, sort what comes from a set), and nodes must read the same files"
        )
    if _before(run, "data_sha256", sha256) != sha256:
        raise InputError(
            f"--resume {run}: its data are not what they were when it began (SHA-256 in "
            "config.json): bring them back, or begin a new run"
        )
    return sha256


def check_tokens(run: Path, prompts: list) -> str:
    """SHA-256 of the prompts' tokens. Raises InputError as check_data does."""
    tokens = json.dumps([prompt.ids for prompt in prompts])
    sha256 = hashlib.sha256(tokens.encode()).hexdigest()
    if not _same_on_all_ranks(sha256):
        raise InputError(
            "the ranks have different tokens of the same prompts: nodes must have the "
            "same tokenizer and chat template"
        )
    if _before(run, "tokens_sha256", sha256) != sha256:
        raise InputError(
            f"--resume {run}: the prompts' tokens are not what they were when it "
            "began (SHA-256 in config.json): bring the model's tokenizer and chat "
            "template back, or begin a new run"
        )
    return sha256


def _same_on_all_ranks(value) -> bool:
    return len(set(gather([value]))) == 1


def _before(run: Path, name: str, default: str) -> str:
    """What config.json recorded when a resumed run began. default: if the run is new, or its
    config.json is too old to have it."""
    if latest(run) is None:
        return default
    return json.loads((run / "config.json").read_text()).get(name, default)


def _cell(mean: float | None, error: float | None) -> str:
    """Of the table that `finish` prints."""
    if mean is None:
        return f"{'missing':13}"
    return f"{mean:.3f} ({math.nan if error is None else error:.3f})"
