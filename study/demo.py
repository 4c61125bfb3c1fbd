"""What the method is for, in ten minutes: rvpo and gdpo on the task `reply`, all else equal.

    python study/demo.py --name demo  # runs/demo-rvpo, runs/demo-gdpo, runs/demo.png; the rest is train.py's

A reply must not exceed 35 words, which the model keeps to at first; four of the five others grow with length.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before matplotlib is imported: --help must not wait for it
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="demo", help="of the runs (default %(default)s)")
    parser.add_argument("--steps", type=int, default=14, help="(default %(default)s)")
    OPTIONS, REST = parser.parse_known_args()

import importlib.util
import json
import math
import os
import subprocess
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a script sees its own folder only

from local.machine import cores  # noqa: E402

METHODS, SHOWN = ("rvpo", "gdpo"), ("short", "joint")
BETA = {"rvpo": ["--beta", "2"], "gdpo": []}


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """What a run has logged so far."""
    file = run / name
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def train(runs: dict[str, Path], options: list[str]) -> None:
    """Both at a time, each on half of the cores; shows each step."""
    threads = max(1, cores() // len(runs))
    processes = {}
    for method, run in runs.items():
        with run.with_suffix(".log").open("w") as log:
            command = [
                sys.executable,
                str(ROOT / "train.py"),
                "--task",
                "reply",
                "--agg",
                method,
                *BETA[method],
                "--name",
                run.name,
                *options,
            ]
            processes[method] = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
    seen = dict.fromkeys(runs, 0)
    running = True
    while running:
        time.sleep(1)
        running = any(process.poll() is None for process in processes.values())
        for method, run in runs.items():
            for line in lines(run)[seen[method] :]:
                means = (
                    line["eval"]
                    if "eval" in line
                    else {
                        **{c: [x["mean"]] for c, x in line["channels"].items()},
                        "joint": [line["joint"]],
                    }
                )
                print(
                    f"{method} {'held out after' if 'eval' in line else 'step'} {line['step']:2}: "
                    + " ".join(f"{name} {mean[0]:.2f}" for name, mean in means.items()),
                    flush=True,
                )
                seen[method] += 1
        if failed := [method for method, process in processes.items() if process.poll()]:
            for process in processes.values():
                process.kill()
            last = runs[failed[0]].with_suffix(".log").read_text().strip().splitlines()[-1]
            sys.exit(f"error: the run with {failed[0]} failed: {last}")


def picture(runs: dict[str, Path], out: Path) -> None:
    figure, axes = plt.subplots(
        1, 2, figsize=(8, 3), sharex=True, sharey=True, layout="constrained"
    )
    for color, (method, run) in enumerate(runs.items()):
        logged = lines(run)
        steps, evals = [x for x in logged if "channels" in x], [x for x in logged if "eval" in x]
        for axis, name in zip(axes, SHOWN, strict=True):
            values = [x["joint"] if name == "joint" else x["channels"][name]["mean"] for x in steps]
            axis.plot([x["step"] for x in steps], values, color=f"C{color}", label=method)
            mean, error = zip(*[x["eval"][name] for x in evals], strict=True)
            axis.errorbar(
                [x["step"] for x in evals],
                mean,
                [e or 0 for e in error],
                fmt="o",
                color=f"C{color}",
            )
    axes[0].set(
        title="the constraint: at most 35 words",
        ylabel="share of replies",
        xlabel="step",
        ylim=(-0.03, 1.03),
    )
    axes[1].set(title="joint: all six channels satisfied", xlabel="step")
    axes[0].legend()
    figure.savefig(out, dpi=120)


def table(runs: dict[str, Path]) -> str:
    """Held out, at first, at the best joint rate, and at the end."""
    columns = {}
    for method, run in runs.items():
        evals = [x["eval"] for x in lines(run) if "eval" in x]
        columns |= {
            "at first": evals[0],
            f"{method}, best": max(evals, key=lambda x: x["joint"][0]),
            f"{method}, end": evals[-1],
        }
    rows = [f"{'held out':>10}" + "".join(f"{name:>16}" for name in columns)]
    for channel in columns["at first"]:
        cells = [
            (math.nan if x is None else x for x in column[channel]) for column in columns.values()
        ]
        rows.append(f"{channel:>10}" + "".join("{:>8.3f} ({:.3f})".format(*cell) for cell in cells))
    return "\n".join(rows)


def main(name: str, steps: int, rest: list[str]) -> None:
    runs = {method: Path("runs") / f"{name}-{method}" for method in METHODS}
    out = Path("runs") / f"{name}.png"
    if taken := [path for path in (*runs.values(), out) if path.exists()]:
        sys.exit(f"error: {taken[0]} exists: choose another --name, or delete it")
    out.parent.mkdir(exist_ok=True)
    if importlib.util.find_spec("vllm") is None:
        print(
            "vLLM is not installed: transformers samples (--engine hf), which is slower", flush=True
        )
    train(runs, ["--steps", str(steps), "--eval-every", str(max(1, steps // 4)), *rest])
    print(f"\n{table(runs)}")
    for i, (method, run) in enumerate(runs.items()):
        sample = next(x for x in lines(run, "samples.jsonl") if x["step"] == steps)
        if i == 0:
            print(f"\nA customer in the last step: {sample['prompt'][-1]['content']}")
        print(f"\n{method} ({len(sample['response'].split())} words): {sample['response']}")
    picture(runs, out)
    print(f"\n{out}; " + ", ".join(map(str, runs.values())))


if __name__ == "__main__":
    main(OPTIONS.name, OPTIONS.steps, REST)
