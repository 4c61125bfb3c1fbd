"""Kills training runs at random moments, saving included, resumes them, and compares them with one left alone:

    python tests/kill_and_resume.py --kills 20                    # transformers' generate, one rank
    python tests/kill_and_resume.py --kills 5 --engine vllm
    python tests/kill_and_resume.py --kills 5 --ranks 2           # kills one rank; torchrun starts all again

All must be the same but times: metrics.jsonl, samples.jsonl and the final weights, bit by bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "tokens_per_second"}


# Rewards on which random text differs, one of them drawn at random if there is to be chance; every rank notes its process.
TASK = """
import os, random
from pathlib import Path
import numpy as np
from infra import ranks
from rewards import Channel, Task
from tasks import tools

Path(f"pid-{{ranks.RANK}}").write_text(str(os.getpid()))

def noise(prompts, responses, references):
    import torch
    return [random.random() + np.random.rand() + torch.rand(()).item() if {chance} else len(r) / 100 for r in responses]

def vowels(prompts, responses, references):
    return [sum(c in "aeiou" for c in r) / max(1, len(r)) for r in responses]

def task(options):
    return Task(tools.prompts, [Channel("vowels", vowels), Channel("noise", noise)])
"""


def start(
    name: str, cwd: Path, ranks: int, *options, restarts: int = 0, chance: bool = True
) -> subprocess.Popen:
    sys.path.insert(0, str(ROOT))
    from local import models

    (cwd / "noisy.py").write_text(TASK.format(chance=chance))
    launcher = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            f"--max-restarts={restarts}",
        ]
    )
    args = [
        "--model",
        models.tiny(),
        "--task",
        "noisy.py",
        "--name",
        name,
        "--prompts",
        2,
        "--group",
        4,
        "--lr",
        1e-3,
        "--warmup",
        0,
        "--eval-prompts",
        4,
    ]
    with (cwd / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            [*launcher, ROOT / "train.py", *map(str, [*args, *options])],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait(timeout=600):
        sys.exit(f"the run ended with {process.returncode}:\n{log.read_text()[-3000:]}")


def results(run: Path) -> tuple[list, bytes, bytes]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (
        [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        (run / "samples.jsonl").read_bytes(),
        (run / "checkpoint/model.safetensors").read_bytes(),
    )


def differences(a: Path, b: Path) -> list[str]:
    return [
        name
        for name, x, y in zip(
            ("metrics", "samples", "weights"), results(a), results(b), strict=True
        )
        if x != y
    ]


def wait(condition, process: subprocess.Popen) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def trial(
    number: int,
    cwd: Path,
    ranks: int,
    seconds: float,
    saves: int,
    rng: random.Random,
    options: list,
) -> str:
    """One run, killed once, at a random time or while it saves, and resumed. Returns what was done."""
    name, run = f"k{number}", cwd / "runs" / f"k{number}"
    process = start(name, cwd, ranks, *options, restarts=1)
    wait((run / "metrics.jsonl").exists, process)
    if number % 2:
        moment = f"while saving for the {(nth := rng.randint(1, saves))}th time"
        for i in range(nth):
            wait(lambda: [*run.glob("state/*.part")], process)
            if i + 1 < nth:
                wait(lambda: not [*run.glob("state/*.part")], process)
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(after := rng.uniform(0, seconds))
        moment = f"{after:.2f} s after its first line"
    ended = process.poll() is not None
    if not ended:
        victim = rng.randrange(ranks)
        there = sorted(path.name for path in run.glob("state/*")) or ["no checkpoint"]
        os.kill(int((cwd / f"pid-{victim}").read_text()), signal.SIGKILL)
        began = time.monotonic()
        code = process.wait(timeout=600)
        moment += f" (rank {victim}; {' '.join(there)})"
        if ranks > 1:
            moment += f", all ended {'well' if code == 0 else 'badly'} {time.monotonic() - began:.1f} s later"
        else:
            code = 1
        if code:
            finish(start(name, cwd, ranks, *options), cwd / f"{name}.log")
    return moment + (" - it had ended before" if ended else "")


def main(argv: list[str] | None = None) -> int:
    """Returns how many runs differed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--engine", default="hf")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, differ, began = random.Random(args.seed), 0, time.monotonic()
    options = [
        "--engine",
        args.engine,
        "--steps",
        args.steps,
        "--max-tokens",
        24,
        "--eval-every",
        2,
        "--updates",
        2,
        "--save-every",
        1,
        "--resume",
        "auto",
    ]
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        process = start("alone", cwd, args.ranks, *options)
        wait((cwd / "runs/alone/metrics.jsonl").exists, process)
        at = time.monotonic()
        finish(process, cwd / "alone.log")
        seconds = time.monotonic() - at
        print(f"left alone: {time.monotonic() - began:.1f} s", flush=True)
        for number in range(1, args.kills + 1):
            moment = trial(number, cwd, args.ranks, seconds, args.steps, rng, options)
            wrong = differences(cwd / "runs/alone", cwd / "runs" / f"k{number}")
            differ += bool(wrong)
            print(
                f"{number}: killed {moment}: {'DIFFERENT ' + ' '.join(wrong) if wrong else 'identical'}",
                flush=True,
            )
    print(
        f"{args.kills - differ} of {args.kills} identical, {args.engine}, {args.ranks} ranks, {time.monotonic() - began:.0f} s"
    )
    return differ


if __name__ == "__main__":
    sys.exit(main())
