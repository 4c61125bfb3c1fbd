"""The files of a run: its directory, logs that are appended to, and all else whole or absent."""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path

from rewards import InputError
from rollout import RANK, gather, join_ranks, on_rank_0

LOGS = "metrics.jsonl", "samples.jsonl"


def sync(path: Path) -> None:
    """On the disk: a name that outlives a power cut must not stand for a file that does not."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


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
    path.rename(gone := path.with_name(path.name + ".old"))
    shutil.rmtree(gone)


def write_json(file: Path, content: dict) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    publish(part, file)


def lengths(run: Path) -> dict[str, int]:
    """Bytes of the run's logs."""
    return {name: (run / name).stat().st_size if (run / name).exists() else 0 for name in LOGS}


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return max((path for path in run.glob("state/step-*") if path.name[5:].isdigit()),
               key=lambda path: int(path.name[5:]), default=None)


def finished(run: Path) -> bool:
    """All of its steps are done, and its policy is there. Its state is deleted last."""
    try:
        steps = json.loads((run / "config.json").read_text())["steps"]
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, LookupError):
        return False
    return "eval" in last and last["step"] == steps and (run / "checkpoint").is_dir() and latest(run) is None


@contextlib.contextmanager
def make_run(name: str, again: bool = False):
    """The new folder runs/name, made before anything is loaded; removed if an error comes before it has a file. again:
    it may be that of a run that was killed before its first checkpoint."""
    join_ranks()  # a default name holds the time, of which each rank has another one: rank 0's counts
    run, problem = Path("runs") / gather([name])[0], None
    if RANK == 0:
        try:
            run.mkdir(parents=True, exist_ok=again)
            if any(run.iterdir()) and not (run / "config.json").exists():
                problem = f"{run} holds something else than a run: choose another --name"
        except FileExistsError:
            problem = f"{run} exists: choose another --name, or delete it"
        except OSError as error:
            problem = f"{run} cannot be made: {error}"
    problem = gather([problem])[0]
    if problem:
        raise InputError(problem)
    try:
        yield run
    except BaseException:  # Ctrl-C, too
        if RANK == 0 and not any(run.iterdir()):
            run.rmdir()
        raise


def write(file: Path, *records: dict) -> None:
    """Append JSON lines, on rank 0. NaN and infinity, which are no JSON, become null. All ranks must call it. Raises
    InputError on all of them if it cannot be written."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def append() -> None:
        with file.open("a") as out:
            out.writelines(json.dumps(plain(record)) + "\n" for record in records)

    try:
        on_rank_0(append)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error}") from error


def truncate(run: Path, sizes: dict[str, int]) -> None:
    """Cut the logs back to what they were at a checkpoint, on rank 0."""
    for name in LOGS:
        file, size = run / name, sizes.get(name, 0)
        there = file.stat().st_size if file.exists() else 0
        if there < size:
            raise OSError(f"{name} has {there} bytes, at the checkpoint it had {size}: it was changed since")
        if there > size:
            os.truncate(file, size)
