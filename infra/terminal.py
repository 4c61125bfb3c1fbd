"""What the terminal shows of a run: method and channels, a line a step, the time that is left."""

import math
import time
from collections.abc import Iterable

from infra.ranks import RANK
from rewards import Channel

METHODS = {  # --agg: what it does with the rewards of a prompt's rollouts
    "rvpo": "z-scores each reward, and takes a soft minimum across rewards",
    "gdpo": "z-scores each reward, and takes the mean across rewards",
    "grpo": "sums the raw rewards, and z-scores the sum",
    "explicit": "z-scores each reward, and takes mean - beta * variance across rewards",
    "softmin": "takes a soft minimum of the raw rewards, and z-scores it",
    "hardmin": "z-scores each reward, and takes the least",
}
SHOWN = 12  # channels that are introduced: a rubric may have hundreds


def introduce(config, channels: Iterable[Channel]) -> None:
    """Says, on rank 0, what is trained on what, before the model is loaded."""
    if RANK > 0:
        return
    method = f"{config.agg} {METHODS[config.agg]}"
    if config.agg in ("rvpo", "explicit", "softmin"):
        start, _, end = config.beta.partition(":")
        method += f"; beta {start} to {end}" if end else f"; beta {start}"
        if config.beta == "0.5:2":
            method += ", the paper's schedule (docs/results.md says when to take another)"
    print(method)
    channels = list(channels)
    width = min(30, max(len(channel.name) for channel in channels))
    for channel in channels[:SHOWN]:
        logged = "" if channel.weight else " (weight 0: only logged)"
        text = "".join(filter(str.isprintable, channel.help))  # a criterion's may hold anything
        print(f"  {channel.name:{width}}  {text:.100}{logged}".rstrip())
    if len(channels) > SHOWN:
        print(f"  and {len(channels) - SHOWN} more")


def line_of_step(record: dict, head: str, left: str) -> str:
    """Of a step's record. head: which step it is. left: how long the run will go on, or ""."""
    channels = record["channels"]
    against = [
        f"works against {name} ({stats['credit']:.2f})"
        for name, stats in channels.items()
        if stats["credit"] < 0
    ]
    numbers = (
        f"grad {record['grad_norm']:.2f} entropy {record['entropy']:.2f}"
        f" length {record['length_mean']:.0f}"
    )
    seconds = [f"{phase} {t:.1f}s" for phase, t in record["seconds"].items() if t >= 0.05]
    means = {name: stats["mean"] for name, stats in channels.items()}
    parts = [rates(record["joint"], means), *against, numbers]
    if seconds:
        parts.append(" ".join(seconds))
    if judge := record.get("judge"):
        yes = judge["yes"] / max(1, judge["verdicts"])
        parts.append(
            f"judge {judge['requests']} requests {judge['seconds']:.1f}s, yes to {yes:.0%}"
        )
    if left:
        parts.append(left)
    return f"{'step':8} {head}  {' | '.join(parts)}"


def line_of_evaluation(results: dict[str, tuple[float, float]], head: str) -> str:
    """results: {name: (mean, standard error)}."""
    means = {name: mean for name, (mean, _) in results.items()}
    joint = means.pop("joint", math.nan)
    return f"{'held out':8} {head}  {rates(joint, means)}"


def rates(joint: float, means: dict[str, float]) -> str:
    channels = " ".join(f"{name} {shown(mean)}" for name, mean in means.items())
    return f"joint {shown(joint)} | {channels}"


def shown(mean: float) -> str:
    return "missing" if math.isnan(mean) else f"{mean:.2f}"


class Pace:
    """How long a run will go on, by what its latest steps and its latest evaluation have taken."""

    def __init__(self, steps: int, evaluated: Iterable[int]):
        """evaluated: after which steps there is an evaluation."""
        self.steps = steps
        self.evaluated = set(evaluated)
        self.seconds: list[float] = []  # of each step
        self.evaluation_seconds = 0.0
        self.ended = time.perf_counter()  # the latest step or evaluation

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = now - self.ended
        self.ended = now
        return seconds

    def step(self) -> None:
        self.seconds.append(self.lap())

    def evaluation(self) -> None:
        self.evaluation_seconds = self.lap()

    def left(self, step: int) -> str:
        """After so many steps."""
        latest = self.seconds[-10:]
        evaluations = sum(later >= step for later in self.evaluated)  # one may follow this step
        seconds = (self.steps - step) * sum(latest) / len(latest)
        seconds += evaluations * self.evaluation_seconds
        if seconds < 90:
            return f"{seconds:.0f} s left"
        if seconds < 5400:
            return f"{seconds / 60:.0f} min left"
        return f"{seconds / 3600:.1f} h left"
