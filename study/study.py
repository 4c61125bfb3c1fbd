"""Does the soft minimum do what it is for, and when not? Every aggregation on three small tasks.

    python study/study.py --out runs/study   # up to an hour on two cores; killed, it goes on
    python study/study.py --out runs/study-20 --first-seed 20  # other held-out seeds
    python study/study.py --out study        # the tables of this folder's study.jsonl again

It writes study.jsonl (each run's settings and curves, in four digits), study.md (the tables) and
study.png into --out. A run that is in study.jsonl is not run again. A run is train.fit itself, with
the tasks, the policy and the engine of toy.py. Warm start, prompts, request seeds and steps are the
same for every aggregation. The learning rate is chosen for each aggregation and task on tuning
seeds, then eight others count.
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
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import others
import torch
import toy
from report import AGGREGATION, BETA, LONGER, NOISE, Panel, figure, last, report, shares
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
TUNING = 1000, 1001  # seeds to choose rates by
HELD_OUT = 8  # seeds to report
FEW = 3  # seeds to report in the smaller comparisons
STEPS, EVERY = 120, 20
SEARCH = 24  # random tasks
HEAVY = {f"{m} x{factor}": m for m in ("rvpo", "gdpo") for factor in (3, 10)}  # others.heavy
TUNED = {  # method: the one whose learning rate it takes
    "rvpo 0.5:2": "rvpo",
    "centred": "rvpo",
    "minmax": "grpo",
    "rawsoftmin": "softmin",
    **HEAVY,
}
BETAS = METHODS | {"minmax": "0", "rawsoftmin": "1", "centred": "2"}
BETAS |= {name: METHODS[method] for name, method in HEAVY.items()}


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


Runs = dict[str, dict[str, list[Run]]]  # row: column: runs, one a seed. A panel that is to be run
# (seed, demonstrations): weights. Filled before the processes that train are forked.
STARTS: dict[tuple[int, str], dict] = {}


# A run


def forms(channels: list[Channel]) -> dict[str, Callable]:
    """Aggregations that are compared here only, see rvpo.AGGREGATIONS."""

    def minmax(rewards: torch.Tensor, beta: float, weights) -> torch.Tensor:
        """grpo on one scale."""
        return rvpo.grpo_advantage(to_unit(channels, rewards), beta, weights)

    def centred(rewards: torch.Tensor, beta: float, weights) -> torch.Tensor:
        """rvpo, centred in the group."""
        scores = rvpo.rvpo_advantage(rewards, beta, weights)
        return scores - scores.mean(-1, keepdim=True)

    rawsoftmin = rvpo.softmin_advantage  # softmin on the rewards as they are
    ours = {"minmax": minmax, "rawsoftmin": rawsoftmin, "centred": centred}
    return ours | others.forms(channels)


class Records(Log):
    """What train.fit logs, kept in memory."""

    def __init__(self):
        self.records: list[dict] = []
        self.rollouts: list[dict] = []

    def metrics(self, record: dict) -> None:
        self.records.append(record)

    def samples(self, records: list[dict]) -> None:
        self.rollouts += records

    def say(self, line: str) -> None:
        """Hundreds of runs, several at a time: only their results are shown."""


def warm_start(key: tuple[int, str]) -> tuple[tuple[int, str], dict]:
    return key, toy.warm_start(*key).state_dict()


def train_run(run: Run, channels: list[Channel]) -> Records:
    """train.fit, with the tasks, the policy and the engine of toy.py. Returns what it logged."""
    _, demonstrations = toy.SUITE[run.task]
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
    log = Records()
    sampler = Sampler(toy.engine(policy), Task(None, channels), run.seed)  # fit gets the prompts
    train.fit(
        config,
        update.Learner(policy, None, update.make_optimizer(policy, run.lr), toy.CPU),
        sampler,
        toy.make_prompts(STEPS * config.prompts, f"train {run.seed}"),
        log,
        functools.partial(train.evaluate, sampler, toy.make_prompts(200, "held out"), log),
        NoCheckpoints(),
    )
    return log


def result(run: Run) -> dict:
    """Trains. Returns curves of the evaluations, and of what was logged, means of EVERY steps."""
    channels, _ = toy.SUITE[run.task]
    channels = [
        toy.reward(c.name, c.full, run.scale, run.wrong) if c.name == run.channel else c
        for c in channels
    ]
    rvpo.AGGREGATIONS |= forms(channels)
    log = train_run(run, channels)
    steps = [record for record in log.records if "channels" in record]

    def curve(values: list[float]) -> list[float]:
        return np.nanmean(np.reshape(values, (-1, EVERY)), 1).tolist()  # NaN where nothing varies

    def of_channels(key: str) -> dict[str, list[float]]:
        curves = {}
        for channel in channels:
            curves[channel.name] = curve([step["channels"][channel.name][key] for step in steps])
        return curves

    rewards, advantages = sampled(log.rollouts, run.group)
    z = rvpo.zscore(rewards)[rvpo.has_signal(rewards).any(-1)].flatten(0, 1)  # (N, K)
    return {
        "eval": evaluations(log.records),
        "grad_norm": curve([step["grad_norm"] for step in steps]),
        "advantage_std": curve([step["advantage_std"] for step in steps]),
        "binding": of_channels("binding"),
        "weight": of_channels("weight"),
        "full": {channel.name: channel.full for channel in channels},
        "credit": credit(rewards, advantages),
        "taylor": {str(beta): taylor(z, beta) for beta in (0.5, 1, 2, 5)},
    }


def evaluations(records: list[dict]) -> dict[str, list[float]]:
    """{channel, or joint: its means over the held-out prompts, one an evaluation}."""
    means = [record["eval"] for record in records if "eval" in record]
    curves = {}
    for name in means[0]:
        curves[name] = [float(evaluation[name][0]) for evaluation in means]
    return curves


def sampled(rollouts: list[dict], group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (P, G, K) and advantages (P, G) of the prompts of all steps."""
    rewards = [[*rollout["rewards"].values()] for rollout in rollouts]
    advantages = [rollout["advantage"] for rollout in rollouts]
    return (
        torch.tensor(rewards, dtype=torch.float64).view(-1, group, len(rewards[0])),
        torch.tensor(advantages, dtype=torch.float64).view(-1, group),
    )


def credit(rewards: torch.Tensor, advantages: torch.Tensor) -> list[float]:
    """Mean advantage of a rollout that alone satisfies a channel, and of one that alone fails.

    Counted where that is all that differs in the group; NaN if it is in none.
    rewards (P, G, K), advantages (P, G)."""
    low, high = rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True)
    varies = high > low  # (P, 1, K)
    only = varies & (varies.sum(-1, keepdim=True) == 1)
    means = []
    for hit in (rewards == high, rewards == low):
        alone = only & hit & (hit.sum(1, keepdim=True) == 1)  # (P, G, K)
        means.append(advantages[..., None].expand_as(alone)[alone].mean().item())
    return means


def taylor(z: torch.Tensor, beta: float) -> list[float]:
    """How far mean - beta/2 * variance is from the soft minimum of z (N, K).

    Returns the mean |soft-min|, the mean and the largest error, the mean of the error's proven
    bound, and the largest error as a share of its bound."""
    exact = rvpo.soft_min(z, beta)
    error = (exact - (z.mean(-1) - beta / 2 * z.var(-1, correction=0))).abs()
    bound = beta**2 * (z.amax(-1) - z.amin(-1)) ** 3 / (36 * math.sqrt(3))
    share = error[bound > 1e-9] / bound[bound > 1e-9]
    means = exact.abs().mean(), error.mean(), error.max(), bound.mean(), share.max()
    return [number.item() for number in means]


# The file of runs


def rounded(value: dict | list | float):
    """The same dicts and lists, floats in four digits: what a file keeps."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}")


def load(file: Path) -> dict[Run, dict]:
    """{run: what is kept of its result, and `full`}, from a file that `execute` wrote."""
    done = {}
    for text in file.read_text().splitlines() if file.exists() else []:
        line = json.loads(text)
        run = Run(**{name: line.pop(name) for name in Run._fields if name in line})
        channels, _ = toy.SUITE[run.task]
        done[run] = {"full": {channel.name: channel.full for channel in channels}} | line
    return done


def append(file: Path, run: Run, result: dict) -> None:
    """A line: what differs from Run's defaults, and the result."""
    settings = run._asdict()
    for name, default in Run._field_defaults.items():
        if settings[name] == default:
            del settings[name]
    with file.open("a") as lines:
        lines.write(json.dumps(settings | result) + "\n")


def execute(
    runs: Iterable[Run], done: dict[Run, dict], file: Path, kept: tuple[str, ...] = ()
) -> None:
    """Adds to `done` and to the file the result of each run that is not there, in a process a core.

    kept: the entries of a result that are kept; all of them by default."""
    missing = [run for run in dict.fromkeys(runs) if run not in done]
    missing.sort(key=lambda run: run.seed)
    starts = dict.fromkeys((run.seed, toy.SUITE[run.task][1]) for run in missing)
    with get_context("fork").Pool() as pool:
        STARTS.update(pool.imap(warm_start, (key for key in starts if key not in STARTS)))
    with get_context("fork").Pool() as pool:  # forked after the starts are there
        results = tqdm(pool.imap(result, missing), total=len(missing), unit="run")
        for run, out in zip(missing, results, strict=True):
            done[run] = rounded({name: out[name] for name in kept or out})
            append(file, run, done[run])


# What is run


def tuning() -> list[Run]:
    """The runs that choose learning rates."""
    tuned = [method for method in METHODS if method not in TUNED]
    return [
        Run(task, method, seed, lr)
        for task in TASKS
        for method in tuned
        for seed in TUNING
        for lr in RATES
    ]


def merit(results: list[dict]) -> tuple[float, float]:
    """By which a learning rate is chosen: the mean joint rate; if equal, that of all channels."""
    satisfied = [[*shares(result).values()] for result in results]
    return np.mean([last(result) for result in results]), np.mean(satisfied)


def choose_rates(done: dict[Run, dict]) -> dict[tuple[str, str], float]:
    """{(task, method): the learning rate with the most merit on the tuning seeds}."""
    rates = {}
    for task in TASKS:
        for method in METHODS:
            tuned = TUNED.get(method, method)
            merits = {}
            for lr in RATES:
                merits[lr] = merit([done[Run(task, tuned, seed, lr)] for seed in TUNING])
            rates[task, method] = max(merits, key=merits.get)
    return rates


def panel(rows: Iterable[str], columns: Iterable[str], runs: Callable) -> Runs:
    """{row: {column: runs(row, column)}}."""
    cells = {}
    for row in rows:
        cells[row] = {column: runs(row, column) for column in columns}
    return cells


def runs_of(compared: dict[str, Runs]) -> Iterator[Run]:
    for rows in compared.values():
        for columns in rows.values():
            for runs in columns.values():
                yield from runs


def results_of(rows: Runs, done: dict[Run, dict]) -> Panel:
    """The panel with each run's result in its place."""
    columns = next(iter(rows.values()))
    return panel(rows, columns, lambda row, column: [done[run] for run in rows[row][column]])


SCALES = {"x 1": 1.0, "x 10": 10.0}
WRONG = {"0%": 0.0, "10%": 0.1, "30%": 0.3}
FACTORS = {"x 1": "", "x 3": " x3", "x 10": " x10"}  # of a method's name
SHAPES = {  # task, rollouts of a prompt
    "K = 2, G = 8": ("K = 2", 8),
    "K = 4, G = 8": ("K = 4", 8),
    "K = 9, G = 4": ("conflict", 4),
    "K = 9, G = 8": ("conflict", 8),
    "K = 9, G = 16": ("conflict", 16),
    "K = 17, G = 8": ("K = 17", 8),
}


def comparisons(rates: dict[tuple[str, str], float], seeds: range) -> dict[str, Runs]:
    """{title: what is compared under it}."""

    def runs(task: str, method: str, n: int = FEW, **change) -> list[Run]:
        tuned_on = "conflict" if task.startswith("K") else task
        rate = rates[tuned_on, TUNED.get(method, method)]
        return [Run(task, method, seed, rate, **change) for seed in seeds[:n]]

    def aggregation(task: str, method: str) -> list[Run]:
        return runs(task, method, HELD_OUT)

    def with_beta(beta: str, task: str) -> list[Run]:
        return runs(task, "rvpo", beta=None if beta == METHODS["rvpo"] else beta)

    def scaled(row: str, method: str) -> list[Run]:
        change = {} if SCALES[row] == 1 else {"channel": "please", "scale": SCALES[row]}
        return runs("conflict", method, **change)

    def misjudged(row: str, method: str) -> list[Run]:
        change = {} if WRONG[row] == 0 else {"channel": "safe", "wrong": WRONG[row]}
        return runs("no conflict", method, **change)

    def heavy(row: str, column: str) -> list[Run]:
        method = "gdpo" if column == "gdpo at rvpo's rate" else column
        found = runs("conflict", method + FACTORS[row], HELD_OUT)
        if column == method:
            return found
        return [run._replace(lr=rates["conflict", "rvpo"]) for run in found]

    def long(task: str, method: str) -> list[Run]:
        return runs(task, method, HELD_OUT, times=LONG)

    def shaped(row: str, method: str) -> list[Run]:
        task, group = SHAPES[row]
        return runs(task, method, group=group)

    ours = "rvpo", "gdpo"
    betas = "0.1", "0.5", "1", "2", "5", "10"
    rescaled = "grpo", "minmax", "softmin", "rawsoftmin", *ours
    longer = "rvpo", "gdpo", "grpo", "hardmin", "softmin"
    return {
        AGGREGATION: panel(TASKS, METHODS, aggregation),
        BETA: panel(betas, ("conflict", "no conflict"), with_beta),
        "Scale: conflict, the channel `please` multiplied": panel(SCALES, rescaled, scaled),
        NOISE: panel(WRONG, (*ours, "grpo", "hardmin", "softmin"), misjudged),
        "Whitening: rvpo over the batch, or centred in the group first": panel(
            TASKS, ("rvpo", "centred"), runs
        ),
        "Weights: conflict, the length limit weighs more": panel(
            FACTORS, (*ours, "gdpo at rvpo's rate"), heavy
        ),
        LONGER: panel(("conflict",), longer, long),
        "K and G: conflict, 64 rollouts a step": panel(SHAPES, ours, shaped),
    }


def search(seed: int, file: Path) -> str:
    """An attempt to break the claim: random tasks, each method at the better of two learning rates.

    Returns tables of joint rates, and of how often rvpo is better and worse."""
    tasks = [f"random {i}" for i in range(SEARCH)]
    toy.SUITE.update((task, toy.random_task(task)) for task in tasks)
    methods = "rvpo", "gdpo", "grpo", "softmin"
    rates = RATES[1:3]
    done = load(file)
    runs = [Run(task, method, seed, lr) for task in tasks for method in methods for lr in rates]
    execute(runs, done, file, ("eval",))
    rows = []
    wins = {method: np.zeros(3, int) for method in methods if method != "rvpo"}
    for task in tasks:
        best = {}
        for method in methods:
            best[method] = max(last(done[Run(task, method, seed, lr)]) for lr in rates)
        for method, counts in wins.items():
            gap = best["rvpo"] - best[method]
            counts += [gap > 0.1, abs(gap) <= 0.1, gap < -0.1]
        channels, demonstrations = toy.SUITE[task]
        names = ", ".join(channel.name for channel in channels)
        rows.append([names, demonstrations, *(f"{rate:.2f}" for rate in best.values())])
    joint_rates = table("| channels | demonstrations | " + " | ".join(methods) + " |", rows)
    counted = [[method, *map(str, counts)] for method, counts in wins.items()]
    better = table("| rvpo against | better by .1 | within .1 | worse by .1 |", counted)
    return joint_rates + "\n" + better


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
        (out / "search.md").write_text(search(first_seed, out / "search.jsonl"))
        return
    file = out / "study.jsonl"
    done = load(file)
    execute(tuning(), done, file)
    rates = choose_rates(done)
    compared = comparisons(rates, seeds)
    execute(runs_of(compared), done, file)
    panels = {title: results_of(rows, done) for title, rows in compared.items()}
    (out / "study.md").write_text(report(panels, rates, EVERY))
    figure(panels, EVERY, out / "study.png")
    print(f"{out}: study.jsonl, study.md, study.png")


if __name__ == "__main__":
    main(OPTIONS.out, OPTIONS.first_seed, OPTIONS.search)
