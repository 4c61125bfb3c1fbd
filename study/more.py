"""More aggregations on the study's tasks (others.py), and runs three times as long.

    python study/more.py                            # goes on where it was stopped
    python study/more.py --tables > docs/more.md    # from what has been run, nothing else

Each run is a line of study/more.jsonl: its settings and its evaluations. One that is there is not run again. As in
study.py the learning rate is chosen on tuning seeds, then others count; a long run begins with the short one, step by
step the same, and stands for it.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--file", type=Path, default=Path(__file__).with_name("more.jsonl"), help="the runs"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    OPTIONS = parser.parse_args()
sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # the code that is studied; a script sees its own folder only

from collections.abc import Iterator

import numpy as np
import torch
import toy
from report import best, last, shares

import study
from study import LONG, TUNING, Run
from tools.stats import holm, sign_flip, spread, table

SEEDS = range(study.HELD_OUT)
RATES = study.RATES[1:]  # study.py never chose 1e-4
KNOWN = "rvpo", "gdpo", "grpo", "softmin", "hardmin"
OTHERS = "geometric", "dara", "dvao", "gd2po"
OURS = ("blend full",)
CLIPPED = "grpo full", "gdpo full", "softmin full", "geometric full", "rvpo full", "hardmin full"
METHODS = *KNOWN, *OTHERS, *CLIPPED, *OURS
LOST = 0.05  # a joint rate that is not followed up
LONGER = (
    *CLIPPED[:5],
    "softmin",
    "geometric",
    "rvpo",
    "grpo",
    "hardmin",
)  # run that long; gdpo is lost before
HARDER = {
    "K = 17": ("K = 17", {}),  # title: task, what is done to it
    "no conflict, `safe` inverted in 30%": ("no conflict", {"channel": "safe", "wrong": 0.3}),
}
ROBUST = *OURS, *CLIPPED[:5], *KNOWN[:4], "geometric"  # run there, too
study.BETAS |= {name: study.BETAS.get(name.split()[0], "0") for name in METHODS} | {
    "blend full": "2"
}


def find(done: dict[Run, dict], run: Run) -> dict | None:
    """What a run has given, or the beginning of a longer one."""
    for times in (run.times, LONG):
        if out := done.get(run._replace(times=times)):
            evaluations = run.times * study.STEPS // study.EVERY + 1
            return {
                **out,
                "eval": {name: curve[:evaluations] for name, curve in out["eval"].items()},
            }
    return None


def rate_of(done: dict[Run, dict], task: str, method: str) -> tuple[float | None, list[Run]]:
    """The learning rate that study.choose_rates would choose of RATES, or None and the runs that decide it. A rate is
    not run on the second tuning seed if it could not win any more even with a joint rate of 1 there; none is, and there
    is no choice, if all had less than LOST on the first."""
    runs = {lr: [Run(task, method, seed, lr) for seed in TUNING] for lr in RATES}
    outs = {lr: [find(done, run) for run in pair] for lr, pair in runs.items()}
    if missing := [runs[lr][0] for lr in RATES if not outs[lr][0]]:
        return None, missing
    merits = {
        lr: (
            np.mean([last(out) for out in pair]),
            np.mean([[*shares(out).values()] for out in pair]),
        )
        for lr, pair in outs.items()
        if all(pair)
    }
    promise = {lr: (last(outs[lr][0]) + 1) / 2 for lr in RATES if lr not in merits}
    if not merits and max(promise.values()) < (LOST + 1) / 2:
        return None, []
    if not merits:
        return None, [runs[max(promise, key=promise.get)][1]]
    if open_ones := [lr for lr, bound in promise.items() if bound >= max(merits.values())[0]]:
        return None, [runs[lr][1] for lr in open_ones]
    return max(merits, key=merits.get), []


def rates_of(done: dict[Run, dict], task: str, methods) -> dict[str, float]:
    """{method: learning rate} of those whose rate is decided."""
    source = "conflict" if task.startswith("K") else task
    chosen = {m: rate_of(done, source, study.TUNED.get(m, m))[0] for m in methods}
    return {m: rate for m, rate in chosen.items() if rate}


def held_out(
    done: dict[Run, dict], task: str, methods, n: int = study.HELD_OUT, **change
) -> dict[str, list[Run]]:
    """{method: its runs on the first n held-out seeds} for methods whose learning rate is decided."""
    return {
        m: [Run(task, m, seed, rate, **change) for seed in SEEDS[:n]]
        for m, rate in rates_of(done, task, methods).items()
    }


def stages(done: dict[Run, dict]) -> Iterator[list[Run]]:
    """Runs, the most important first. `done` has those of each stage when the next one is asked for."""

    def tuned(task: str, methods) -> Iterator[list[Run]]:
        while todo := [run for m in methods for run in rate_of(done, task, m)[1]]:
            yield todo

    def counted(task: str, methods, n: int = study.HELD_OUT, **change) -> list[Run]:
        runs = held_out(done, task, methods, n, **change).values()
        return [
            run for same_seed in zip(*runs, strict=True) for run in same_seed
        ]  # a seed after the other

    for task in study.TASKS:  # without conflict clipping changes nothing
        methods = *OURS, *(() if task == "no conflict" else CLIPPED[:5]), *OTHERS, *KNOWN
        yield from tuned(task, methods)
        yield counted(task, methods)
    for n in (study.FEW, study.HELD_OUT):
        yield [
            run
            for task, change in reversed(HARDER.values())
            for run in counted(task, ROBUST, n, **change)
            if n == study.FEW
            or max(map(last, outcomes(done, task, [run.method], **change)[run.method])) >= LOST
        ]
    for n in range(2, study.HELD_OUT + 1):
        yield counted("conflict", LONGER, n, times=LONG)
    yield from tuned("conflict", CLIPPED)
    yield counted("conflict", CLIPPED)


def against_rvpo(values: dict[str, list[float]], n: int) -> dict[str, list[str]]:
    """{method: rvpo - it, p, Holm's p} where both have n seeds. Corrected within others' methods, clipped ones and
    ours: of eight seeds no p is below 2/256, so that among more than six methods nothing could be significant."""
    out, full = {}, {m: v for m, v in values.items() if len(v) == n}
    for family in (OTHERS, CLIPPED, OURS) if "rvpo" in full else ():
        differences = {m: np.subtract(full["rvpo"], full[m]) for m in family if m in full}
        p = {m: sign_flip(d) for m, d in differences.items()}
        corrected = dict(zip(p, holm([*p.values()]), strict=True))
        out |= {
            m: [f"{np.mean(d):+.3f}", f"{p[m]:.4f}", f"{corrected[m]:.3f}"]
            for m, d in differences.items()
        }
    return out


def outcomes(done: dict[Run, dict], task: str, methods, **change) -> dict[str, list[dict]]:
    """{method: what its runs on held-out seeds gave}, as far as they have been run, from the first seed on."""
    out = {}
    for m, runs in held_out(done, task, methods, **change).items():
        found = [find(done, run) for run in runs]
        if found[0]:
            out[m] = found[: found.index(None)] if None in found else found
    return out


def compare(done: dict[Run, dict], task: str) -> str:
    """A task's table after 120 steps."""
    outs, rates = outcomes(done, task, METHODS), rates_of(done, task, METHODS)
    finals = {m: [last(out) for out in some] for m, some in outs.items()}
    tests, rows = against_rvpo(finals, study.HELD_OUT), []
    for m, some in outs.items():
        ends = {name: np.mean([shares(out)[name] for out in some]) for name in some[0]["full"]}
        worst = min(ends, key=ends.get)
        curves = np.array([out["eval"]["joint"] for out in some])
        rows.append(
            [
                m,
                f"{rates[m]:g}",
                str(len(some)),
                spread(finals[m]),
                f"{curves[:, (curves.shape[1] - 1) // 3].mean():.3f}",
                f"{worst} {ends[worst]:.2f}",
                str(sum(x >= 0.5 for x in finals[m])),
                *tests.get(m, ["", "", ""]),
            ]
        )
    return table(
        "| aggregation | lr | seeds | joint rate ± sd | after a third | worst channel | joint >= .5 "
        "| rvpo - it | p | Holm's p |",
        rows,
    )


def longer(done: dict[Run, dict]) -> str:
    """The table of the long runs."""
    outs = outcomes(done, "conflict", METHODS, times=LONG)
    tests, rows = (
        against_rvpo({m: [last(out) for out in some] for m, some in outs.items()}, study.HELD_OUT),
        [],
    )
    for m, some in outs.items():
        early = study.STEPS // study.EVERY
        at = {
            name: [
                np.mean([np.mean(out["eval"][name][i - 1 : i + 1]) for out in some])
                for i in (early, LONG * early)
            ]
            for name in ("joint", "length14", "values")
        }
        ends, peaks = [last(out) for out in some], [best(out) for out in some]
        rows.append(
            [
                m,
                str(len(some)),
                f"{at['joint'][0]:.3f}",
                f"{np.mean(peaks):.3f}",
                f"{np.mean(ends):.3f}",
                " ".join(f"{x:.2f}" for x in ends),
                f"{np.mean(np.subtract(peaks, ends)):.3f}",
                *(" → ".join(f"{x:.2f}" for x in at[name]) for name in ("length14", "values")),
                *tests.get(m, ["", "", ""]),
            ]
        )
    return table(
        f"| aggregation | seeds | after {study.STEPS} | best | after {LONG * study.STEPS} | of each seed "
        "| best - final | length14 | values | rvpo - it | p | Holm's p |",
        rows,
    )


def clipping(done: dict[Run, dict]) -> str:
    """What clipping changed, over the seeds that both have. Corrected within a task, where all eight are there."""
    rows = []
    for task, times in (("conflict", 1), ("precision", 1), ("conflict", LONG)):
        ends = {
            m: [last(out) for out in some]
            for m, some in outcomes(done, task, METHODS, times=times).items()
        }
        pairs = {
            m: [
                x[: min(len(ends[m]), len(ends[m.split()[0]]))]
                for x in (ends[m.split()[0]], ends[m])
            ]
            for m in CLIPPED
            if m in ends and m.split()[0] in ends
        }
        p = {m: sign_flip(np.subtract(*pair)) for m, pair in pairs.items()}
        counted = [m for m, pair in pairs.items() if len(pair[0]) == study.HELD_OUT]
        corrected = dict(zip(counted, holm([p[m] for m in counted]), strict=True))
        rows += [
            [
                m,
                task,
                str(times * study.STEPS),
                str(len(clip)),
                f"{np.mean(without):.3f}",
                f"{np.mean(clip):.3f}",
                f"{np.mean(np.subtract(clip, without)):+.3f}",
                f"{p[m]:.4f}",
                f"{corrected[m]:.3f}" if m in corrected else "",
            ]
            for m, (without, clip) in pairs.items()
        ]
    return table(
        "| aggregation | task | steps | seeds | without | clipped | difference | p | Holm's p |",
        rows,
    )


def overall(done: dict[Run, dict]) -> str:
    """Joint rate in every setting, and how far a method is below the best of each at most. Where clipping changes
    nothing a clipped method is what it clips."""
    settings = {task: (task, {}) for task in study.TASKS} | HARDER
    means = {}
    for title, (task, change) in settings.items():
        outs = outcomes(done, task, METHODS, **change)
        means[title] = {m: float(np.mean([*map(last, some)])) for m, some in outs.items()}
        if task == "no conflict":
            means[title] |= {
                f"{m} full": mean
                for m, mean in means[title].items()
                if f"{m} full" in means["conflict"]
            }
    rows = []
    for m in METHODS:
        cells = [f"{means[title][m]:.3f}" if m in means[title] else "" for title in settings]
        gap = max(
            (max(found.values()) - found.get(m, 0) for found in means.values() if found), default=0
        )
        if any(cells):
            rows.append([m, *cells, "" if "" in cells else f"{gap:.3f}"])
    return table("| aggregation | " + " | ".join(settings) + " | below the best, at most |", rows)


def tried(done: dict[Run, dict]) -> str:
    """Joint rates on the tuning seeds, by which rates and candidates were chosen."""
    rows = []
    for m in METHODS:
        for task in study.TASKS:
            found = [
                [last(done[run]) for seed in TUNING if (run := Run(task, m, seed, lr)) in done]
                for lr in RATES
            ]
            if any(found):
                rows.append([m, task, *(" ".join(f"{x:.2f}" for x in some) for some in found)])
    return table("| aggregation | task | " + " | ".join(f"{lr:g}" for lr in RATES) + " |", rows)


INTRODUCTION = """# More aggregations

Made by study/more.py of study/more.jsonl; tasks, policy and steps are those of [the study](study.md), the
aggregations are defined in study/others.py. The last 91 runs (of blend the held-out ones, of the harder settings seeds
3 to 7, of two methods 2) are of an AMD EPYC, the others of an Intel Xeon, and the study's tables of an EPYC: a pair of
runs from the two has the same prompts, not the same samples. The learning rate is chosen of 3e-4, 1e-3 and 3e-3 on two
tuning seeds, or on one where it could not win any more. "full": min(1, reward / full) instead of the reward. Joint
rate: the mean of a run's last two evaluations; ± the standard deviation over seeds. p: exact sign-flip test, paired by
seed, given for eight seeds; Holm's correction within others' methods, clipped ones and ours, each by itself (among more
than six methods eight seeds cannot show anything; this was decided after the first tables, where all were corrected
together and geometric's lead in conflict had .094). The runs of rvpo, gdpo, grpo, softmin and hardmin over 120 steps
are older than the others: the code rounded differently. Without conflict every channel is full at its best, so
clipping changes nothing there, nor where that task has noise. In the harder settings a method that is below
.05 in each of three seeds has no more of them.

"""


def tables(done: dict[Run, dict]) -> str:
    """docs/more.md."""
    parts = {
        f"{task} (K = {len(toy.SUITE[task][0])}), {study.STEPS} steps": compare(done, task)
        for task in study.TASKS
    }
    parts[
        f"conflict, {LONG * study.STEPS} steps (best: of the means of two evaluations in a row)"
    ] = longer(done)
    parts["What clipping changes"] = clipping(done)
    harder = {}
    for title, (task, change) in HARDER.items():
        for m, some in outcomes(done, task, (*ROBUST, *OURS), **change).items():
            ends = [last(out) for out in some]
            harder.setdefault(m, {})[title] = (
                f"{np.mean(ends):.3f} ({' '.join(f'{x:.2f}' for x in ends)})"
            )
    parts["Harder, joint rate (of each seed)"] = table(
        "| aggregation | " + " | ".join(HARDER) + " |",
        ([m, *(cells.get(title, "") for title in HARDER)] for m, cells in harder.items()),
    )
    parts["Does one never lose? Joint rate in every setting"] = overall(done)
    parts["Tuning seeds: joint rates of each at three learning rates"] = tried(done)
    return INTRODUCTION + "\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def main(file: Path, only_tables: bool) -> None:
    """See OPTIONS."""
    done = study.load(file)
    if only_tables:
        print(tables(done), end="")
        return
    torch.set_num_threads(1)  # before the processes fork
    for stage in stages(done):
        study.execute((run for run in stage if not find(done, run)), done, file, ("eval", "full"))


if __name__ == "__main__":
    main(OPTIONS.file, OPTIONS.tables)
