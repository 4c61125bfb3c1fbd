"""One training step, by phase, of this code and of TRL's GRPOTrainer: same model, prompts, lengths, precision, threads.

    pip install --no-deps -r requirements-bench.txt   # on a GPU machine; make does it on a CPU
    python tools/step.py                       # the case of this machine: SmolLM2 on a CPU, a 1.5B Qwen2.5 on a GPU
    python tools/step.py --prompt-tokens 1000  # another one
    python tools/step.py --growth              # our own step with 1, 2, 4 and 8 times the tokens, and on 2 ranks

Each of the two is a process of its own, and the second starts when the first has loaded: vLLM takes memory that another
process claims meanwhile for its own. Their steps alternate, after one for warming up, so that whatever else the machine
does hits both. One JSON line a case: medians in seconds, ratios TRL / ours, peak memory. Every response has
exactly --response-tokens tokens.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

from infra.ranks import RANK
from local.machine import cores, processor

SHARE = 0.15  # of the GPU, for each vLLM
PHASES = "sample", "score", "advantage", "update", "sync"
CUDA_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bfloat16, by the vendor's data sheets


def options() -> argparse.Namespace:
    gpu = shutil.which("nvidia-smi") is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        default="random-1.5B" if gpu else "smollm2",
        help="smollm2, tiny, a directory, or random-SIZE: "
        "random weights in the shape of Qwen2.5 0.5B, 1.5B, 3B, 7B or 14B (default %(default)s)",
    )
    add("--prompt-tokens", type=int, default=1000 if gpu else 300, help="P (default %(default)s)")
    add("--response-tokens", type=int, default=256 if gpu else 48, help="R (default %(default)s)")
    add("--group", type=int, default=16 if gpu else 8, help="G (default %(default)s)")
    add("--prompts", type=int, default=4 if gpu else 1, help="prompts a step (default %(default)s)")
    add("--steps", type=int, default=5, help="of each, after the warm-up (default %(default)s)")
    add(
        "--trl-batch",
        type=int,
        default=4 if gpu else 0,
        help="TRL: rows a forward, 0: a group (default %(default)s)",
    )
    add(
        "--trl-checkpointing",
        action="store_true",
        help="gradient checkpointing in TRL: slower, less memory",
    )
    add(
        "--trl-sampler",
        default="vllm" if gpu else "transformers",
        help="or vllm (default %(default)s)",
    )
    add(
        "--engine", default="auto", help="our sampler, vllm or hf; auto: vllm where it is installed"
    )
    add("--growth", action="store_true", help="only our own step, growing")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.gpu = gpu
    if args.engine == "auto":
        args.engine = "vllm" if importlib.util.find_spec("vllm") else "hf"
    return args


# In both workers: what is measured, and how they take turns


def vowels(completions, **_) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def letters(completions, **_) -> list[float]:
    return [len(set(text)) / 100 for text in completions]


def make_prompts(tokenizer, n: int, length: int) -> list[str]:
    """Texts of exactly so many tokens."""
    words = [
        word
        for word in (
            " the",
            " tool",
            " of",
            " and",
            " call",
            " name",
            " city",
            " user",
            "a",
            "b",
            "c",
            "d",
        )
        if len(tokenizer(word * 8).input_ids) == 8
    ]
    texts = [
        (words[i % len(words)] + words[i // len(words) % len(words)]) * length for i in range(n)
    ]
    cut = [tokenizer.decode(tokenizer(text).input_ids[:length]) for text in texts]
    if {len(tokenizer(text).input_ids) for text in cut} != {length}:
        raise SystemExit("error: no text has that many tokens with this tokenizer")
    return cut


def turn(report: dict) -> None:
    """Hand a step's figures to the parent, and wait until it is this worker's turn again."""
    import torch

    report["peak_gb"] = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ) / 1e9
    if RANK == 0:
        print("REPORT " + json.dumps(report), flush=True)
        sys.stdin.readline()


def ours(args: argparse.Namespace) -> None:
    """train.fit itself."""
    import policy
    import train
    import update
    from config import TrainConfig
    from infra import pretrained, prompts
    from infra.log import Log
    from infra.ranks import join
    from infra.state import NoCheckpoints
    from local import models
    from rewards import Channel, Example, Task
    from rollout import Decoding, Sampler, VLLMEngine

    class Turns(Log):
        """A step's record is the report; nothing is written."""

        def metrics(self, record: dict) -> None:
            turn(
                {phase: record["seconds"][phase] for phase in PHASES}
                | {
                    "gap": record["sampler_gap"],
                    "tokens": record["length_mean"] * args.prompts * args.group,
                }
            )

        def samples(self, records: list[dict]) -> None:
            pass

        def say(self, line: str) -> None:
            pass

    name = str(models.resolve(args.model))
    path, tokenizer, stops, *_ = pretrained.describe(name, args.response_tokens)
    texts = make_prompts(tokenizer, args.prompts, args.prompt_tokens)
    prompts = [
        prompts.Prompt(tokenizer(text).input_ids, Example([{"role": "user", "content": text}]))
        for text in texts
    ]
    config = TrainConfig(
        prompts=args.prompts,
        group=args.group,
        steps=args.steps + 1,
        lr=1e-6,
        tokens_per_microbatch=6000 if args.gpu else 16384,
    )  # the two share a GPU
    device = join()
    trained = policy.load(path, device, policy.make_mesh(device))
    decoding = Decoding(tokenizer, stops, 1.0, args.response_tokens)
    if args.engine == "vllm":
        engine = VLLMEngine(
            path,
            decoding,
            args.prompt_tokens + args.response_tokens,
            SHARE,
            at_a_time=min(32, args.prompts * args.group),
        )
        engine.sampling |= {"ignore_eos": True, "stop_token_ids": []}
    else:
        from local import hf

        engine = hf.HFEngine(hf.load(path, device, policy.compute_dtype(device)), decoding)
        engine.config.min_new_tokens = args.response_tokens
    task = Task(
        None,
        [
            Channel("vowels", lambda _, responses, references: vowels(responses)),
            Channel("letters", lambda _, responses, references: letters(responses)),
        ],
    )
    learner = update.Learner(trained, None, update.make_optimizer(trained, config.lr), device)
    train.fit(
        config,
        learner,
        Sampler(engine, task, 0),
        prompts,
        Turns(),
        lambda step: None,
        NoCheckpoints(),
    )


def trl(args: argparse.Namespace) -> None:
    """GRPOTrainer, its phases timed around its own methods. What it does between sampling and the forward that has a
    gradient (old log-probs, if it wants any) counts as update, the advantages too."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from local import models

    path = models.resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = make_prompts(tokenizer, args.prompts, args.prompt_tokens)
    rows = args.trl_batch or args.group
    fixed = {"min_tokens" if args.trl_sampler == "vllm" else "min_new_tokens": args.response_tokens}
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=args.steps + 1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=args.group * args.prompts // rows,
        num_generations=args.group,
        max_completion_length=args.response_tokens,
        generation_kwargs=fixed,
        learning_rate=1e-6,
        beta=0.0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=args.gpu,
        use_cpu=not args.gpu,
        gradient_checkpointing=args.trl_checkpointing,
        multi_objective_aggregation="normalize_then_sum",
        optim="adamw_torch_fused",
        dataloader_num_workers=0,
        use_liger_kernel=args.gpu,
        use_vllm=args.trl_sampler == "vllm",
        vllm_gpu_memory_utilization=SHARE,
        model_init_kwargs={"dtype": torch.float32},
    )
    seconds: dict[str, float] = {}

    class Phases(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seconds.clear()
            seconds["begin"] = self.now()

        def on_step_end(self, *more, **kwargs):
            step = self.now() - seconds["begin"]
            sync, score = seconds.get("_sync", 0.0), seconds["_calculate_rewards"]
            sample = seconds["_generate"] - sync
            turn(
                {
                    "sample": sample,
                    "score": score,
                    "advantage": 0.0,
                    "sync": sync,
                    "update": step - sample - sync - score,
                    "tokens": args.response_tokens * args.group * args.prompts,
                }
            )

        @staticmethod
        def now() -> float:
            if args.gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

    trainer = GRPOTrainer(
        str(path),
        [vowels, letters],
        config,
        Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Phases()],
    )

    def timed(holder, method: str, name: str) -> None:
        inner = getattr(holder, method)

        def call(*values, **keys):
            begin = Phases.now()
            out = inner(*values, **keys)
            seconds[name] = seconds.get(name, 0.0) + Phases.now() - begin
            return out

        setattr(holder, method, call)

    timed(trainer, "_generate", "_generate")
    timed(trainer, "_calculate_rewards", "_calculate_rewards")
    if args.trl_sampler == "vllm":
        timed(trainer.vllm_generation, "sync_weights", "_sync")
    trainer.train()


# The parent


class Worker:
    """A process that reports each of its steps, and waits for its turn after it."""

    def __init__(self, name: str, ranks: int = 1, **changed):
        argv = [
            x
            for key, value in changed.items()
            for x in (f"--{key.replace('_', '-')}", str(value))
            if value is not True and value is not False
        ]
        argv += [f"--{key.replace('_', '-')}" for key, value in changed.items() if value is True]
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            if ranks > 1
            else []
        )
        self.log = tempfile.NamedTemporaryFile(
            "w+", prefix=f"bench-{name}-", suffix=".log", delete=False
        )
        threads = str(max(1, cores() // ranks))
        self.process = subprocess.Popen(
            [sys.executable, *launcher, __file__, *argv, "--worker", name],
            stdin=subprocess.PIPE,
            text=True,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )

    def step(self) -> dict[str, float]:
        """The report of one step; the worker waits afterwards."""
        for line in self.process.stdout:
            if line.startswith("REPORT "):
                return json.loads(line.removeprefix("REPORT "))
        raise SystemExit(
            f"error: {self.process.args} ended early; its output is in {self.log.name}"
        )

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()  # torchrun hands it on to its ranks
        self.process.wait()


def medians(reports: list[dict]) -> dict[str, float]:
    out = {key: statistics.median(report[key] for report in reports) for key in reports[0]}
    out["step"] = statistics.median(sum(report[phase] for phase in PHASES) for report in reports)
    out["tokens_per_second"] = out.pop("tokens") / out["step"]
    return out


def needed_flops(
    config, prompt_tokens: int, response_tokens: int, group: int, prompts: int
) -> float:
    """Of an update: each prompt once, six operations a parameter and token (and attention), the output head for
    response tokens only. Nothing that is computed twice counts twice. config: a transformers config."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        layer = AutoModelForCausalLM.from_config(config).base_model.layers[0]
    n = response_tokens - 1  # the last token predicts nothing
    pairs = prompt_tokens**2 / 2 + group * n * (
        prompt_tokens + n / 2
    )  # of a query and a key that it sees
    size = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    head = config.vocab_size * config.hidden_size * group * response_tokens
    attention = 2 * pairs * layer.self_attn.o_proj.in_features
    return (
        6
        * prompts
        * (config.num_hidden_layers * (size * (prompt_tokens + group * n) + attention) + head)
    )


def measured_flops() -> float:
    """Of this CPU a second, in the best of ten float32 products of 1024 x 1024 matrices."""
    import torch

    x, times = torch.randn(1024, 1024), []
    for _ in range(10):
        began = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(times)


def utilization(seconds: float, gpus: int = 1, *, model: str, **shape: int) -> dict[str, float]:
    """Share of the GPUs' peak that the update's needed work is; nothing for other GPUs than those of CUDA_TFLOPS. On a
    CPU, of what matrix products alone reach there."""
    import torch
    from transformers import AutoConfig

    from local import models

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = (
        next((x * 1e12 for name, x in CUDA_TFLOPS.items() if name in gpu), None)
        if gpu
        else measured_flops()
    )
    config = AutoConfig.from_pretrained(models.resolve(model))
    return {"mfu": needed_flops(config, **shape) / seconds / gpus / peak} if peak else {}


def machine(args: argparse.Namespace) -> str:
    if args.gpu:
        return subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            check=True,
            text=True,
            capture_output=True,
        ).stdout.splitlines()[0]
    return f"{cores()} cores, {processor()}"


def case(args: argparse.Namespace) -> dict:
    return {
        x: getattr(args, x)
        for x in ("model", "prompt_tokens", "response_tokens", "group", "prompts")
    }


def compare(args: argparse.Namespace) -> dict:
    from local import models

    models.resolve(args.model)  # once, not by both
    shared = case(args) | {"steps": args.steps}
    options = {
        "ours": {"engine": args.engine},
        "trl": {x: getattr(args, x) for x in ("trl_sampler", "trl_batch", "trl_checkpointing")},
    }
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, more in options.items():
            workers[name] = stack.enter_context(Worker(name, **shared, **more))
            workers[name].step()  # loading and warming up; only then the next one
        reports = {name: [] for name in workers}
        for _ in range(args.steps):
            for name, worker in workers.items():
                worker.go()
                reports[name].append(worker.step())
                print(
                    name,
                    {key: round(x, 3) for key, x in reports[name][-1].items()},
                    file=sys.stderr,
                    flush=True,
                )
    result = {name: medians(steps) for name, steps in reports.items()}
    a, b = result["ours"], result["trl"]
    a |= utilization(a["update"], **case(args))
    ratios = {x: b[x] / a[x] for x in ("sample", "update", "step")} | {
        "memory ours/TRL": a["peak_gb"] / b["peak_gb"]
    }
    settings = {
        "sampler": args.trl_sampler,
        "batch": args.trl_batch or args.group,
        "bf16": args.gpu,
        "gradient_checkpointing": args.trl_checkpointing,
        "liger": args.gpu,
        "optim": "adamw_torch_fused",
    }
    return {
        "case": case(args),
        "machine": machine(args),
        "steps": args.steps,
        **result,
        "ratios": ratios,
        "trl_settings": settings,
    }


def growth(args: argparse.Namespace) -> Iterator[dict]:
    """Our step with 1, 2, 4, 8 times the prompts, and with 2 ranks beside 1, unless they would have to share a GPU; one
    after the other, for memory's sake."""
    import torch

    from local import models

    models.resolve(args.model)
    cases = [{"prompts": args.prompts * n} for n in (1, 2, 4, 8)]
    if not args.gpu or torch.cuda.device_count() > 1:
        cases.append({"prompts": args.prompts * 4, "ranks": 2})
    for changed in cases:
        with Worker(
            "ours", **{**case(args), "steps": args.steps, "engine": args.engine, **changed}
        ) as worker:
            worker.step()
            reports = []
            for _ in range(args.steps):
                worker.go()
                reports.append(worker.step())
        yield {**case(args), **changed, "machine": machine(args), **medians(reports)}


if __name__ == "__main__":
    arguments = options()
    if arguments.worker:
        {"ours": ours, "trl": trl}[arguments.worker](arguments)
    else:
        for line in growth(arguments) if arguments.growth else [compare(arguments)]:
            print(
                json.dumps(
                    {
                        key: {
                            k: round(v, 4) if isinstance(v, float) else v for k, v in value.items()
                        }
                        if isinstance(value, dict)
                        else value
                        for key, value in line.items()
                    }
                ),
                flush=True,
            )
