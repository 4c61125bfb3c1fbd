"""One training step, by phase, of this code and of TRL's GRPOTrainer, all else equal.

    pip install --no-deps -r requirements-bench.txt   # on a GPU machine; make does it on a CPU
    python tools/step.py                       # SmolLM2 on a CPU, a 1.5B Qwen2.5 on a GPU
    python tools/step.py --prompt-tokens 1000  # another case
    python tools/step.py --growth              # our own step with 1 to 8 times the tokens, 2 ranks

Model, prompts, lengths, precision and threads are the same. Each of the two is a process of its
own, and the second starts when the first has loaded: vLLM takes memory that another process claims
meanwhile for its own. Their steps alternate, after one for warming up, so that whatever else the
machine does hits both. One JSON line a case: medians in seconds, ratios TRL / ours, peak memory.
Every response has exactly --response-tokens tokens.
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
    return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in completions]


def letters(completions, **_) -> list[float]:
    return [len(set(text)) / 100 for text in completions]


def make_prompts(tokenizer, n: int, length: int) -> list[str]:
    """Texts of exactly `length` tokens."""
    candidates = " the, tool, of, and, call, name, city, user,a,b,c,d".split(",")
    words = [word for word in candidates if len(tokenizer(word * 8).input_ids) == 8]
    texts = []
    for i in range(n):
        first, second = words[i % len(words)], words[i // len(words) % len(words)]
        text = (first + second) * length
        texts.append(tokenizer.decode(tokenizer(text).input_ids[:length]))
    if {len(tokenizer(text).input_ids) for text in texts} != {length}:
        raise SystemExit("error: no text has that many tokens with this tokenizer")
    return texts


def turn(report: dict) -> None:
    """Hand a step's figures to the parent, and wait until it is this worker's turn again."""
    import torch

    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["peak_gb"] = peak / 1e9
    if RANK == 0:
        print("REPORT " + json.dumps(report), flush=True)
        sys.stdin.readline()


def ours(args: argparse.Namespace) -> None:
    """train.fit itself."""
    import policy
    import train
    import update
    from config import TrainConfig
    from infra import pretrained
    from infra.log import Log
    from infra.prompts import Prompt
    from infra.ranks import join
    from infra.state import NoCheckpoints
    from local import models
    from rewards import Channel, Example, Task
    from rollout import Decoding, Sampler

    class Turns(Log):
        """A step's record is the report; nothing is written."""

        def metrics(self, record: dict) -> None:
            report = {phase: record["seconds"][phase] for phase in PHASES}
            tokens = record["length_mean"] * args.prompts * args.group
            turn(report | {"gap": record["sampler_gap"], "tokens": tokens})

        def samples(self, records: list[dict]) -> None:
            pass

        def say(self, line: str) -> None:
            pass

    name = str(models.resolve(args.model))
    path, tokenizer, stops, *_ = pretrained.describe(name, args.response_tokens)
    prompts = []
    for text in make_prompts(tokenizer, args.prompts, args.prompt_tokens):
        example = Example([{"role": "user", "content": text}])
        prompts.append(Prompt(tokenizer(text).input_ids, example))
    config = TrainConfig(
        prompts=args.prompts,
        group=args.group,
        steps=args.steps + 1,
        lr=1e-6,
        tokens_per_microbatch=6000 if args.gpu else 16384,  # on a GPU the two share it
    )
    device = join()
    trained = policy.load(path, device, policy.make_mesh(device))
    decoding = Decoding(tokenizer, stops, 1.0, args.response_tokens)
    engine = make_engine(args, path, decoding, device)
    channels = [
        Channel("vowels", lambda _, responses, references: vowels(responses)),
        Channel("letters", lambda _, responses, references: letters(responses)),
    ]
    sampler = Sampler(engine, Task(None, channels), 0)
    learner = update.Learner(trained, None, update.make_optimizer(trained, config.lr), device)
    train.fit(config, learner, sampler, prompts, Turns(), lambda step: None, NoCheckpoints())


def make_engine(args: argparse.Namespace, path: str, decoding, device):
    """Our sampler, which never stops before --response-tokens."""
    if args.engine == "vllm":
        from rollout import VLLMEngine

        longest = args.prompt_tokens + args.response_tokens
        at_a_time = min(32, args.prompts * args.group)
        engine = VLLMEngine(path, decoding, longest, SHARE, at_a_time=at_a_time)
        engine.sampling |= {"ignore_eos": True, "stop_token_ids": []}
        return engine
    import policy
    from local import hf

    engine = hf.HFEngine(hf.load(path, device, policy.compute_dtype(device)), decoding)
    engine.config.min_new_tokens = args.response_tokens
    return engine


def trl(args: argparse.Namespace) -> None:
    """GRPOTrainer, its phases timed around its own methods.

    What it does between sampling and the forward that has a gradient (old log-probs, if it wants
    any) counts as update, the advantages too."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from local import models

    path = models.resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = make_prompts(tokenizer, args.prompts, args.prompt_tokens)
    seconds: dict[str, float] = {}  # of this step

    class Phases(TrainerCallback):
        def on_step_begin(self, *_, **kwargs):
            seconds.clear()
            seconds["begin"] = now(args)

        def on_step_end(self, *_, **kwargs):
            step = now(args) - seconds["begin"]
            sync, score = seconds.get("_sync", 0.0), seconds["_calculate_rewards"]
            sample = seconds["_generate"] - sync
            report = {"sample": sample, "score": score, "advantage": 0.0, "sync": sync}
            report["update"] = step - sample - sync - score
            turn(report | {"tokens": args.response_tokens * args.group * args.prompts})

    trainer = GRPOTrainer(
        str(path),
        [vowels, letters],
        trl_config(args),
        Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Phases()],
    )

    def timed(holder, method: str, name: str) -> None:
        inner = getattr(holder, method)

        def call(*values, **keys):
            begin = now(args)
            out = inner(*values, **keys)
            seconds[name] = seconds.get(name, 0.0) + now(args) - begin
            return out

        setattr(holder, method, call)

    timed(trainer, "_generate", "_generate")
    timed(trainer, "_calculate_rewards", "_calculate_rewards")
    if args.trl_sampler == "vllm":
        timed(trainer.vllm_generation, "sync_weights", "_sync")
    trainer.train()


def now(args: argparse.Namespace) -> float:
    """Seconds, when the GPU has done all."""
    import torch

    if args.gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def trl_config(args: argparse.Namespace):
    """A GRPOConfig whose steps do the work of ours."""
    import torch
    from trl import GRPOConfig

    rows = args.trl_batch or args.group
    shortest = "min_tokens" if args.trl_sampler == "vllm" else "min_new_tokens"
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=args.steps + 1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=args.group * args.prompts // rows,
        num_generations=args.group,
        max_completion_length=args.response_tokens,
        generation_kwargs={shortest: args.response_tokens},
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


# The parent


class Worker:
    """A process that reports each of its steps, and waits for its turn after it."""

    def __init__(self, name: str, ranks: int = 1, **changed):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command.append(__file__)
        for key, value in changed.items():
            option = f"--{key.replace('_', '-')}"
            if value is True:
                command.append(option)
            elif value is not False:
                command += [option, str(value)]
        threads = str(max(1, cores() // ranks))
        handle, self.log = tempfile.mkstemp(prefix=f"bench-{name}-", suffix=".log")
        with os.fdopen(handle, "w") as log:
            self.process = subprocess.Popen(
                [*command, "--worker", name],
                stdin=subprocess.PIPE,
                text=True,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"OMP_NUM_THREADS": threads, **os.environ},
            )

    def step(self) -> dict[str, float]:
        """The report of one step; the worker waits afterwards."""
        for line in self.process.stdout:
            if line.startswith("REPORT "):
                return json.loads(line.removeprefix("REPORT "))
        raise SystemExit(f"error: {self.process.args} ended early; its output is in {self.log}")

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()  # torchrun hands it on to its ranks
        self.process.wait()


def medians(reports: list[dict]) -> dict[str, float]:
    out = {}
    for key in reports[0]:
        out[key] = statistics.median([report[key] for report in reports])
    steps = [sum(map(report.get, PHASES)) for report in reports]
    out["step"] = statistics.median(steps)
    out["tokens_per_second"] = out.pop("tokens") / out["step"]
    return out


def needed_flops(
    config, prompt_tokens: int, response_tokens: int, group: int, prompts: int
) -> float:
    """Of an update: each prompt once, six operations a parameter and token, and attention.

    The output head is counted for response tokens only. Nothing that is computed twice counts
    twice. config: a transformers config."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        layer = AutoModelForCausalLM.from_config(config).base_model.layers[0]
    n = response_tokens - 1  # the last token predicts nothing
    # Pairs of a query and a key that it sees.
    pairs = prompt_tokens**2 / 2 + group * n * (prompt_tokens + n / 2)
    size = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    head = config.vocab_size * config.hidden_size * group * response_tokens
    attention = 2 * pairs * layer.self_attn.o_proj.in_features
    of_layer = size * (prompt_tokens + group * n) + attention
    return 6 * prompts * (config.num_hidden_layers * of_layer + head)


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
    """Share of the GPUs' peak that the update's needed work is.

    Nothing for GPUs that CUDA_TFLOPS lacks. On a CPU: of what matrix products alone reach there."""
    import torch
    from transformers import AutoConfig

    from local import models

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        peak = next((tflops * 1e12 for name, tflops in CUDA_TFLOPS.items() if name in gpu), None)
    else:
        peak = measured_flops()
    if not peak:
        return {}
    config = AutoConfig.from_pretrained(models.resolve(model))
    return {"mfu": needed_flops(config, **shape) / seconds / gpus / peak}


def machine(args: argparse.Namespace) -> str:
    if not args.gpu:
        return f"{cores()} cores, {processor()}"
    query = "nvidia-smi", "--query-gpu=name", "--format=csv,noheader"
    names = subprocess.run(query, check=True, text=True, capture_output=True).stdout
    first, *_ = names.splitlines()
    return first


def picked(args: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(args, name) for name in names}


def case(args: argparse.Namespace) -> dict:
    return picked(args, "model", "prompt_tokens", "response_tokens", "group", "prompts")


def compare(args: argparse.Namespace) -> dict:
    from local import models

    models.resolve(args.model)  # once, not by both
    result = {name: medians(steps) for name, steps in alternate(args).items()}
    ours, trl = result["ours"], result["trl"]
    ours |= utilization(ours["update"], **case(args))
    ratios = {phase: trl[phase] / ours[phase] for phase in ("sample", "update", "step")}
    ratios["memory ours/TRL"] = ours["peak_gb"] / trl["peak_gb"]
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


def alternate(args: argparse.Namespace) -> dict[str, list[dict]]:
    """{name: reports of its steps}, after one of each for loading and warming up."""
    options = {
        "ours": picked(args, "engine"),
        "trl": picked(args, "trl_sampler", "trl_batch", "trl_checkpointing"),
    }
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, own_options in options.items():
            worker = Worker(name, **case(args), steps=args.steps, **own_options)
            workers[name] = stack.enter_context(worker)
            worker.step()  # only then the next one
        reports = {name: [] for name in workers}
        for _ in range(args.steps):
            for name, worker in workers.items():
                worker.go()
                report = worker.step()
                reports[name].append(report)
                print(name, rounded(report, 3), file=sys.stderr, flush=True)
    return reports


def rounded(value, digits: int):
    """Numbers with a point, and those in a dict."""
    if isinstance(value, dict):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    return round(value, digits) if isinstance(value, float) else value


def growth(args: argparse.Namespace) -> Iterator[dict]:
    """Our step with 1, 2, 4, 8 times the prompts, and with 2 ranks beside 1.

    Not with 2 ranks if they would have to share a GPU. One after the other, for memory's sake."""
    import torch

    from local import models

    models.resolve(args.model)
    cases = [{"prompts": args.prompts * n} for n in (1, 2, 4, 8)]
    if not args.gpu or torch.cuda.device_count() > 1:
        cases.append({"prompts": args.prompts * 4, "ranks": 2})
    for changed in cases:
        shape = case(args) | changed
        with Worker("ours", **shape, steps=args.steps, engine=args.engine) as worker:
            worker.step()
            reports = []
            for _ in range(args.steps):
                worker.go()
                reports.append(worker.step())
        yield {**shape, "machine": machine(args), **medians(reports)}


def main(args: argparse.Namespace) -> None:
    if args.worker == "ours":
        ours(args)
    elif args.worker == "trl":
        trl(args)
    else:
        for line in growth(args) if args.growth else [compare(args)]:
            print(json.dumps(rounded(line, 4)), flush=True)


if __name__ == "__main__":
    main(options())
