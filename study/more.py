"""More aggregations on the study's tasks (others.py), and runs three times as long.

    python study/more.py                              # goes on where it was stopped
    python study/more.py --tables > study/more.md     # from what has been run, nothing else

Each run is a line of study/more.jsonl: its settings and its evaluations. It is not run again.
As in study.py the learning rate is chosen on tuning seeds, then others count. A long run begins
as the short one, step by step, and stands for it.
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
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import toy
from report import after_a_third, against_rvpo, best, last, lasts, worst_channel

import study
from study import LONG, TUNING, Run, merit
from tools.stats import sign_flip, sign_flips, spread, table

RATES = study.RATES[1:]  # study.py never chose 1e-4
KNOWN = "rvpo", "gdpo", "grpo", "softmin", "hardmin"
OTHERS = "geometric", "dara", "dvao", "gd2po"
OURS = ("blend full",)
CLIPPED = "grpo full", "gdpo full", "softmin full", "geometric full", "rvpo full", "hardmin full"
METHODS = *KNOWN, *OTHERS, *CLIPPED, *OURS
LOST = 0.05  # a joint rate that is not followed up
# Run three times as long; gdpo is lost before.
LONGER = *CLIPPED[:5], "softmin", "geometric", "rvpo", "grpo", "hardmin"
HARDER = {  # title: task, what is done to it
    "K = 17": ("K = 17", {}),
    "no conflict, `safe` inverted in 30%": ("no conflict", {"channel": "safe", "wrong": 0.3}),
}
ROBUST = *OURS, *CLIPPED[:5], *KNOWN[:4], "geometric"  # run there, too
study.BETAS |= {name: study.BETAS.get(name.split()[0], "0") for name in METHODS}
study.BETAS["blend full"] = "2"


# What is run


def find(done: dict[Run, dict], run: Run) -> dict | None:
    """What a run has given, or the beginning of a longer one."""
    result = done.get(run) or done.get(run._replace(times=LONG))
    if result is None:
        return None
    evaluations = run.times * study.STEPS // study.EVERY + 1
    curves = {name: curve[:evaluations] for name, curve in result["eval"].items()}
    return result | {"eval": curves}


def rate_of(done: dict[Run, dict], task: str, method: str) -> tuple[float | None, list[Run]]:
    """The learning rate that study.choose_rates would choose of RATES, or None and what decides it.

    A rate is not run on the second tuning seed if it could not win any more even with a joint rate
    of 1 there. There is no choice, and nothing to run, if all had less than LOST on the first."""
    runs = {}
    for lr in RATES:
        runs[lr] = [Run(task, method, seed, lr) for seed in TUNING]
    missing = [first for first, _ in runs.values() if not find(done, first)]
    if missing:
        return None, missing
    merits, promises = {}, {}  # by learning rate
    for lr, (first, second) in runs.items():
        if find(done, second):
            merits[lr] = merit([find(done, first), find(done, second)])
        else:
            promises[lr] = (last(find(done, first)) + 1) / 2
    if not merits:
        promising = max(promises, key=promises.get)
        if promises[promising] < (LOST + 1) / 2:
            return None, []
        return None, [runs[promising][1]]
    best_rate, _ = max(merits.values())
    undecided = [runs[lr][1] for lr, promise in promises.items() if promise >= best_rate]
    if undecided:
        return None, undecided
    return max(merits, key=merits.get), []


def undecided(done: dict[Run, dict], task: str, methods) -> list[Run]:
    """What the learning rates of these methods wait for."""
    runs = []
    for method in methods:
        _, missing = rate_of(done, task, method)
        runs += missing
    return runs


def rates_of(done: dict[Run, dict], task: str, methods) -> dict[str, float]:
    """{method: learning rate} of those whose rate is decided."""
    source = "conflict" if task.startswith("K") else task
    rates = {}
    for method in methods:
        rate, _ = rate_of(done, source, study.TUNED.get(method, method))
        if rate:
            rates[method] = rate
    return rates


def held_out(
    done: dict[Run, dict], task: str, methods, n: int = study.HELD_OUT, **change
) -> dict[str, list[Run]]:
    """{method: its runs on the first n held-out seeds}, if its learning rate is decided."""
    runs = {}
    for method, rate in rates_of(done, task, methods).items():
        runs[method] = [Run(task, method, seed, rate, **change) for seed in range(n)]
    return runs


def stages(done: dict[Run, dict]) -> Iterator[list[Run]]:
    """Runs, the most important first. `done` has a stage's runs when the next one is asked for."""

    def tuned(task: str, methods) -> Iterator[list[Run]]:
        while runs := undecided(done, task, methods):
            yield runs

    def counted(task: str, methods, n: int = study.HELD_OUT, **change) -> list[Run]:
        runs = held_out(done, task, methods, n, **change).values()
        return list(itertools.chain(*zip(*runs, strict=True)))  # a seed after the other

    for task in study.TASKS:
        clipped = () if task == "no conflict" else CLIPPED[:5]  # clipping changes nothing there
        methods = *OURS, *clipped, *OTHERS, *KNOWN
        yield from tuned(task, methods)
        yield counted(task, methods)
    harder = [*HARDER.values()][::-1]
    yield [run for task, change in harder for run in counted(task, ROBUST, study.FEW, **change)]
    yield [
        run for task, change in harder for run in counted(task, alive(done, task, change), **change)
    ]
    for n in range(2, study.HELD_OUT + 1):
        yield counted("conflict", LONGER, n, times=LONG)
    yield from tuned("conflict", CLIPPED)
    yield counted("conflict", CLIPPED)


def alive(done: dict[Run, dict], task: str, change: dict) -> list[str]:
    """Methods that are not LOST in each of their seeds."""
    results = outcomes(done, task, ROBUST, **change)
    return [method for method, seeds in results.items() if max(lasts(seeds)) >= LOST]


# The tables


def outcomes(done: dict[Run, dict], task: str, methods=METHODS, **change) -> dict[str, list[dict]]:
    """{method: results on held-out seeds}, as far as they have been run, from the first seed on."""
    found = {}
    for method, runs in held_out(done, task, methods, **change).items():
        results = [find(done, run) for run in runs]
        results = list(itertools.takewhile(bool, results))
        if results:
            found[method] = results
    return found


def compared(results: dict[str, list[dict]]) -> dict[str, list[str]]:
    """`against_rvpo` where both have all seeds, corrected within each of three families.

    Of eight seeds no p is below 2/256: among more than six methods nothing could be significant."""
    full = {m: lasts(rows) for m, rows in results.items() if len(rows) == study.HELD_OUT}
    tests = {}
    for family in (OTHERS, CLIPPED, OURS) if "rvpo" in full else ():
        members = {method: full[method] for method in family if method in full}
        tests |= against_rvpo(full["rvpo"], members)
    return tests


def compare(done: dict[Run, dict], task: str) -> str:
    """A task's table after 120 steps."""
    outs, rates = outcomes(done, task), rates_of(done, task, METHODS)
    tests = compared(outs)
    rows = []
    for method, results in outs.items():
        finals = lasts(results)
        rows.append(
            [
                method,
                f"{rates[method]:g}",
                str(len(results)),
                spread(finals),
                f"{after_a_third(results):.3f}",
                worst_channel(results),
                str(sum(rate >= 0.5 for rate in finals)),
                *tests.get(method, ["", "", ""]),
            ]
        )
    return table(
        "| aggregation | lr | seeds | joint rate ± sd | after a third | worst channel "
        "| joint >= .5 | rvpo - it | p | Holm's p |",
        rows,
    )


def longer(done: dict[Run, dict]) -> str:
    """The table of the long runs."""
    outs = outcomes(done, "conflict", times=LONG)
    tests = compared(outs)
    rows = []
    for method, results in outs.items():
        finals, peaks = lasts(results), [best(result) for result in results]
        changes = []
        for channel in ("length14", "values"):
            changes.append(f"{early(results, channel):.2f} → {late(results, channel):.2f}")
        rows.append(
            [
                method,
                str(len(results)),
                f"{early(results, 'joint'):.3f}",
                f"{np.mean(peaks):.3f}",
                f"{np.mean(finals):.3f}",
                " ".join(f"{rate:.2f}" for rate in finals),
                f"{np.mean(np.subtract(peaks, finals)):.3f}",
                *changes,
                *tests.get(method, ["", "", ""]),
            ]
        )
    return table(
        f"| aggregation | seeds | after {study.STEPS} | best | after {LONG * study.STEPS} "
        "| of each seed | best - final | length14 | values | rvpo - it | p | Holm's p |",
        rows,
    )


def early(results: list[dict], channel: str) -> float:
    """Where a short run would end: mean over seeds and the last two evaluations of 120 steps."""
    place = study.STEPS // study.EVERY
    return np.mean([result["eval"][channel][place - 1 : place + 1] for result in results])


def late(results: list[dict], channel: str) -> float:
    return np.mean([last(result, channel) for result in results])


def clipping(done: dict[Run, dict]) -> str:
    """What clipping changed, over the seeds that both have. Corrected within a task and length."""
    rows = []
    for task, times in (("conflict", 1), ("precision", 1), ("conflict", LONG)):
        pairs = clipped_pairs(outcomes(done, task, times=times))
        differences = {m: np.subtract(clip, without) for m, (without, clip) in pairs.items()}
        p = {method: sign_flip(difference) for method, difference in differences.items()}
        full = {m: d for m, d in differences.items() if len(d) == study.HELD_OUT}
        corrected = {m: f"{holm:.3f}" for m, (_, holm) in sign_flips(full).items()}
        for method, (without, clip) in pairs.items():
            rows.append(
                [
                    method,
                    task,
                    str(times * study.STEPS),
                    str(len(clip)),
                    f"{np.mean(without):.3f}",
                    f"{np.mean(clip):.3f}",
                    f"{np.mean(differences[method]):+.3f}",
                    f"{p[method]:.4f}",
                    corrected.get(method, ""),
                ]
            )
    return table(
        "| aggregation | task | steps | seeds | without | clipped | difference | p | Holm's p |",
        rows,
    )


def clipped_pairs(results: dict[str, list[dict]]) -> dict[str, tuple[list[float], list[float]]]:
    """{clipped method: joint rates without clipping, and with it, of the seeds that both have}."""
    pairs = {}
    for method in CLIPPED:
        plain = method.removesuffix(" full")
        if method in results and plain in results:
            seeds = min(len(results[method]), len(results[plain]))
            pairs[method] = lasts(results[plain][:seeds]), lasts(results[method][:seeds])
    return pairs


def harder(done: dict[Run, dict]) -> str:
    cells = {}
    for title, (task, change) in HARDER.items():
        for method, results in outcomes(done, task, (*ROBUST, *OURS), **change).items():
            finals = lasts(results)
            seeds = " ".join(f"{rate:.2f}" for rate in finals)
            cells.setdefault(method, dict.fromkeys(HARDER, ""))
            cells[method][title] = f"{np.mean(finals):.3f} ({seeds})"
    rows = [[method, *of_titles.values()] for method, of_titles in cells.items()]
    return table("| aggregation | " + " | ".join(HARDER) + " |", rows)


def overall(done: dict[Run, dict]) -> str:
    """Joint rate in every setting, and how far a method is below the best of each at most.

    Where clipping changes nothing a clipped method is what it clips."""
    means = {}  # setting: method: joint rate
    for title, (task, change) in ({task: (task, {}) for task in study.TASKS} | HARDER).items():
        results = outcomes(done, task, **change)
        means[title] = {method: float(np.mean(lasts(seeds))) for method, seeds in results.items()}
        if task == "no conflict":
            for method in results:
                if f"{method} full" in means["conflict"]:
                    means[title][f"{method} full"] = means[title][method]
    rows = []
    for method in METHODS:
        rates = [of_method.get(method) for of_method in means.values()]
        if any(rate is not None for rate in rates):
            gap = ""
            if None not in rates:
                tops = [max(of_method.values()) for of_method in means.values()]
                gap = f"{max(np.subtract(tops, rates)):.3f}"
            rows.append([method, *("" if rate is None else f"{rate:.3f}" for rate in rates), gap])
    return table("| aggregation | " + " | ".join(means) + " | below the best, at most |", rows)


def tried(done: dict[Run, dict]) -> str:
    """Joint rates on the tuning seeds, by which rates and candidates were chosen."""
    rows = []
    for method in METHODS:
        for task in study.TASKS:
            cells = []
            for lr in RATES:
                runs = [Run(task, method, seed, lr) for seed in TUNING]
                cells.append(" ".join(f"{last(done[run]):.2f}" for run in runs if run in done))
            if any(cells):
                rows.append([method, task, *cells])
    return table("| aggregation | task | " + " | ".join(f"{lr:g}" for lr in RATES) + " |", rows)


INTRODUCTION = """# More aggregations

Made by study/more.py from study/more.jsonl. Tasks, policy and steps are those of [the
study](study.md); study/others.py defines the aggregations. "full" means that the reward is
min(1, reward / full). The joint rate is the mean of a run's last two evaluations, ± the standard
deviation over seeds.

**Learning rates** are chosen of 3e-4, 1e-3 and 3e-3 on two tuning seeds, or on one if a rate could
not win any more.

**p** is that of the exact sign-flip test, paired by seed, and given for eight seeds. Holm's
correction is applied within three families: others' methods, clipped ones, and ours. Eight seeds
cannot show anything among more than six methods. This was decided after the first tables, where all
were corrected together and geometric's lead in conflict had .094.

**Machines:** the last 91 runs are of an AMD EPYC, as the study's tables are; the others are of an
Intel Xeon. A pair of runs from the two has the same prompts, not the same samples. The 91 are the
held-out seeds of blend, seeds 3 to 7 of the harder settings, and seed 2 of two methods. The runs of
rvpo, gdpo, grpo, softmin and hardmin over 120 steps are older: their code rounded differently.

**Not run:** without conflict every channel is full at its best, so clipping changes nothing there,
nor where that task has noise. A method that is below .05 in each of three seeds of a harder setting
has no more seeds there.

"""


def tables(done: dict[Run, dict]) -> str:
    """study/more.md."""
    parts = {}
    for task in study.TASKS:
        channels, _ = toy.SUITE[task]
        parts[f"{task} (K = {len(channels)}), {study.STEPS} steps"] = compare(done, task)
    long = f"conflict, {LONG * study.STEPS} steps"
    parts |= {
        f"{long} (best: of the means of two evaluations in a row)": longer(done),
        "What clipping changes": clipping(done),
        "Harder, joint rate (of each seed)": harder(done),
        "Does one never lose? Joint rate in every setting": overall(done),
        "Tuning seeds: joint rates of each at three learning rates": tried(done),
    }
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
