"""What the method is for, in ten minutes: rvpo and gdpo on the task `reply`, all else equal.

    python study/demo.py --name demo   # writes runs/demo-rvpo, runs/demo-gdpo, demo.html, demo.png
    python study/demo.py --picture     # draws docs/demo.png from study/demo.jsonl, trains nothing

A reply must not exceed 35 words, which the model keeps to at first. Four of the five other rewards
grow with length. Other options are train.py's. It ends with what both write, and with a report for
the browser. The curves go to runs/demo.jsonl, too, and study/demo.jsonl is such a file.
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
    parser.add_argument("--picture", action="store_true", help="only draw docs/demo.png")
    OPTIONS, REST = parser.parse_known_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import importlib.util
import json
import math
import os
import subprocess
import time
from types import SimpleNamespace

from infra.terminal import Pace, rates
from local.machine import cores
from tasks import reply
from tools import report, style
from tools import runs as reading
from tools import show as tools_show

ROOT = Path(__file__).parent.parent
KEPT = Path(__file__).with_suffix(".jsonl")
BETA = {"rvpo": ["--beta", "2"], "gdpo": []}  # by method


def main(name: str, steps: int, rest: list[str]) -> None:
    """Trains both, and says what became of the limit. rest: options of train.py."""
    runs = {method: Path("runs") / f"{name}-{method}" for method in BETA}
    out = Path("runs") / f"{name}.png"
    taken = [path for path in (*runs.values(), out) if path.exists()]
    if taken:
        sys.exit(f"error: {taken[0]} exists: choose another --name, or delete it")
    out.parent.mkdir(exist_ok=True)
    if importlib.util.find_spec("vllm") is None:
        print(
            "vLLM is not installed: transformers samples (--engine hf), which is slower", flush=True
        )
    introduce()
    train(runs, steps, rest)
    curves = {}
    for method, run in runs.items():
        curves[method] = [means(line) for line in read(run)]
    print(f"\n{table(curves)}\n")
    print("Held-out prompts, one sample each at temperature 1, with standard errors.\n")
    compared = [reading.read(run) for run in runs.values()]
    show_samples(compared)
    write(curves, out.with_suffix(".jsonl"))
    picture(curves, out)
    print(f"\n{out}; " + ", ".join(map(str, runs.values())))
    print(report.write(compared, out.with_suffix(".html")))


# The runs


def introduce() -> None:
    print(
        "SmolLM2-135M answers customers. Two runs at a time: rvpo, the soft minimum of the rewards"
    )
    print("with beta 2, and gdpo, their mean. All else is the same. The rewards:")
    task = reply.task(SimpleNamespace(task="reply"))
    for channel in task.channels(None):
        print(f"  {channel.name:10} {channel.help}")
    print("The model is loaded, and evaluated before the first step: a minute or two.", flush=True)


def train(runs: dict[str, Path], steps: int, rest: list[str]) -> None:
    """Both at a time, each on half of the cores. Shows each step. rest: options of train.py."""
    every = max(1, steps // 4)
    options = ["--steps", str(steps), "--eval-every", str(every), *rest]
    processes = {method: start(method, run, options) for method, run in runs.items()}
    evaluated = {*range(0, steps, every), steps}
    paces = {method: Pace(steps, evaluated) for method in runs}
    shown = dict.fromkeys(runs, 0)  # lines of each
    running = True
    while running:
        time.sleep(1)
        running = any(process.poll() is None for process in processes.values())
        for method, run in runs.items():
            lines = read(run)
            for line in lines[shown[method] :]:
                show(method, means(line), paces[method])
            shown[method] = len(lines)
        for method, process in processes.items():
            if process.poll():
                for other in processes.values():
                    other.kill()
                *_, last = runs[method].with_suffix(".log").read_text().strip().splitlines()
                sys.exit(f"error: the run with {method} failed: {last}")


def start(method: str, run: Path, options: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "--task", "reply", "--agg", method]
    command += [*BETA[method], "--name", run.name, *options]
    threads = str(max(1, cores() // len(BETA)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    with run.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def read(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """What a run has logged so far. A line that is being written is left out."""
    file = run / name
    text = file.read_text() if file.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def means(line: dict) -> dict:
    """Of a line of metrics.jsonl, what is shown: {"step": N, "eval" or "train": {channel: mean}}.

    An evaluation has (mean, standard error) for each."""
    if "eval" in line:
        return {"step": line["step"], "eval": line["eval"]}
    channels = {name: channel["mean"] for name, channel in line["channels"].items()}
    return {"step": line["step"], "train": channels | {"joint": line["joint"]}}


def show(method: str, line: dict, pace: Pace) -> None:
    """A line, as train.py has it, and how long this run will go on."""
    if "eval" in line:
        pace.evaluation()
        what, shares = "held out", {name: mean for name, (mean, _) in line["eval"].items()}
    else:
        pace.step()
        what, shares = "step", dict(line["train"])
    joint = shares.pop("joint")
    step = f"{line['step']:2}/{pace.steps}"
    left = f" | {pace.left(line['step'])}" if what == "step" else ""
    print(f"{method} {what:8} {step}  {rates(joint, shares)}{left}", flush=True)


def show_samples(compared: list[reading.Run]) -> None:
    """Three prompts of the last step, with the best and the worst reply of each run."""
    sampled = [(run, reading.groups_of(run, run.batches[-1])) for run in compared]
    _, groups = sampled[0]
    for group in groups[:3]:
        print(tools_show.of_prompt(group, sampled))


# What became of them. curves: {method: what `means` makes of its lines}

Curves = dict[str, list[dict]]


def table(curves: Curves) -> str:
    """Held out, at first, at the best joint rate, and at the end."""
    columns = {}
    for method, lines in curves.items():
        evals = [line["eval"] for line in lines if "eval" in line]
        columns["at first"] = evals[0]
        columns[f"{method}, best"] = max(evals, key=lambda means: means["joint"][0])
        columns[f"{method}, end"] = evals[-1]
    rows = [f"{'held out':>10}" + "".join(f"{name:>16}" for name in columns)]
    for channel in columns["at first"]:
        row = f"{channel:>10}"
        for column in columns.values():
            mean, error = (math.nan if value is None else value for value in column[channel])
            row += f"{mean:>8.3f} ({error:.3f})"
        rows.append(row)
    return "\n".join(rows)


def write(curves: Curves, file: Path) -> None:
    """A line each step and evaluation, with its method."""
    with file.open("w") as out:
        for method, lines in curves.items():
            for line in lines:
                out.write(json.dumps({"method": method, **line}) + "\n")


def read_curves(file: Path) -> Curves:
    """What `write` wrote."""
    if not file.exists():
        sys.exit(f"error: {file} is not there: run the demo, and copy its runs/NAME.jsonl there")
    curves: Curves = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        curves.setdefault(line.pop("method"), []).append(line)
    return curves


PANELS = {
    "short": "gdpo gives the limit of 35 words up,\nrvpo holds it longer",
    "joint": "replies that satisfy\nall six rewards",
}


def picture(curves: Curves, out: Path) -> None:
    """Lines are the sampled batches of training; points with bars are held-out prompts."""
    figure, axes = style.panels(1, 2, 3.2, sharex=True, sharey=True)
    ends = []
    for axis, (channel, title) in zip(axes, PANELS.items(), strict=True):
        ends.append((axis, draw(axis, curves, channel)))
        style.describe(axis, title, "step")
    axes[0].set(ylabel="share of replies", ylim=(-0.03, 1.03))
    style.save(figure, out, ends)


def draw(axis, curves: Curves, channel: str) -> style.Ends:
    ends = {}
    for method, lines in curves.items():
        steps = [line["step"] for line in lines if "train" in line]
        shares = [line["train"][channel] for line in lines if "train" in line]
        style.draw_line(axis, steps, shares, method)
        ends[method] = shares[-1]
        for line in lines:
            if "eval" in line:
                mean, error = line["eval"][channel]
                axis.errorbar(line["step"], mean, error or 0, fmt="o", color=style.color(method))
    return steps[-1], ends


if __name__ == "__main__":
    if OPTIONS.picture:
        picture(read_curves(KEPT), ROOT / "docs" / "demo.png")
    else:
        main(OPTIONS.name, OPTIONS.steps, REST)
