"""Does the soft minimum do what it is for, and when not? Every aggregation on three small tasks, all else equal.

    python study/study.py --out runs/study                     # up to an hour on two cores; killed, it goes on
    python study/study.py --out runs/study-20 --first-seed 20  # other held-out seeds
    python study/study.py --out study                          # makes the tables of this folder's study.jsonl again

Writes study.jsonl (each run's settings and curves, in four digits), study.md (the tables) and study.png into --out. A
run that is in study.jsonl is not run again. A run is train.fit itself, with the tasks, the policy and the engine of
toy.py: same warm start, prompts, request seeds and steps for every aggregation. The learning rate is chosen for each
aggregation and task on tuning seeds, then eight others count.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study"), help="directory (default %(default)s)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, help="first held-out seed (default %(default)s)"
    )
    parser.add_argument(
        "--search", action="store_true", help="instead: random tasks, one seed, into search.md"
    )
    OPTIONS = parser.parse_args()
sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # the code that is studied; a script sees its own folder only

import functools
import json
import math
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import others
import torch
import toy
from report import LONGER, Panel, figure, last, report, shares
from tqdm import tqdm

import rvpo
import train
import update
from config import TrainConfig
from infra.log import Log
from infra.state import NoCheckpoints
from rewards import Channel, Task, to_unit
from rollout import Sampler
from tools.stats import table

METHODS = {
    "rvpo": "2",
    "rvpo 0.5:2": "0.5:2",
    "gdpo": "0",
    "grpo": "0",
    "explicit": "1",
    "hardmin": "0",
    "softmin": "1",
}  # name: beta; the aggregation is the first word. explicit 1 is rvpo 2 to second order
TASKS = "conflict", "no conflict", "precision"
RATES = 1e-4, 3e-4, 1e-3, 3e-3
LONG = 3  # times as many steps
TUNING, HELD_OUT, FEW = (
    (1000, 1001),
    8,
    3,
)  # seeds to choose by, to report, and to report in the smaller comparisons
STEPS, EVERY = 120, 20
SEARCH = 24  # random tasks
HEAVY = {f"{m} x{factor}": m for m in ("rvpo", "gdpo") for factor in (3, 10)}  # others.heavy
TUNED = {
    "rvpo 0.5:2": "rvpo",
    "centred": "rvpo",
    "minmax": "grpo",
    "rawsoftmin": "softmin",
    **HEAVY,
}  # take its rate
BETAS = (
    METHODS
    | {"minmax": "0", "rawsoftmin": "1", "centred": "2"}
    | {m: METHODS[HEAVY[m]] for m in HEAVY}
)


class Run(NamedTuple):
    task: str
    method: str
    seed: int
    lr: float
    beta: str | None = None  # None: the method's own
    group: int = 8
    channel: str = ""  # what is done to one channel:
    scale: float = 1.0  # multiplied by this
    wrong: float = 0.0  # inverted in this share of its values
    times: int = 1  # as many steps, on the same prompts again


STARTS: dict[
    tuple[int, str], dict
] = {}  # (seed, demonstrations) -> weights, before the processes that train fork


def forms(channels: list[Channel]) -> dict[str, Callable]:
    """Aggregations that are compared here only, see rvpo.AGGREGATIONS."""
    return {
        # grpo on one scale
        "minmax": lambda r, beta, w: rvpo.grpo_advantage(to_unit(channels, r), beta, w),
        "rawsoftmin": rvpo.softmin_advantage,  # softmin on the rewards as they are
        "centred": lambda r, beta, w: (
            (s := rvpo.rvpo_advantage(r, beta, w)) - s.mean(-1, keepdim=True)
        ),
        **others.forms(channels),
    }


class Records(Log):
    """What train.fit logs, kept in memory."""

    def __init__(self):
        self.records, self.rollouts = [], []

    def metrics(self, record: dict) -> None:
        self.records.append(record)

    def samples(self, records: list[dict]) -> None:
        self.rollouts += records

    def say(self, line: str) -> None:
        """Hundreds of runs, several at a time: only their results are shown."""


def rounded(x):
    """The same dicts and lists, floats in four digits: what a file keeps."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [*map(rounded, x)] if isinstance(x, list) else float(f"{x:.4g}")


def load(file: Path) -> dict[Run, dict]:
    """{run: what is kept of its result, and `full`}, from a file that `execute` wrote."""
    out = {}
    for line in map(json.loads, file.read_text().splitlines() if file.exists() else []):
        run = Run(**{name: line.pop(name) for name in Run._fields if name in line})
        out[run] = {"full": {c.name: c.full for c in toy.SUITE[run.task][0]}} | line
    return out


def append(file: Path, run: Run, out: dict) -> None:
    """A line: what differs from Run's defaults, and `out`."""
    settings = {
        name: value
        for name, value in run._asdict().items()
        if value != Run._field_defaults.get(name)
    }
    with file.open("a") as lines:
        lines.write(json.dumps(settings | out) + "\n")


def warm_start(key: tuple[int, str]) -> tuple[tuple[int, str], dict]:
    return key, toy.warm_start(*key).state_dict()


def credit(rewards: torch.Tensor, advantages: torch.Tensor) -> list[float]:
    """Mean advantage of a rollout that alone satisfies a channel, and of one that alone fails in it, where that is all
    that differs in the group. rewards (P, G, K), advantages (P, G)."""
    low, high = rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True)
    only = (high > low) & ((high > low).sum(-1, keepdim=True) == 1)
    out = []
    for hit in (rewards == high, rewards == low):
        alone = only & hit & (hit.sum(1, keepdim=True) == 1)
        out.append(
            advantages[..., None].expand_as(alone)[alone].mean().item()
        )  # NaN if there is none
    return out


def taylor(z: torch.Tensor, beta: float) -> list[float]:
    """Of z (N, K): mean |soft-min|, mean and largest error of mean - beta/2 * variance, the mean of its proven bound,
    and the largest error as a share of its bound."""
    exact = rvpo.soft_min(z, beta)
    error = (exact - (z.mean(-1) - beta / 2 * z.var(-1, correction=0))).abs()
    bound = beta**2 * (z.amax(-1) - z.amin(-1)) ** 3 / (36 * math.sqrt(3))
    share = error[bound > 1e-9] / bound[bound > 1e-9]
    return [
        exact.abs().mean().item(),
        error.mean().item(),
        error.max().item(),
        bound.mean().item(),
        share.max().item(),
    ]


def result(run: Run) -> dict:
    """Trains. Returns the evaluations {channel: curve}, and what was logged on the way, as means over EVERY steps."""
    channels, demonstrations = toy.SUITE[run.task]
    channels = [
        toy.reward(c.name, c.full, run.scale, run.wrong) if c.name == run.channel else c
        for c in channels
    ]
    rvpo.AGGREGATIONS |= forms(channels)
    policy = toy.make_policy(0)
    policy.load_state_dict(STARTS[run.seed, demonstrations])
    config = TrainConfig.model_construct(  # unchecked: it need not know `forms`
        agg=run.method if run.method in rvpo.AGGREGATIONS else run.method.split()[0],
        beta=run.beta or BETAS[run.method],
        lr=run.lr,
        seed=run.seed,
        steps=STEPS * run.times,
        prompts=64 // run.group,
        group=run.group,
        warmup=5,
        eval_every=EVERY,
    )
    log, sampler = (
        Records(),
        Sampler(toy.engine(policy), Task(None, channels), run.seed),
    )  # fit is handed the prompts
    train.fit(
        config,
        update.Learner(policy, None, update.make_optimizer(policy, run.lr), toy.CPU),
        sampler,
        toy.make_prompts(STEPS * config.prompts, f"train {run.seed}"),
        log,
        functools.partial(train.evaluate, sampler, toy.make_prompts(200, "held out"), log),
        NoCheckpoints(),
    )
    evals, steps = (
        [x["eval"] for x in log.records if "eval" in x],
        [x for x in log.records if "channels" in x],
    )
    rewards = torch.tensor([[*s["rewards"].values()] for s in log.rollouts], dtype=torch.float64)
    rewards = rewards.view(-1, run.group, len(channels))  # (prompts of all steps, G, K)
    advantages = torch.tensor([s["advantage"] for s in log.rollouts], dtype=torch.float64).view(
        -1, run.group
    )
    z = rvpo.zscore(rewards)[rvpo.has_signal(rewards).any(-1)].flatten(0, 1)

    def curve(value: Callable[[dict], float]) -> list[float]:
        values = np.array([value(x) for x in steps]).reshape(-1, EVERY)
        return np.nanmean(values, 1).tolist()  # nothing binds where nothing varies

    return {
        "eval": {name: [float(x[name][0]) for x in evals] for name in evals[0]},
        "grad_norm": curve(lambda x: x["grad_norm"]),
        "advantage_std": curve(lambda x: x["advantage_std"]),
        "binding": {
            c.name: curve(lambda x, c=c: x["channels"][c.name]["binding"]) for c in channels
        },
        "weight": {c.name: curve(lambda x, c=c: x["channels"][c.name]["weight"]) for c in channels},
        "full": {c.name: c.full for c in channels},
        "credit": credit(rewards, advantages),
        "taylor": {str(beta): taylor(z, beta) for beta in (0.5, 1, 2, 5)},
    }


def execute(
    runs: Iterable[Run], done: dict[Run, dict], file: Path, kept: tuple[str, ...] = ()
) -> None:
    """Adds to `done` and to the file the result of each run that is not there, in a process a core.

    kept: the entries of a result that are kept; all of them by default."""
    todo = sorted((run for run in dict.fromkeys(runs) if run not in done), key=lambda run: run.seed)
    starts = dict.fromkeys((run.seed, toy.SUITE[run.task][1]) for run in todo)
    with get_context("fork").Pool() as pool:
        STARTS.update(pool.imap(warm_start, (key for key in starts if key not in STARTS)))
    with get_context("fork").Pool() as pool:  # forked after the starts are there
        for run, out in zip(
            todo, tqdm(pool.imap(result, todo), total=len(todo), unit="run"), strict=True
        ):
            done[run] = rounded({name: out[name] for name in kept or out})
            append(file, run, done[run])


def choose_rates(done: dict[Run, dict]) -> dict[tuple[str, str], float]:
    """{(task, method): the learning rate with the best joint rate on the tuning seeds}; by the mean reward if equal."""

    def merit(task: str, method: str, lr: float) -> tuple[float, float]:
        outs = [done[Run(task, method, seed, lr)] for seed in TUNING]
        return np.mean([last(out) for out in outs]), np.mean(
            [[*shares(out).values()] for out in outs]
        )

    return {
        (task, method): max(RATES, key=functools.partial(merit, task, TUNED.get(method, method)))
        for task in TASKS
        for method in METHODS
    }


def comparisons(rates: dict, seeds: range) -> dict[str, Panel]:
    """Title: panel."""

    def runs(task: str, method: str, n: int = FEW, **change) -> list[Run]:
        rate = rates["conflict" if task.startswith("K") else task, TUNED.get(method, method)]
        return [Run(task, method, seed, rate, **change) for seed in seeds[:n]]

    def altered(
        task: str, method: str, channel: str, scale: float = 1.0, wrong: float = 0.0
    ) -> list[Run]:
        same = scale == 1 and wrong == 0
        return runs(
            task, method, **({} if same else {"channel": channel, "scale": scale, "wrong": wrong})
        )

    def heavy(factor: int) -> dict[str, list[Run]]:
        cells = {
            m: runs("conflict", m if factor == 1 else f"{m} x{factor}", HELD_OUT) for m in ours
        }
        return cells | {
            "gdpo at rvpo's rate": [
                run._replace(lr=rates["conflict", "rvpo"]) for run in cells["gdpo"]
            ]
        }

    easy, ours = "no conflict", ("rvpo", "gdpo")
    return {
        "Aggregation": {task: {m: runs(task, m, HELD_OUT) for m in METHODS} for task in TASKS},
        "Beta": {
            beta: {
                task: runs(task, "rvpo", beta=None if beta == METHODS["rvpo"] else beta)
                for task in ("conflict", easy)
            }
            for beta in ("0.1", "0.5", "1", "2", "5", "10")
        },
        "Scale: conflict, the channel `please` multiplied": {
            f"x {scale:g}": {
                m: altered("conflict", m, "please", scale=scale)
                for m in ("grpo", "minmax", "softmin", "rawsoftmin", *ours)
            }
            for scale in (1.0, 10.0)
        },
        "Noise: no conflict, `safe` inverted at random": {
            f"{wrong:.0%}": {
                m: altered(easy, m, "safe", wrong=wrong)
                for m in (*ours, "grpo", "hardmin", "softmin")
            }
            for wrong in (0.0, 0.1, 0.3)
        },
        "Whitening: rvpo over the batch, or centred in the group first": {
            task: {m: runs(task, m) for m in ("rvpo", "centred")} for task in TASKS
        },
        "Weights: conflict, the length limit weighs more": {
            f"x {factor}": heavy(factor) for factor in (1, 3, 10)
        },
        LONGER: {
            "conflict": {
                m: runs("conflict", m, HELD_OUT, times=LONG)
                for m in ("rvpo", "gdpo", "grpo", "hardmin", "softmin")
            }
        },
        "K and G: conflict, 64 rollouts a step": {
            f"K = {len(toy.SUITE[task][0])}, G = {group}": {
                m: runs(task, m, group=group) for m in ours
            }
            for task, group in (
                ("K = 2", 8),
                ("K = 4", 8),
                ("conflict", 4),
                ("conflict", 8),
                ("conflict", 16),
                ("K = 17", 8),
            )
        },
    }


def search(seed: int, file: Path) -> str:
    """An attempt to break the claim: joint rates on random tasks, each at the better of two learning rates."""
    names = [f"random {i}" for i in range(SEARCH)]
    toy.SUITE.update((name, toy.random_task(name)) for name in names)
    methods, done = ("rvpo", "gdpo", "grpo", "softmin"), load(file)
    execute(
        (Run(name, m, seed, lr) for name in names for m in methods for lr in RATES[1:3]),
        done,
        file,
        ("eval",),
    )
    rows, wins = [], {m: np.zeros(3, int) for m in methods[1:]}
    for name in names:
        best = {m: max(last(done[Run(name, m, seed, lr)]) for lr in RATES[1:3]) for m in methods}
        for m in methods[1:]:
            gap = best["rvpo"] - best[m]
            wins[m] += [gap > 0.1, abs(gap) <= 0.1, gap < -0.1]
        rows.append(
            [
                ", ".join(c.name for c in toy.SUITE[name][0]),
                toy.SUITE[name][1],
                *(f"{best[m]:.2f}" for m in methods),
            ]
        )
    return (
        table("| channels | demonstrations | " + " | ".join(methods) + " |", rows)
        + "\n"
        + table(
            "| rvpo against | better by .1 | within .1 | worse by .1 |",
            ([m, *map(str, wins[m])] for m in wins),
        )
    )


def main(out: Path, first_seed: int, searching: bool) -> None:
    """See OPTIONS."""
    seeds = range(first_seed, first_seed + HELD_OUT)
    if {*seeds} & {*TUNING}:
        sys.exit(
            f"error: --first-seed {first_seed}: {seeds} has a tuning seed, {TUNING}; choose another"
        )
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # before the processes fork, one a core
    if searching:
        (out / "search.md").write_text(search(seeds[0], out / "search.jsonl"))
        return
    file = out / "study.jsonl"
    done = load(file)
    execute(
        (
            Run(task, m, seed, lr)
            for task in TASKS
            for m in METHODS
            if m not in TUNED
            for seed in TUNING
            for lr in RATES
        ),
        done,
        file,
    )
    rates = choose_rates(done)
    panels = comparisons(rates, seeds)
    execute(
        (
            run
            for panel in panels.values()
            for cells in panel.values()
            for runs in cells.values()
            for run in runs
        ),
        done,
        file,
    )
    (out / "study.md").write_text(report(done, panels, rates, EVERY))
    figure(done, panels, EVERY, out / "study.png")
    print(f"{out}: study.jsonl, study.md, study.png")


if __name__ == "__main__":
    main(OPTIONS.out, OPTIONS.first_seed, OPTIONS.search)
