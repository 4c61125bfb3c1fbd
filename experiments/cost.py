"""What the paper's experiments cost, computed from their files: GPU-hours, disk, and what a judge is asked.

    python experiments/cost.py                      # all of them
    python experiments/cost.py tools                # one, with what is assumed; --memory simulates its GPUs, too
    python experiments/cost.py medicine --data FILE --tokenizer Qwen/Qwen2.5-7B-Instruct   # with a file's own lengths

Of it only updates and sampling of 1.5B were held against a GPU, see docs/gpu.md. Left out: loading, and waiting for a
judge that is slower than sampling.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

from config import JudgeOptions, TrainConfig
from experiments import roofline as roof
from experiments.files import NAMES, read
from experiments.lengths import EXPLAINED, LENGTHS, Lengths, count
from experiments.roofline import (
    MFU,
    Machine,
    cache_bytes,
    parameters,
    sample_seconds,
    update_seconds,
)
from infra.ranks import InputError
from local.shapes import QWEN
from tools.stats import table

REST = 0.1  # of sampling and update: pushing weights (NeMo-RL: .04 to .06 of a step), advantages, logs, checkpoints
EVAL_MEMORY = 0.9  # eval.py's --gpu-memory
RESPONSE = {  # tokens, assumed: the largest unknown. rlla's answers have 92, with the thoughts distilled for them 374
    "rlla": 200,
    "bfcl": 200,
    "rar-medicine": 500,
    "rar-science": 500,
    "healthbench": 500,
    "gpqa": 500,
}
BENCHMARKS = {
    "healthbench": (5000, 1, 2048),
    "gpqa": (198, 4, 2048),
    "bfcl": (3641, 1, 1024),
}  # items, repeats, limit
ANSWER, NEXT, REASON = (
    9,
    8,
    55,
)  # tokens of a verdict in its braces, of each further one, of two sentences (assumed)
BLOCK = 16  # tokens: a prefix cache holds whole blocks, of this size in vLLM
JUDGE, JUDGE_GPUS = "32B", 2  # the judge that docs/rubrics.md starts


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")
    add = parser.add_argument
    add("experiment", nargs="?", choices=NAMES, help="a file in experiments/ (default all)")
    add(
        "--gpu",
        choices=[*roof.BANDWIDTH],
        default="H100",
        help="each of 80 GB (default %(default)s)",
    )
    add("--gpus", type=int, default=8, help="that train a policy (default %(default)s)")
    add(
        "--mfu",
        type=float,
        default=MFU,
        help="model FLOP utilisation of the update (default %(default)s)",
    )
    add("--response", type=int, help="tokens of every response (default: 200 with tools, else 500)")
    add(
        "--memory",
        action="store_true",
        help="simulate what a GPU holds: half a minute a model or more",
    )
    add("--data", metavar="FILE", help="training data in the task's schema, whose lengths count")
    add("--eval-data", metavar="FILE", help="the same of the benchmark")
    add("--tokenizer", metavar="NAME", help="for these two: a model's hub id or directory")
    args = parser.parse_args(argv)
    if args.gpus < 1 or not 0 < args.mfu <= 1 or (args.response is not None and args.response < 1):
        parser.error("--gpus and --response must be 1 or more, --mfu above 0 and at most 1")
    if (args.data or args.eval_data or args.tokenizer) and not (args.experiment and args.tokenizer):
        parser.error("--data and --eval-data need the name of an experiment, and --tokenizer NAME")
    return args


# What a judge is asked


class Asked(NamedTuple):  # of a judge
    requests: float
    prompt: float  # tokens
    cached: float  # of these, in a prefix cache that forgets nothing within a prompt's group
    completion: float
    seconds: float  # of a local judge's GPUs together


def asked(
    lengths: Lengths, response: float, group: int, each: bool, explain: bool, machine: Machine
) -> Asked:
    """About a prompt's responses. each: a request a criterion, otherwise one a response."""
    k, before = lengths.criteria, lengths.begin + response + lengths.middle
    asks = k if each else 1
    prompt = group * (asks * (before + lengths.item) + (k - asks) * lengths.more)
    cached = BLOCK * (
        group * (asks - 1) * (before // BLOCK) + (group - 1) * (lengths.begin // BLOCK)
    )
    completion = group * (asks * (ANSWER + explain * REASON) + (k - asks) * NEXT)
    steps = (
        completion / JudgeOptions.model_fields["judge_concurrency"].default
    )  # so many requests at a time
    read = steps * 2 * sum(parameters(JUDGE)[:2]) + completion * before * cache_bytes(JUDGE)
    seconds = machine.prefill(JUDGE, prompt - cached) + machine.decode(
        steps * JUDGE_GPUS, read
    )  # its GPUs share it
    return Asked(group * asks, prompt, cached, completion, seconds)


# Runs


class Part(NamedTuple):  # a run's training, or the evaluation of all its policies
    task: str
    lengths: Lengths
    response: int
    groups: dict[int, int]  # {responses to a prompt: how many prompts have so many}

    def asked(self, each: bool, machine: Machine) -> Asked:
        parts = [
            [
                n * x
                for x in asked(
                    self.lengths, self.response, group, each, self.task in EXPLAINED, machine
                )
            ]
            for group, n in self.groups.items()
        ]
        return Asked(*map(sum, zip(*parts, strict=True)))


class Run(NamedTuple):
    name: str
    hours: tuple[float, float, float, float]  # of GPUs: update, sampling, rest, evaluation
    gigabytes: tuple[
        float, float
    ]  # policies in bf16 (the last one twice), state: fp32 weights and AdamW's two moments
    trained: Part
    evaluated: Part
    per_step: tuple[float, float]  # seconds of update and sampling


def size_of(model: str) -> str:
    found = [size for size in QWEN if f"/Qwen2.5-{size}" in model]
    if not found:
        raise InputError(f"{model}: only Qwen2.5's shapes are known, see local/shapes.py")
    return found[0]


def cost(
    name: str, train: dict, evaluate: dict, lengths: dict[str, Lengths], args: argparse.Namespace
) -> Run:
    """Of a run with these options of train.py, and of the evaluation of each policy that it keeps."""
    size, machine = size_of(train["model"]), Machine(args.gpu, args.gpus, args.mfu)
    kept = len({*range(0, train["steps"], train["eval_every"] or train["steps"]), train["steps"]})
    items, repeats, limit = BENCHMARKS[evaluate["task"]]
    items *= evaluate.get("repeats", repeats)
    trained, evaluated = (
        Part(task, lengths[task], args.response or RESPONSE[task], groups)
        for task, groups in (
            (
                train["task"],
                {
                    train["group"]: train["steps"] * train["prompts"],
                    1: kept * train["eval_prompts"],
                },
            ),
            (evaluate["task"], {1: kept * items}),
        )
    )
    shape = trained.lengths.prompt, trained.response, train["max_tokens"]
    test = evaluated.lengths.prompt, evaluated.response, limit
    update = update_seconds(size, *shape[:2], train, machine)
    sample = sample_seconds(
        size, train["prompts"], train["group"], shape, train["gpu_memory"], machine
    )
    held_out = kept * sample_seconds(
        size, train["eval_prompts"], 1, shape, train["gpu_memory"], machine
    )
    tested = kept * sample_seconds(size, items, 1, test, EVAL_MEMORY, machine)
    seconds = train["steps"] * update, train["steps"] * sample + held_out
    parts = *seconds, REST * sum(seconds), (1 + REST) * tested
    weights = parameters(size)[2] / 1e9
    return Run(
        name,
        tuple(args.gpus / 3600 * x for x in parts),
        (2 * weights * (kept + 1), 12 * weights),
        trained,
        evaluated,
        (update, sample),
    )


def plan(name: str, lengths: dict[str, Lengths], args: argparse.Namespace) -> dict[str, list[Run]]:
    """{model: its runs} of an experiment."""
    experiment, found = read(name), {}
    defaults = {key: field.default for key, field in TrainConfig.model_fields.items()}
    for label, model in experiment["models"].items():
        for method, chosen in experiment["methods"].items():
            train = defaults | model | experiment["train"] | chosen
            found.setdefault(label, []).extend(
                cost(
                    f"{train['task']}-{label}-{method}-s{seed}",
                    train,
                    experiment["eval"],
                    lengths,
                    args,
                )
                for seed in experiment["seeds"]
            )
    return found


# What is printed

HEADER = (
    "| GPU-hours of a run | new runs | update | sampling | rest | evaluations | together | wall, hours | disk, "
    "GB | judge's GPUs | new runs' GPU-hours | days |"
)
JUDGED = (
    "| judge, of a run, millions | requests | prompt tokens | of these cached | completion tokens "
    f"| GPU-hours of a {JUDGE} | runs | their GPU-hours |"
)


def tables(plans: dict[str, dict[str, list[Run]]], args: argparse.Namespace) -> str:
    """Of GPUs, and of judges. A run that an experiment shares with one before it is not counted again."""
    lines, asks, counted, machine = [], {}, {}, Machine(args.gpu, args.gpus, args.mfu)
    for name, of_model in plans.items():
        for label, runs in of_model.items():
            new = {run.name: run for run in runs if run.name not in counted}
            counted |= new
            hours, run = (
                [statistics.fmean(x) for x in zip(*(run.hours for run in runs), strict=True)],
                runs[0],
            )
            added = sum(sum(run.hours) for run in new.values())
            judge = [
                run.trained.asked(each, machine).seconds / 3600 / hours[1] * args.gpus
                for each in (True, False)
            ]
            lines.append(
                [
                    f"{name} {label}",
                    f"{len(new)} of {len(runs)}",
                    *(f"{x:.1f}" for x in (*hours, sum(hours))),
                    f"{sum(hours) / args.gpus:.1f}",
                    " + ".join(f"{x:.0f}" for x in run.gigabytes),
                    f"{judge[0]:.0f}, {judge[1]:.0f}" if run.trained.lengths.criteria else "",
                    f"{added:,.0f}",
                    f"{added / args.gpus / 24:.1f}",
                ]
            )
    hours = sum(sum(run.hours) for run in counted.values())
    lines.append(
        ["all", str(len(counted)), *[""] * 8, f"{hours:,.0f}", f"{hours / args.gpus / 24:.1f}"]
    )
    for run in counted.values():
        for part, what in ((run.trained, "train"), (run.evaluated, "evaluate")):
            for each in (True, False) if part.lengths.criteria else ():
                key = f"{part.task}, {what}, {'each' if each else 'all'}", part.asked(each, machine)
                asks[key] = asks.get(key, 0) + 1
    rows = [
        [
            what,
            *(f"{x / 1e6:,.2f}" for x in (a.requests, a.prompt, a.cached, a.completion)),
            f"{a.seconds / 3600:.0f}",
            str(n),
            f"{n * a.seconds / 3600:,.0f}",
        ]
        for (what, a), n in asks.items()
    ]
    return table(HEADER, lines) + ("\n" + table(JUDGED, rows) if rows else "")


def details(of_model: dict[str, list[Run]], args: argparse.Namespace) -> str:
    """What the tables of an experiment assume, a line each."""
    said = []
    for label, (run, *_) in of_model.items():
        (group, prompts), (update, sample) = next(iter(run.trained.groups.items())), run.per_step
        rate = prompts * group * run.trained.response / 3600 / run.hours[1]
        said.append(
            f"{label}: {update:.0f} s a step of update and {sample:.0f} of sampling, {rate:,.0f} tokens a "
            "second and GPU"
        )
    for part in (run.trained, run.evaluated):
        x = part.lengths
        said.append(
            f"{part.task}: prompts of {x.prompt:.0f} tokens ({x.source}), responses of {part.response}"
        )
        if x.criteria:
            said.append(
                f"its judge: {x.criteria:.2f} criteria, prompts of {x.begin:.0f} + response + {x.middle:.0f} + "
                f"{x.item:.0f} tokens, in mode all {x.more:.0f} for each further criterion"
            )
    said += [
        f"{args.gpu}: {args.mfu:g} of its peak in an update, {roof.PREFILL_MFU} on prompts; {roof.SHARE} of its "
        f"{roof.BANDWIDTH[args.gpu] / 1e12} TB/s in decoding, and {1e3 * roof.PAUSE:g} ms a step",
        f"at most {roof.SEQUENCES} sequences at a time on a GPU; the rest is {REST} of update and sampling",
    ]
    return "\n".join(f"- {line}" for line in said)


def memory(name: str, of_model: dict[str, list[Run]], args: argparse.Namespace) -> str:
    """GiB of each GPU while sampling / at an update's peak, a line a model."""
    from tools.simulate import cell

    experiment, said = read(name), []
    for label, (run, *_) in of_model.items():
        shape = {
            "prompt": round(run.trained.lengths.prompt),
            "response": run.trained.response,
            "group": next(iter(run.trained.groups)),
            "updates": experiment["train"].get("updates", 1),
        }
        gib = cell(size_of(experiment["models"][label]["model"]), args.gpus, **shape)
        said.append(f"- {name} {label}, GiB of a GPU while sampling / at the update's peak: {gib}")
    return "\n".join(said)


def main(args: argparse.Namespace) -> None:
    lengths = dict(LENGTHS)
    if args.tokenizer:
        from infra.pretrained import load_tokenizer

        try:
            tokenizer = load_tokenizer(args.tokenizer)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--tokenizer {args.tokenizer}: no tokenizer in that directory or on the hub"
            ) from error
        for part, path in (("train", args.data), ("eval", args.eval_data)):
            task = read(args.experiment)[part]["task"]
            lengths |= {task: count(task, path, tokenizer)} if path else {}
    # Those that share runs with another come after it.
    names = (
        [args.experiment]
        if args.experiment
        else sorted(NAMES, key=lambda name: ("like" in read(name), name))
    )
    plans = {name: plan(name, lengths, args) for name in names}
    print(tables(plans, args))
    for name in names:
        if args.experiment:
            print(details(plans[name], args))
        if args.memory:
            print(memory(name, plans[name], args), flush=True)


if __name__ == "__main__":
    try:
        main(options())
    except InputError as error:
        sys.exit(f"error: {error}")
