"""Does the soft minimum do what it is for, and when not? Every aggregation on three small tasks, all else equal.

    python study.py --out runs/study                     # 18 minutes on two cores
    python study.py --out runs/study-20 --first-seed 20  # other held-out seeds

Writes study.json (every run's settings and curves), study.md (the tables) and study.png into --out. A run is train.fit
itself, with the tasks, the policy and the sampler of toy.py: same warm start, prompts, request seeds and steps for
every aggregation. The learning rate is chosen for each aggregation and task on tuning seeds, then eight others count.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import rewards as scoring
import rvpo
import toy
import train
from eval import holm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {"rvpo": "2", "rvpo 0.5:2": "0.5:2", "gdpo": "0", "grpo": "0", "explicit": "1", "hardmin": "0",
           "softmin": "1"}  # name: beta; the aggregation is the first word. explicit 1 is rvpo 2 to second order
TASKS = "conflict", "no conflict", "precision"
RATES = 1e-4, 3e-4, 1e-3, 3e-3
TUNING, HELD_OUT, FEW = (1000, 1001), 8, 3  # seeds to choose by, to report, and to report in the smaller comparisons
STEPS, EVERY = 120, 20
# Forms that are compared here only. Each: as those in rvpo.AGGREGATIONS.
rvpo.AGGREGATIONS |= {
    "minmax": lambda r, beta, w: rvpo.grpo_advantage(scoring.unit("toy", r), beta, w),  # grpo on one scale
    "rawsoftmin": rvpo.softmin_advantage,  # softmin on the rewards as they are
    "centred": lambda r, beta, w: (s := rvpo.rvpo_advantage(r, beta, w)) - s.mean(-1, keepdim=True),
}
TUNED = {"rvpo 0.5:2": "rvpo"}  # takes the other's learning rate
BETAS = METHODS | {"minmax": "0", "rawsoftmin": "1", "centred": "2"}


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


STARTS: dict[tuple[int, str], dict] = {}  # (seed, demonstrations) -> weights, before the processes that train fork


def warm_start(key: tuple[int, str]) -> tuple[tuple[int, str], dict]:
    torch.set_num_threads(1)
    return key, toy.warm_start(*key).state_dict()


def credit(rewards: torch.Tensor, advantages: torch.Tensor) -> list[float]:
    """Mean advantage of a rollout that alone satisfies a channel of two values, and of one that alone fails in it.
    rewards (P, G, K), advantages (P, G)."""
    low, high = rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True)
    binary = ((rewards == low) | (rewards == high)).all(1, keepdim=True) & (high > low)
    out = []
    for hit in ((rewards == high) & binary, (rewards == low) & binary):
        alone = hit & (hit.sum(1, keepdim=True) == 1)
        out.append(advantages[..., None].expand_as(alone)[alone].mean().item())  # NaN if there is none
    return out


def taylor(z: torch.Tensor, beta: float) -> list[float]:
    """Of z (N, K): mean |soft-min|, mean and largest error of mean - beta/2 * variance, the mean of its proven bound,
    and the largest error as a share of its bound."""
    exact = rvpo.soft_min(z, beta)
    error = (exact - (z.mean(-1) - beta / 2 * z.var(-1, correction=0))).abs()
    bound = beta**2 * (z.amax(-1) - z.amin(-1)) ** 3 / (36 * math.sqrt(3))
    share = error[bound > 1e-9] / bound[bound > 1e-9]
    return [exact.abs().mean().item(), error.mean().item(), error.max().item(), bound.mean().item(),
            share.max().item()]


def result(run: Run) -> dict:
    """Trains. Returns the evaluations {channel: curve}, and what was logged on the way, as means over EVERY steps."""
    torch.set_num_threads(1)
    channels, demonstrations = toy.SUITE[run.task]
    scoring.TASKS["toy"] = channels = [
        toy.reward(c.name, c.full, run.scale, run.wrong) if c.name == run.channel else c for c in channels]
    policy = toy.make_policy(0)
    policy.load_state_dict(STARTS[run.seed, demonstrations])
    args = argparse.Namespace(
        task="toy", agg=run.method.split()[0], beta=run.beta or BETAS[run.method], lr=run.lr, seed=run.seed,
        steps=STEPS, prompts=64 // run.group, group=run.group, updates=1, warmup=5, eval_every=EVERY, kl=0.0,
        temperature=1.0, is_cap=2.0, clip_low=0.2, clip_high=0.2, grad_clip=1.0, tokens_per_microbatch=16384)
    lines, samples = [], []
    train.write = lambda file, *more: (lines if file.name == "metrics.jsonl" else samples).extend(more)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # fit's own progress
        train.fit(args, Path(), toy.CPU, policy, None, toy.sampler(policy), None,
                  toy.make_prompts(STEPS * args.prompts, f"train {run.seed}"), toy.make_prompts(200, "held out"))
    evals, steps = [x["eval"] for x in lines if "eval" in x], [x for x in lines if "channels" in x]
    rewards = torch.tensor([[*s["rewards"].values()] for s in samples], dtype=torch.float64)
    rewards = rewards.view(-1, run.group, len(channels))  # (prompts of all steps, G, K)
    advantages = torch.tensor([s["advantage"] for s in samples], dtype=torch.float64).view(-1, run.group)
    z = rvpo.zscore(rewards)[rvpo.has_signal(rewards).any(-1)].flatten(0, 1)

    def curve(value: Callable[[dict], float]) -> list[float]:
        return np.array([value(x) for x in steps]).reshape(-1, EVERY).mean(1).tolist()

    return {
        "eval": {name: [float(x[name][0]) for x in evals] for name in evals[0]},
        "grad_norm": curve(lambda x: x["grad_norm"]), "advantage_std": curve(lambda x: x["advantage_std"]),
        "binding": {c.name: curve(lambda x, c=c: x["channels"][c.name]["binding"]) for c in channels},
        "weight": {c.name: curve(lambda x, c=c: x["channels"][c.name]["weight"]) for c in channels},
        "full": {c.name: c.full for c in channels},
        "credit": credit(rewards, advantages),
        "taylor": {str(beta): taylor(z, beta) for beta in (0.5, 1, 2, 5)},
    }


def execute(runs: Iterable[Run], done: dict[Run, dict]) -> None:
    """Adds to `done` the result of each run that is not there, in a process a core."""
    todo = sorted({*runs} - done.keys(), key=lambda run: run.seed)
    with get_context("fork").Pool() as pool:
        for run, out in zip(todo, tqdm(pool.imap(result, todo), total=len(todo), unit="run"), strict=True):
            done[run] = out


def last(out: dict, name: str = "joint") -> float:
    """The mean of the last two evaluations."""
    return float(np.mean(out["eval"][name][-2:]))


def shares(out: dict) -> dict[str, float]:
    """Each channel at the end, as a share of what satisfies it."""
    return {name: min(1.0, last(out, name) / full) for name, full in out["full"].items()}


def sign_flip(differences: list[float]) -> float:
    """Two-sided p-value of the exact paired permutation test: all 2^n signs."""
    d = np.array(differences)
    signs = np.array([*itertools.product((-1, 1), repeat=len(d))])
    return float((np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean())


def choose_rates(done: dict[Run, dict]) -> dict[tuple[str, str], float]:
    """{(task, method): the learning rate with the best joint rate on the tuning seeds}; by the mean reward if equal."""
    def merit(task: str, method: str, lr: float) -> tuple[float, float]:
        outs = [done[Run(task, method, seed, lr)] for seed in TUNING]
        return np.mean([last(out) for out in outs]), np.mean([[*shares(out).values()] for out in outs])

    return {(task, method): max(RATES, key=lambda lr, task=task, tuned=TUNED.get(method, method): merit(task, tuned, lr))
            for task in TASKS for method in METHODS}


def comparisons(rates: dict, seeds: range) -> dict[str, dict[tuple, list[Run]]]:
    """{panel: {row: runs, one a seed}}."""
    def runs(task: str, method: str, n: int = FEW, like: str | None = None, **change) -> list[Run]:
        return [Run(task, method, seed, rates[task, like or method], **change) for seed in seeds[:n]]

    easy = "no conflict"
    return {
        "aggregation": {(task, m): runs(task, m, HELD_OUT) for task in TASKS for m in METHODS},
        "beta": {(task, beta): runs(task, "rvpo", beta=None if beta == METHODS["rvpo"] else beta)
                 for task in ("conflict", easy) for beta in ("0.1", "0.5", "1", "2", "5", "10")},
        "scale": {("tool x 10", *row): runs(easy, m, like=m if m in METHODS else like, channel="tool", scale=10.0)
                  for *row, m, like in (("grpo", "grpo", ""), ("grpo on one scale", "minmax", "grpo"),
                                        ("softmin", "softmin", ""), ("softmin on the raw", "rawsoftmin", "softmin"),
                                        ("rvpo", "rvpo", ""), ("gdpo", "gdpo", ""))},
        "noise": {(wrong, m): runs(easy, m, channel="safe", wrong=wrong) if wrong else runs(easy, m)
                  for wrong in (0.0, 0.1, 0.3) for m in ("rvpo", "gdpo", "grpo", "hardmin", "softmin")},
        "whitening": {(task, label): runs(task, m, like="rvpo") for task in TASKS
                      for label, m in (("over the batch", "rvpo"), ("centred in the group first", "centred"))},
        "size": {(f"K = {len(toy.SUITE[task][0])}, G = {group}", m): [
            run._replace(task=task, group=group) for run in runs("conflict", m)] for task, group in (
                ("K = 2", 8), ("K = 4", 8), ("conflict", 4), ("conflict", 8), ("conflict", 16), ("K = 17", 8))
            for m in ("rvpo", "gdpo")},
    }


def closed_credit(beta: float, channels: int, group: int, successes: int) -> tuple[float, float]:
    """Score of a rollout that succeeds, and of one that fails, in a channel of two values that `successes` of the group
    satisfy, while the other channels are constant (eps left out). The first is never above ln(K / (K-1)) / beta."""
    p = successes / group
    unit = math.sqrt((group - 1) / group)  # z of a success is unit * sqrt((1-p) / p), the std being unbiased

    def score(z: float) -> float:
        return -math.log1p(math.expm1(-beta * z) / channels) / beta if beta else z / channels

    return score(unit * math.sqrt((1 - p) / p)), score(-unit * math.sqrt(p / (1 - p)))


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def report(done: dict[Run, dict], panels: dict, rates: dict) -> str:
    """study.md."""
    def outs(panel: str, row: tuple) -> list[dict]:
        return [done[run] for run in panels[panel][row]]

    def joint(panel: str, row: tuple) -> list[float]:
        return [last(out) for out in outs(panel, row)]

    parts = []
    for task in TASKS:
        rows, ours = [], joint("aggregation", (task, "rvpo"))
        others = [m for m in METHODS if m != "rvpo"]
        p = {m: sign_flip(np.subtract(ours, joint("aggregation", (task, m)))) for m in others}
        corrected = dict(zip(others, holm([*p.values()]), strict=True))
        for m in METHODS:
            own = outs("aggregation", (task, m))
            ends = {name: np.mean([shares(out)[name] for out in own]) for name in own[0]["full"]}
            worst = min(ends, key=ends.get)
            reward = np.mean([np.mean([last(out, name) for name in out["full"]]) for out in own])
            final = joint("aggregation", (task, m))
            third = np.mean([out["eval"]["joint"][(len(out["eval"]["joint"]) - 1) // 3] for out in own])
            rows.append([m, f"{rates[task, m]:g}", spread(final), f"{third:.3f}", f"{worst} {ends[worst]:.2f}", f"{reward:.3f}",
                         f"{sum(x >= 0.5 for x in final)} of {len(final)}",
                         f"{np.mean([max(out['eval']['joint']) - last(out) for out in own]):.3f}",
                         f"{np.mean(ours) - np.mean(final):+.3f}" if m in p else "",
                         f"{p[m]:.4f}" if m in p else "", f"{corrected[m]:.3f}" if m in p else ""])
        parts.append(f"## Task: {task} (K = {len(toy.SUITE[task][0])})\n\n" + table(
            "| aggregation | lr | joint rate ± sd | after a third | worst channel | mean reward | joint >= .5 | peak - final "
            "| rvpo - it | p | Holm's p |", rows))
    betas = dict.fromkeys(beta for _, beta in panels["beta"])
    parts.append("## Beta\n\n" + table("| beta | conflict | no conflict |", (
        [beta, *(spread(joint("beta", (task, beta))) for task in ("conflict", "no conflict"))] for beta in betas)))
    parts.append("## Scale: no conflict, the channel `tool` multiplied by 10\n\n" + table("| | joint rate |", (
        [row[1], spread(joint("scale", row))] for row in panels["scale"])))
    rows = []
    for beta in ("0.5", "1", "2", "5"):
        values = np.array([out["taylor"][beta] for out in outs("aggregation", ("conflict", "rvpo"))])
        rows.append([beta, *(f"{x:.3f}" for x in (values[:, 0].mean(), values[:, 1].mean(), values[:, 2].max(),
                                                  values[:, 3].mean(), values[:, 4].max()))])
    parts.append("## mean - beta/2 * variance against the soft minimum, on rvpo's own Z (conflict)\n\n" + table(
        "| beta | mean abs. soft-min | mean error | largest error | mean bound | largest error / bound |", rows))
    rows = []
    for m in METHODS:
        own = outs("aggregation", ("conflict", m))
        binding = {name: np.mean([out["binding"][name] for out in own], 0) for name in own[0]["binding"]}
        first, final = (max(binding, key=lambda name, at=at: binding[name][at]) for at in (0, -1))
        norms, stds = (np.mean([out[x] for out in own], 0) for x in ("grad_norm", "advantage_std"))
        rows.append([m, f"{norms[0]:.2f} → {norms[-1]:.2f}", f"{stds[0]:.2f} → {stds[-1]:.2f}",
                     f"{first} {binding[first][0]:.2f} → {final} {binding[final][-1]:.2f}"])
    parts.append(f"## Over training (conflict; means of the first and the last {EVERY} steps)\n\n" + table(
        "| aggregation | gradient norm | advantage std | binds most often, share |", rows))
    methods = dict.fromkeys(m for _, m in panels["noise"])
    parts.append("## Noise: no conflict, `safe` inverted at random\n\n" + table(
        "| share | " + " | ".join(methods) + " | soft-min weight of `safe` in rvpo (uniform: 0.17) |",
        ([f"{wrong:.0%}", *(spread(joint("noise", (wrong, m))) for m in methods),
          f"{np.mean([out['weight']['safe'] for out in outs('noise', (wrong, 'rvpo'))]):.2f}"]
         for wrong in dict.fromkeys(wrong for wrong, _ in panels["noise"]))))
    parts.append("## Whitening of rvpo's scores\n\n" + table("| task | | joint rate |", (
        [*row, spread(joint("whitening", row))] for row in panels["whitening"])))
    sizes = dict.fromkeys(size for size, _ in panels["size"])
    parts.append("## K and G: conflict, 64 rollouts a step\n\n" + table("| | rvpo | gdpo |", (
        [size, *(spread(joint("size", (size, m))) for m in ("rvpo", "gdpo"))] for size in sizes)))
    rows = [[f"rvpo, beta {beta:g}", str(channels), *(f"{x:+.2f}" for x in (
        closed_credit(beta, channels, 8, 1)[0], closed_credit(beta, channels, 8, 7)[1],
        math.log(channels / (channels - 1)) / beta))] for beta in (0.5, 2, 5) for channels in (2, 9, 17)]
    parts.append("## Score of one success, and of one failure, in 8 (closed form, all other channels constant)\n\n"
                 + table("| | K | success | failure | limit of the success |", rows))
    parts.append("## The same, measured: mean advantage over training (conflict; whitened, other channels vary)\n\n"
                 + table("| aggregation | lone success | lone failure |", (
                     [m, *(f"{x:+.2f}" for x in np.nanmean(
                         [out["credit"] for out in outs("aggregation", ("conflict", m))], 0))] for m in METHODS)))
    return "\n".join(parts)


def figure(done: dict[Run, dict], panels: dict, out: Path) -> None:
    drawn, axes = plt.subplots(2, 4, figsize=(15, 6.4), layout="constrained")
    colors = {m: f"C{i}" for i, m in enumerate(METHODS)}
    some = [m for m in METHODS if m not in ("rvpo 0.5:2", "explicit")]

    def curves(axis, title: str, value: Callable[[dict], list[float]], at: Iterable[int]) -> None:
        for m in some:
            mean = np.mean([value(done[run]) for run in panels["aggregation"]["conflict", m]], 0)
            axis.plot(at, mean, color=colors[m], label=m)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)

    for axis, task in zip(axes[0], TASKS, strict=False):
        for i, m in enumerate(METHODS):
            values = [last(done[run]) for run in panels["aggregation"][task, m]]
            axis.plot([i] * len(values), values, "o", color=colors[m], markersize=4, alpha=0.6)
            axis.plot([i - 0.3, i + 0.3], [np.mean(values)] * 2, color=colors[m], linewidth=2)
        axis.set(title=f"{task}: joint rate, a dot a seed", ylim=(-0.03, 1.03))
        axis.set_xticks(range(len(METHODS)), METHODS, rotation=40, ha="right", fontsize=8)
    evaluated = range(0, STEPS + 1, EVERY)
    curves(axes[0, 3], "conflict: length limit kept", lambda x: x["eval"]["length14"], evaluated)
    for task in ("conflict", "no conflict"):
        rows = [(float(beta), runs) for (t, beta), runs in panels["beta"].items() if t == task]
        axes[1, 0].errorbar([beta for beta, _ in rows], [np.mean([last(done[r]) for r in runs]) for _, runs in rows],
                            [np.std([last(done[r]) for r in runs], ddof=1) for _, runs in rows], label=task, capsize=3)
    axes[1, 0].set(title="rvpo: joint rate", xlabel="beta", xscale="log", ylim=(-0.03, 1.03))
    axes[1, 0].legend(fontsize=7)
    for m in dict.fromkeys(m for _, m in panels["noise"]):
        rows = [(wrong, np.mean([last(done[run]) for run in runs])) for (wrong, x), runs in panels["noise"].items()
                if x == m]
        axes[1, 1].plot(*zip(*rows, strict=True), "o-", color=colors[m], label=m)
    axes[1, 1].set(title="no conflict, `safe` misjudged: joint rate", xlabel="share", ylim=(-0.03, 1.03))
    axes[1, 1].legend(fontsize=7)
    for beta in (0, 0.5, 2, 5):
        scores = [closed_credit(beta, 9, 8, n) for n in range(1, 8)]
        for i, style in ((0, "-"), (1, "--")):
            axes[1, 2].plot([n / 8 for n in range(1, 8)], [s[i] for s in scores], style, color=f"C{int(beta * 2) % 10}",
                            label=f"beta {beta:g}" if i == 0 else None)
    axes[1, 2].set(title="score of a success (-) and a failure (--), K = 9", xlabel="rate of the channel")
    axes[1, 2].legend(fontsize=7)
    curves(axes[1, 3], "conflict: gradient norm", lambda x: x["grad_norm"], range(EVERY, STEPS + 1, EVERY))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    drawn.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="a new directory (default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help=f"of {HELD_OUT} held-out seeds (default %(default)s)")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + HELD_OUT)
    if args.out.exists() or {*seeds} & {*TUNING}:
        sys.exit(f"error: --out {args.out} must not exist yet, and the seeds must be others than {TUNING}")
    args.out.mkdir(parents=True)
    with get_context("fork").Pool() as pool:
        STARTS.update(pool.imap(warm_start, itertools.product([*TUNING, *seeds], toy.FAULTS)))
    done: dict[Run, dict] = {}
    execute((Run(task, m, seed, lr) for task in TASKS for m in METHODS.keys() - TUNED.keys() for seed in TUNING
             for lr in RATES), done)
    rates = choose_rates(done)
    panels = comparisons(rates, seeds)
    execute((run for rows in panels.values() for runs in rows.values() for run in runs), done)
    with (args.out / "study.json").open("w") as file:
        json.dump([{**run._asdict(), **out} for run, out in done.items()], file)
    (args.out / "study.md").write_text(report(done, panels, rates))
    figure(done, panels, args.out / "study.png")
    print(f"{args.out}: study.json, study.md, study.png")


if __name__ == "__main__":
    main()
