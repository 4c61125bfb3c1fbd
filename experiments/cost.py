"""What the paper's experiments cost: GPU-hours, disk, and what a judge is asked.

    python experiments/cost.py                  # all of them
    python experiments/cost.py tools            # one, with what is assumed
    python experiments/cost.py tools --memory   # with a simulation of its GPUs' memory
    python experiments/cost.py medicine --data FILE --tokenizer Qwen/Qwen2.5-7B-Instruct
                                                # with the lengths of that file

It is computed from the experiments' files. Only updates and sampling of 1.5B were held against a
GPU, see docs/gpu.md. Left out: loading, and waiting for a judge that is slower than sampling.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

from config import JudgeOptions, TrainConfig
from experiments import roofline
from experiments.files import NAMES, read
from experiments.lengths import EXPLAINED, LENGTHS, Lengths, count
from experiments.roofline import Machine, sample_seconds, update_seconds
from infra.ranks import InputError
from local.shapes import QWEN
from tools.stats import table

# Of sampling and update: pushing weights (NeMo-RL: .04 to .06 of a step), advantages, logs,
# checkpoints.
REST = 0.1
EVAL_MEMORY = 0.9  # eval.py's --gpu-memory
# Tokens of a response, assumed: the largest unknown. rlla's answers have 92, with the thoughts
# distilled for them 374.
RESPONSE = {
    "rlla": 200,
    "bfcl": 200,
    "rar-medicine": 500,
    "rar-science": 500,
    "healthbench": 500,
    "gpqa": 500,
}
BENCHMARKS = {  # items, repeats, most tokens of a response
    "healthbench": (5000, 1, 2048),
    "gpqa": (198, 4, 2048),
    "bfcl": (3641, 1, 1024),
}
ANSWER = 9  # tokens of a verdict in its braces
NEXT = 8  # of each further verdict
REASON = 55  # of two sentences; assumed
BLOCK = 16  # tokens: a prefix cache holds whole blocks, of this size in vLLM
JUDGE, JUDGE_GPUS = "32B", 2  # the judge that docs/rubrics.md starts


def main(args: argparse.Namespace) -> None:
    lengths = LENGTHS | counted_lengths(args)
    # Experiments that share runs with another come after it.
    names = sorted(NAMES, key=lambda name: ("like" in read(name), name))
    if args.experiment:
        names = [args.experiment]
    plans = {name: plan(name, lengths, args) for name in names}
    print(tables(plans, args))
    for name in names:
        if args.experiment:
            print(details(plans[name], args))
        if args.memory:
            print(memory(name, plans[name], args), flush=True)


def options(argv: list[str] | None = None) -> argparse.Namespace:
    def fail(message: str) -> NoReturn:
        sys.exit(f"error: {message}; see --help")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    add = parser.add_argument
    add("experiment", nargs="?", choices=NAMES, help="a file in experiments/ (default all)")
    gpus = [*roofline.BANDWIDTH]
    add("--gpu", choices=gpus, default="H100", help="each of 80 GB (default %(default)s)")
    add("--gpus", type=int, default=8, help="that train a policy (default %(default)s)")
    mfu = "model FLOP utilisation of the update (default %(default)s)"
    add("--mfu", type=float, default=roofline.MFU, help=mfu)
    add("--response", type=int, help="tokens of every response (default: 200 with tools, else 500)")
    simulated = "simulate what a GPU holds: half a minute a model or more"
    add("--memory", action="store_true", help=simulated)
    add("--data", metavar="FILE", help="training data in the task's schema, whose lengths count")
    add("--eval-data", metavar="FILE", help="the same of the benchmark")
    add("--tokenizer", metavar="NAME", help="for these two: a model's hub id or directory")
    args = parser.parse_args(argv)
    if args.gpus < 1 or not 0 < args.mfu <= 1 or (args.response is not None and args.response < 1):
        parser.error("--gpus and --response must be 1 or more, --mfu above 0 and at most 1")
    if (args.data or args.eval_data or args.tokenizer) and not (args.experiment and args.tokenizer):
        parser.error("--data and --eval-data need the name of an experiment, and --tokenizer NAME")
    return args


def counted_lengths(args: argparse.Namespace) -> dict[str, Lengths]:
    """{task: lengths} of --data and --eval-data. Raises InputError."""
    if not args.tokenizer:
        return {}
    from infra.pretrained import load_tokenizer

    try:
        tokenizer = load_tokenizer(args.tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--tokenizer {args.tokenizer}: no tokenizer in that directory or on the hub"
        ) from error
    counted = {}
    for part, path in (("train", args.data), ("eval", args.eval_data)):
        if path:
            task = read(args.experiment)[part]["task"]
            counted[task] = count(task, path, tokenizer)
    return counted


# What a judge is asked


class Asked(NamedTuple):  # of a judge
    requests: float
    prompt: float  # tokens
    cached: float  # of these, in a prefix cache that forgets nothing within a prompt's group
    completion: float
    seconds: float  # of a local judge's GPUs together

    def times(self, n: int) -> "Asked":
        return Asked(*(n * value for value in self))


def asked(
    lengths: Lengths, response: float, group: int, each: bool, explain: bool, machine: Machine
) -> Asked:
    """About a prompt's responses. each: a request a criterion, otherwise one a response."""
    requests = lengths.criteria if each else 1  # about one response
    further = lengths.criteria - requests  # criteria in a request beside its first
    before = lengths.begin + response + lengths.middle
    prompt = group * (requests * (before + lengths.item) + further * lengths.more)
    again = group * (requests - 1) * (before // BLOCK)  # blocks, of the same response
    cached = BLOCK * (again + (group - 1) * (lengths.begin // BLOCK))
    completion = group * (requests * (ANSWER + explain * REASON) + further * NEXT)
    at_a_time = JudgeOptions.model_fields["judge_concurrency"].default
    steps = completion / at_a_time
    judge = roofline.parameters(JUDGE)
    weights = 2 * (judge.matrices + judge.head)  # bytes
    bytes_read = steps * weights + completion * before * roofline.cache_bytes(JUDGE)
    # The judge's GPUs share what is read.
    decoding = machine.decode(steps * JUDGE_GPUS, bytes_read)
    seconds = machine.prefill(JUDGE, prompt - cached) + decoding
    return Asked(group * requests, prompt, cached, completion, seconds)


# Runs


class Part(NamedTuple):  # a run's training, or the evaluation of all its policies
    task: str
    lengths: Lengths
    response: int
    groups: dict[int, int]  # {responses to a prompt: the number of such prompts}

    def asked(self, each: bool, machine: Machine) -> Asked:
        explain = self.task in EXPLAINED
        of_groups = []
        for group, prompts in self.groups.items():
            once = asked(self.lengths, self.response, group, each, explain, machine)
            of_groups.append(once.times(prompts))
        return Asked(*map(sum, zip(*of_groups, strict=True)))


class Hours(NamedTuple):  # of GPUs
    update: float
    sampling: float
    rest: float
    evaluation: float


class Run(NamedTuple):
    name: str
    hours: Hours
    # Policies in bf16 (the last one twice), and the state: fp32 weights, AdamW's two moments.
    gigabytes: tuple[float, float]
    trained: Part
    evaluated: Part
    update: float  # seconds of a step
    sampling: float


def plan(name: str, lengths: dict[str, Lengths], args: argparse.Namespace) -> dict[str, list[Run]]:
    """{model: its runs} of an experiment."""
    experiment = read(name)
    defaults = {key: field.default for key, field in TrainConfig.model_fields.items()}
    runs = {}
    for label, model in experiment["models"].items():
        runs[label] = []
        for method, chosen in experiment["methods"].items():
            train = defaults | model | experiment["train"] | chosen
            for seed in experiment["seeds"]:
                run = f"{train['task']}-{label}-{method}-s{seed}"
                runs[label].append(cost(run, train, experiment["eval"], lengths, args))
    return runs


def cost(
    name: str, train: dict, evaluate: dict, lengths: dict[str, Lengths], args: argparse.Namespace
) -> Run:
    """Of a run with these options of train.py, and of evaluating each policy that it keeps."""

    def part(task: str, groups: dict[int, int]) -> Part:
        return Part(task, lengths[task], args.response or RESPONSE[task], groups)

    size = size_of(train["model"])
    machine = Machine(args.gpu, args.gpus, args.mfu)
    steps, prompts, held_out = train["steps"], train["prompts"], train["eval_prompts"]
    policies = len({*range(0, steps, train["eval_every"] or steps), steps})
    items, repeats, limit = BENCHMARKS[evaluate["task"]]
    items *= evaluate.get("repeats", repeats)
    trained = part(train["task"], {train["group"]: steps * prompts, 1: policies * held_out})
    evaluated = part(evaluate["task"], {1: policies * items})

    prompt, response = trained.lengths.prompt, trained.response
    update = update_seconds(size, prompt, response, train, machine)

    def sampling(prompts: int, group: int) -> float:
        shape = prompt, response, train["max_tokens"]
        return sample_seconds(size, prompts, group, shape, train["gpu_memory"], machine)

    step = sampling(prompts, train["group"])
    test = evaluated.lengths.prompt, evaluated.response, limit
    evaluation = policies * sample_seconds(size, items, 1, test, EVAL_MEMORY, machine)
    seconds = steps * update, steps * step + policies * sampling(held_out, 1)
    parts = *seconds, REST * sum(seconds), (1 + REST) * evaluation
    hours = Hours(*(args.gpus / 3600 * part for part in parts))
    billions = roofline.parameters(size).total / 1e9
    gigabytes = 2 * billions * (policies + 1), 12 * billions
    return Run(name, hours, gigabytes, trained, evaluated, update, step)


def size_of(model: str) -> str:
    for size in QWEN:
        if f"/Qwen2.5-{size}" in model:
            return size
    raise InputError(f"{model}: only Qwen2.5's shapes are known, see local/shapes.py")


# What is printed

HEADER = (
    "| GPU-hours of a run | new runs | update | sampling | rest | evaluations | together "
    "| wall, hours | disk, GB | judge's GPUs | new runs' GPU-hours | days |"
)
JUDGED = (
    "| judge, of a run, millions | requests | prompt tokens | of these cached | completion tokens "
    f"| GPU-hours of a {JUDGE} | runs | their GPU-hours |"
)


def tables(plans: dict[str, dict[str, list[Run]]], args: argparse.Namespace) -> str:
    """Of GPUs, and of judges. A run that experiments share is counted in the first of them."""
    counted: dict[str, Run] = {}
    rows = []
    for name, of_model in plans.items():
        for label, runs in of_model.items():
            new = {run.name: run for run in runs if run.name not in counted}
            counted |= new
            rows.append([f"{name} {label}", *gpu_cells(runs, [*new.values()], args)])
    hours = hours_together(counted.values())
    days = hours / args.gpus / 24
    rows.append(["all", str(len(counted)), *[""] * 8, f"{hours:,.0f}", f"{days:.1f}"])
    judged = judge_rows(counted.values(), Machine(args.gpu, args.gpus, args.mfu))
    gpus = table(HEADER, rows)
    return f"{gpus}\n{table(JUDGED, judged)}" if judged else gpus


def hours_together(runs: Iterable[Run]) -> float:
    return sum(sum(run.hours) for run in runs)


def gpu_cells(runs: list[Run], new: list[Run], args: argparse.Namespace) -> list[str]:
    """A row of HEADER without its name. new: the runs that no earlier experiment has."""
    run, *_ = runs
    hours = Hours(*map(statistics.fmean, zip(*(run.hours for run in runs), strict=True)))
    policies, state = run.gigabytes
    judge_gpus = ""
    if run.trained.lengths.criteria:
        machine = Machine(args.gpu, args.gpus, args.mfu)
        needed = []
        for each in (True, False):
            judging = run.trained.asked(each, machine).seconds / 3600
            needed.append(f"{judging / hours.sampling * args.gpus:.0f}")
        judge_gpus = ", ".join(needed)
    added = hours_together(new)
    return [
        f"{len(new)} of {len(runs)}",
        *(f"{part:.1f}" for part in hours),
        f"{sum(hours):.1f}",
        f"{sum(hours) / args.gpus:.1f}",
        f"{policies:.0f} + {state:.0f}",
        judge_gpus,
        f"{added:,.0f}",
        f"{added / args.gpus / 24:.1f}",
    ]


def judge_rows(runs: Iterable[Run], machine: Machine) -> list[list[str]]:
    """Rows of JUDGED. Runs whose judge is asked the same are one row."""
    asks = Counter()
    for run in runs:
        for part, what in ((run.trained, "train"), (run.evaluated, "evaluate")):
            if part.lengths.criteria:
                asks[f"{part.task}, {what}, each", part.asked(True, machine)] += 1
                asks[f"{part.task}, {what}, all", part.asked(False, machine)] += 1
    rows = []
    for (name, of_run), n in asks.items():
        *amounts, seconds = of_run
        hours = seconds / 3600
        millions = [f"{amount / 1e6:,.2f}" for amount in amounts]
        rows.append([name, *millions, f"{hours:.0f}", str(n), f"{n * seconds / 3600:,.0f}"])
    return rows


def details(of_model: dict[str, list[Run]], args: argparse.Namespace) -> str:
    """What the tables of an experiment assume, a line each."""
    lines = []
    for label, (run, *_) in of_model.items():
        (group, prompts), *_ = run.trained.groups.items()
        rate = prompts * group * run.trained.response / 3600 / run.hours.sampling
        lines.append(
            f"{label}: {run.update:.0f} s a step of update and {run.sampling:.0f} of sampling, "
            f"{rate:,.0f} tokens a second and GPU"
        )
    for part in (run.trained, run.evaluated):
        lengths = part.lengths
        lines.append(
            f"{part.task}: prompts of {lengths.prompt:.0f} tokens ({lengths.source}), responses "
            f"of {part.response}"
        )
        if lengths.criteria:
            lines.append(
                f"its judge: {lengths.criteria:.2f} criteria, prompts of {lengths.begin:.0f} + "
                f"response + {lengths.middle:.0f} + {lengths.item:.0f} tokens, in mode all "
                f"{lengths.more:.0f} for each further criterion"
            )
    bandwidth = roofline.BANDWIDTH[args.gpu] / 1e12
    lines.append(
        f"{args.gpu}: {args.mfu:g} of its peak in an update, {roofline.PREFILL_MFU} on prompts; "
        f"{roofline.SHARE} of its {bandwidth} TB/s in decoding, and {1e3 * roofline.PAUSE:g} ms "
        "a step"
    )
    lines.append(
        f"at most {roofline.SEQUENCES} sequences at a time on a GPU; the rest is {REST} of update "
        "and sampling"
    )
    return "\n".join(f"- {line}" for line in lines)


def memory(name: str, of_model: dict[str, list[Run]], args: argparse.Namespace) -> str:
    """GiB of each GPU while sampling / at an update's peak, a line a model."""
    from tools.simulate import cell

    experiment = read(name)
    lines = []
    for label, (run, *_) in of_model.items():
        group, *_ = run.trained.groups
        gib = cell(
            size_of(experiment["models"][label]["model"]),
            args.gpus,
            prompt=round(run.trained.lengths.prompt),
            response=run.trained.response,
            group=group,
            updates=experiment["train"].get("updates", 1),
        )
        lines.append(f"- {name} {label}, GiB of a GPU while sampling / at the update's peak: {gib}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(options())
    except InputError as error:
        sys.exit(f"error: {error}")
