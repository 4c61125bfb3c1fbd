"""Kills training runs at random moments, resumes them, and compares them with one left alone:

    python tests/kill_and_resume.py --kills 20                    # transformers' generate, one rank
    python tests/kill_and_resume.py --kills 5 --engine vllm
    python tests/kill_and_resume.py --kills 5 --ranks 2           # torchrun starts all again

metrics.jsonl except its times, samples.jsonl and the final weights must be the same, bit by bit.
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


# Random text differs in both rewards; with chance, one is drawn at random. Ranks note their pids.
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
    if not {chance}:
        return [len(text) / 100 for text in responses]
    return [random.random() + np.random.rand() + torch.rand(()).item() for _ in responses]

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
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
    args = ["--model", models.tiny(), "--task", "noisy.py", "--name", name]
    args += "--prompts 2 --group 4 --lr 1e-3 --warmup 0 --eval-prompts 4".split()
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
    metrics = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        metrics.append({key: line[key] for key in line if key not in TIMES})
    weights = run / "checkpoint/model.safetensors"
    return metrics, (run / "samples.jsonl").read_bytes(), weights.read_bytes()


def differences(a: Path, b: Path) -> list[str]:
    both = zip(("metrics", "samples", "weights"), results(a), results(b), strict=True)
    return [name for name, of_a, of_b in both if of_a != of_b]


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
    """Kills a run once, at a random time or while it saves, and resumes it. Returns what it did."""
    name, run = f"k{number}", cwd / "runs" / f"k{number}"
    process = start(name, cwd, ranks, *options, restarts=1)
    wait((run / "metrics.jsonl").exists, process)
    if number % 2:
        nth = rng.randint(1, saves)
        moment = f"while saving for the {nth}th time"
        for i in range(nth):
            wait(lambda: [*run.glob("state/*.part")], process)
            if i + 1 < nth:
                wait(lambda: not [*run.glob("state/*.part")], process)
        time.sleep(rng.uniform(0, 0.03))
    else:
        after = rng.uniform(0, seconds)
        time.sleep(after)
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
            well = "badly" if code else "well"
            moment += f", all ended {well} {time.monotonic() - began:.1f} s later"
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
    parser.add_argument("--lora", type=int, default=0, help="rank (default: all weights)")
    args = parser.parse_args(argv)
    rng, began = random.Random(args.seed), time.monotonic()
    differ = 0
    options = ["--engine", args.engine, "--steps", args.steps, "--lora", args.lora]
    options += "--max-tokens 24 --eval-every 2 --updates 2 --save-every 1 --resume auto".split()
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        process = start("alone", cwd, args.ranks, *options)
        wait((cwd / "runs/alone/metrics.jsonl").exists, process)
        first_line = time.monotonic()
        finish(process, cwd / "alone.log")
        seconds = time.monotonic() - first_line
        print(f"left alone: {time.monotonic() - began:.1f} s", flush=True)
        for number in range(1, args.kills + 1):
            moment = trial(number, cwd, args.ranks, seconds, args.steps, rng, options)
            wrong = differences(cwd / "runs/alone", cwd / "runs" / f"k{number}")
            differ += bool(wrong)
            outcome = f"DIFFERENT {' '.join(wrong)}" if wrong else "identical"
            print(f"{number}: killed {moment}: {outcome}", flush=True)
    print(
        f"{args.kills - differ} of {args.kills} identical, {args.engine}, {args.ranks} ranks, "
        f"{time.monotonic() - began:.0f} s"
    )
    return differ


if __name__ == "__main__":
    sys.exit(main())
