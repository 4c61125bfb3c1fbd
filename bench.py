"""One training step, by phase, of this code and of TRL's GRPOTrainer: same model, prompts, lengths, precision, threads.

    pip install --no-deps -r requirements-bench.txt   # on a GPU machine; make does it on a CPU
    python bench.py                       # the case of this machine: SmolLM2 on a CPU, Qwen2.5-1.5B's shape on a GPU
    python bench.py --prompt-tokens 1000  # another one
    python bench.py --growth              # our own step with 1, 2, 4 and 8 times the tokens, and on 2 ranks

Each of the two is a process of its own. Their steps alternate, after one for warming up, so that whatever else the
machine does hits both. One JSON line a case: medians in seconds, ratios TRL / ours, peak memory. Every response has
exactly --response-tokens tokens.
"""

import argparse
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

SHARE = 0.15  # of the GPU, for each vLLM
CUDA_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bfloat16, by the vendor's data sheets


def options() -> argparse.Namespace:
    gpu = shutil.which("nvidia-smi") is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="random-1.5B" if gpu else "smollm2", help="smollm2, tiny, a directory, or random-SIZE: "
        "random weights in the shape of Qwen2.5 1.5B, 3B, 7B or 14B (default %(default)s)")
    add("--prompt-tokens", type=int, default=1000 if gpu else 300, help="P (default %(default)s)")
    add("--response-tokens", type=int, default=256 if gpu else 48, help="R (default %(default)s)")
    add("--group", type=int, default=16 if gpu else 8, help="G (default %(default)s)")
    add("--prompts", type=int, default=4 if gpu else 1, help="prompts a step (default %(default)s)")
    add("--steps", type=int, default=5, help="of each, after the warm-up (default %(default)s)")
    add("--trl-batch", type=int, default=4 if gpu else 0, help="TRL: rows a forward, 0: a group (default %(default)s)")
    add("--trl-checkpointing", action="store_true", help="gradient checkpointing in TRL: slower, less memory")
    add("--trl-sampler", default="vllm" if gpu else "transformers", help="or vllm (default %(default)s)")
    add("--engine", default="vllm", help="our sampler, vllm or hf")
    add("--growth", action="store_true", help="only our own step, growing")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.gpu = gpu
    return args


# In both workers: what is measured, and how they take turns

def vowels(completions, **_) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def letters(completions, **_) -> list[float]:
    return [len(set(text)) / 100 for text in completions]


def make_model(name: str) -> Path:
    """A directory with the weights. The random ones have the tokenizer of `tiny`, and words that it does not know."""
    import torch
    from transformers import AutoModelForCausalLM

    import memory
    import model

    if not name.startswith("random-"):
        return model.resolve(name)
    out = Path(tempfile.gettempdir()) / f"rvpo-{name}"
    if not out.exists():
        torch.manual_seed(0)
        config = memory.qwen(name.removeprefix("random-"))
        config.eos_token_id, config.pad_token_id = 2, 0
        part = out.with_suffix(".part")
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(part)
        model.load_tokenizer(model.resolve("tiny")).save_pretrained(part)
        part.rename(out)
    return out


def make_prompts(tokenizer, n: int, length: int) -> list[str]:
    """Texts of exactly so many tokens."""
    words = [word for word in (" the", " tool", " of", " and", " call", " name", " city", " user", "a", "b", "c", "d")
             if len(tokenizer(word * 8).input_ids) == 8]
    texts = [(words[i % len(words)] + words[i // len(words) % len(words)]) * length for i in range(n)]
    cut = [tokenizer.decode(tokenizer(text).input_ids[:length]) for text in texts]
    if {len(tokenizer(text).input_ids) for text in cut} != {length}:
        raise SystemExit("error: no text has that many tokens with this tokenizer")
    return cut


def turn(report: dict) -> None:
    """Hand a step's figures to the parent, and wait until it is this worker's turn again."""
    import torch

    report["peak_gb"] = (torch.cuda.max_memory_allocated() if torch.cuda.is_available()
                         else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
    if int(os.environ.get("RANK", "0")) == 0:
        print("REPORT " + json.dumps(report), flush=True)
        sys.stdin.readline()


def ours(args: argparse.Namespace) -> None:
    """train.fit itself; its line of metrics is the report."""
    import model
    import policy
    import rewards
    import rollout
    import train
    from data import Example

    path = make_model(args.model)
    path, tokenizer, stops, _, _ = model.describe(str(path), args.response_tokens)
    texts = make_prompts(tokenizer, args.prompts, args.prompt_tokens)
    prompts = [(tokenizer(text).input_ids, Example([{"role": "user", "content": text}], "", [])) for text in texts]
    rewards.TASKS["tools"] = [rewards.Reward("vowels", lambda p, responses, r: vowels(responses)),
                              rewards.Reward("letters", lambda p, responses, r: letters(responses))]
    longest = args.prompt_tokens + args.response_tokens
    run = train.parse_args("", [
        "--model", str(path), "--prompts", str(args.prompts), "--group", str(args.group), "--steps",
        str(args.steps + 1), "--engine", args.engine, "--eval-prompts", "0", "--lr", "1e-6", "--save-every", "0",
        "--tokens-per-microbatch", "6000" if args.gpu else "16384"])  # the two share a GPU
    train.check_args(run)
    device = rollout.join_ranks()
    trained = policy.load(path, device, policy.make_mesh(device))
    if args.engine == "vllm":
        engine = rollout.VLLMEngine(path, tokenizer, stops, longest, 1.0, args.response_tokens, 0,
                                    SHARE, at_a_time=min(32, args.prompts * args.group))
        engine.sampling |= {"ignore_eos": True, "stop_token_ids": []}
    else:
        engine = rollout.HFEngine(model.load(path, device, policy.compute_dtype(device)), tokenizer, stops, 1.0,
                                  args.response_tokens)
        engine.config.min_new_tokens = args.response_tokens

    def write(file: Path, *records: dict) -> None:
        for record in records:
            if "seconds" in record:
                seconds = record["seconds"]
                turn({"sample": seconds["sample"], "score": seconds["score"], "advantage": seconds["advantage"],
                      "update": seconds["update"], "sync": seconds["sync"], "gap": record["sampler_gap"],
                      "tokens": record["length_mean"] * args.prompts * args.group})

    train.write = write
    train.fit(run, Path(), device, trained, train.make_optimizer(trained, run.lr), None, engine, None, prompts, [],
              train.beginning())


def trl(args: argparse.Namespace) -> None:
    """GRPOTrainer, its phases timed around its own methods. What it does between sampling and the forward that has a
    gradient (old log-probs, if it wants any) counts as update, the advantages too."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    path = make_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = make_prompts(tokenizer, args.prompts, args.prompt_tokens)
    rows = args.trl_batch or args.group
    fixed = {"min_tokens" if args.trl_sampler == "vllm" else "min_new_tokens": args.response_tokens}
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps + 1, per_device_train_batch_size=rows,
        gradient_accumulation_steps=args.group * args.prompts // rows, num_generations=args.group,
        max_completion_length=args.response_tokens, generation_kwargs=fixed, learning_rate=1e-6, beta=0.0,
        temperature=1.0, top_k=0, top_p=1.0, logging_steps=1000, save_strategy="no", report_to=[], disable_tqdm=True,
        bf16=args.gpu, use_cpu=not args.gpu, gradient_checkpointing=args.trl_checkpointing,
        multi_objective_aggregation="normalize_then_sum", optim="adamw_torch_fused", dataloader_num_workers=0,
        use_liger_kernel=args.gpu, use_vllm=args.trl_sampler == "vllm", vllm_gpu_memory_utilization=SHARE,
        model_init_kwargs={"dtype": torch.float32})
    seconds: dict[str, float] = {}

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seconds.clear()
            seconds["begin"] = self.now()

        def on_step_end(self, *more, **kwargs):
            step = self.now() - seconds["begin"]
            sync, score = seconds.get("_sync", 0.0), seconds["_calculate_rewards"]
            sample = seconds["_generate"] - sync
            turn({"sample": sample, "score": score, "advantage": 0.0, "sync": sync,
                  "update": step - sample - sync - score, "tokens": args.response_tokens * args.group * args.prompts})

        @staticmethod
        def now() -> float:
            if args.gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

    trainer = GRPOTrainer(str(path), [vowels, letters], config, Dataset.from_dict({"prompt": texts}),
                          processing_class=tokenizer, callbacks=[Turns()])

    def timed(holder, method: str, name: str) -> None:
        inner = getattr(holder, method)

        def call(*values, **keys):
            begin = Turns.now()
            out = inner(*values, **keys)
            seconds[name] = seconds.get(name, 0.0) + Turns.now() - begin
            return out

        setattr(holder, method, call)

    timed(trainer, "_generate", "_generate")
    timed(trainer, "_calculate_rewards", "_calculate_rewards")
    if args.trl_sampler == "vllm":
        timed(trainer.vllm_generation, "sync_weights", "_sync")
    trainer.train()


# The parent

class Worker:
    def __init__(self, name: str, ranks: int = 1, **changed):
        argv = [x for key, value in changed.items() for x in (f"--{key.replace('_', '-')}", str(value))
                if value is not True and value is not False]
        argv += [f"--{key.replace('_', '-')}" for key, value in changed.items() if value is True]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        self.log = tempfile.NamedTemporaryFile("w+", prefix=f"bench-{name}-", suffix=".log", delete=False)  # noqa: SIM115
        threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        self.process = subprocess.Popen(
            [sys.executable, *launcher, __file__, *argv, "--worker", name], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, stderr=self.log, env={"OMP_NUM_THREADS": threads, **os.environ})

    def step(self) -> dict[str, float]:
        """The report of one step; the worker waits afterwards."""
        for line in self.process.stdout:
            if line.startswith("REPORT "):
                return json.loads(line.removeprefix("REPORT "))
        raise SystemExit(f"error: {self.process.args} ended early; its output is in {self.log.name}")

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def medians(reports: list[dict]) -> dict[str, float]:
    out = {key: statistics.median(report[key] for report in reports) for key in reports[0]}
    out["step"] = statistics.median(sum(r[x] for x in ("sample", "score", "advantage", "update", "sync"))
                                    for r in reports)
    out["tokens_per_second"] = out.pop("tokens") / out["step"]
    return out


def utilization(args: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Share of the GPU's peak that the update's needed work is: each prompt once, six operations a parameter and token
    (and attention), the output head for response tokens only. Nothing that is computed twice counts twice."""
    import torch
    from transformers import AutoConfig

    import balance
    import memory

    peak = next((x for name, x in CUDA_TFLOPS.items() if name in torch.cuda.get_device_name()), None)
    if peak is None:
        return {}
    config = AutoConfig.from_pretrained(make_model(args.model))
    _, layer = memory.count(config)
    _, work = balance.size((args.prompt_tokens, [args.response_tokens] * args.group), balance.attention_cost(config))
    head = config.vocab_size * config.hidden_size * args.group * args.response_tokens
    flops = 6 * args.prompts * (layer * config.num_hidden_layers * work + head)
    return {"mfu": flops / seconds / (peak * 1e12)}


def machine(args: argparse.Namespace) -> str:
    if args.gpu:
        return subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], check=True, text=True,
                              capture_output=True).stdout.splitlines()[0]
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores, {names[0].partition(': ')[2] if names else 'unknown'}"


def case(args: argparse.Namespace) -> dict:
    return {x: getattr(args, x) for x in ("model", "prompt_tokens", "response_tokens", "group", "prompts")}


def compare(args: argparse.Namespace) -> dict:
    make_model(args.model)  # once, not by both
    shared = case(args) | {"steps": args.steps}
    workers = {"ours": Worker("ours", **shared, engine=args.engine),
               "trl": Worker("trl", **shared, trl_sampler=args.trl_sampler, trl_batch=args.trl_batch,
                             trl_checkpointing=args.trl_checkpointing)}
    reports = {name: [] for name in workers}
    for worker in workers.values():
        worker.step()  # loading and warming up
    for _ in range(args.steps):
        for name, worker in workers.items():
            worker.go()
            reports[name].append(worker.step())
            print(name, {key: round(x, 3) for key, x in reports[name][-1].items()}, file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.end()
    result = {name: medians(own) for name, own in reports.items()}
    a, b = result["ours"], result["trl"]
    if args.gpu:
        a |= utilization(args, a["update"])
    ratios = {x: b[x] / a[x] for x in ("sample", "update", "step")} | {"memory ours/TRL": a["peak_gb"] / b["peak_gb"]}
    settings = {"sampler": args.trl_sampler, "batch": args.trl_batch or args.group, "bf16": args.gpu,
                "gradient_checkpointing": args.trl_checkpointing, "liger": args.gpu, "optim": "adamw_torch_fused"}
    return {"case": case(args), "machine": machine(args), "steps": args.steps, **result, "ratios": ratios,
            "trl_settings": settings}


def growth(args: argparse.Namespace) -> Iterator[dict]:
    """Our step with 1, 2, 4, 8 times the prompts, and with 2 ranks beside 1; one after the other, for memory's sake."""
    make_model(args.model)
    for changed in [{"prompts": args.prompts * n} for n in (1, 2, 4, 8)] + [{"prompts": args.prompts * 4, "ranks": 2}]:
        worker = Worker("ours", **{**case(args), "steps": args.steps, "engine": args.engine, **changed})
        worker.step()
        reports = []
        for _ in range(args.steps):
            worker.go()
            reports.append(worker.step())
        worker.end()
        yield {**case(args), **changed, "machine": machine(args), **medians(reports)}


if __name__ == "__main__":
    arguments = options()
    if arguments.worker:
        {"ours": ours, "trl": trl}[arguments.worker](arguments)
    else:
        for line in growth(arguments) if arguments.growth else [compare(arguments)]:
            print(json.dumps({key: {k: round(v, 4) if isinstance(v, float) else v for k, v in value.items()}
                              if isinstance(value, dict) else value for key, value in line.items()}), flush=True)
