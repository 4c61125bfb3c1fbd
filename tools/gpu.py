"""Is all well on this machine's GPUs? One table in about ten minutes, with or without vLLM.

    make gpu                                # or python tools/gpu.py; on a CPU: with a tiny model
    python tools/gpu.py --only run,update   # some of the checks
    python tools/gpu.py --ranks 2           # GPUs to shard over, default all; on a CPU: processes

A line is pass, FAIL or skipped, with the reason and figures; the exit code is 1 if one is FAIL.
Nothing is downloaded. Weights are random: those in the shapes of Qwen2.5-0.5B and 1.5B take 4 GB in
the folder for temporary files, and stay there.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a script sees its own folder only


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path(time.strftime("runs/gpu-%m%d-%H%M%S/results.json")),
        help="every figure, with date, command, versions; what the checks print goes to a .log "
        "beside it (default runs/gpu-DATE/results.json)",
    )
    add(
        "--only",
        default="",
        help="checks whose names begin so, with commas between them, and device (default: all)",
    )
    add("--ranks", type=int, default=0, help="GPUs to shard over (default: all)")
    add(
        "--gap-limit",
        type=float,
        help="of log-probs, mean |sampler - trainer| (default 0.05, on a CPU 0.001)",
    )
    add(
        "--quick", action="store_true", help="without the tests; train.py samples with transformers"
    )
    add("--check", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = options()  # before torch is imported: --help must not wait for it

import kill_and_resume as runs
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import policy as policies
import update as updates
from infra import pretrained, run_directory
from infra.adapters import Lora
from infra.prompts import Prompt
from infra.ranks import RANK, WORLD, join, on_rank_0, run_program
from local import models
from rollout import Decoding, Group, Response, VLLMEngine
from tools import step

LIMIT = 600  # seconds for a check: a rank that waits for another one would wait for hours
GIB = 2**30
CUDA = torch.cuda.is_available()


# The checks. Each is a process: what it leaves in a GPU, or breaks, is not the next one's. It
# returns figures, and the reason under "FAIL" or "skipped".


def device() -> dict:
    """What the machine is, and whether this torch can use it."""
    name = torch.cuda.get_device_name() if CUDA else step.machine(argparse.Namespace(gpu=False))
    found = {
        "name": name,
        "gpus": torch.cuda.device_count() if CUDA else 0,
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if not CUDA and found["driver"]:
        return found | {
            "FAIL": "this torch cannot use the GPU that nvidia-smi shows: is it the Python with "
            "requirements.txt, and the driver 580 or newer?"
        }
    if not CUDA:
        return found | {"skipped": "no GPU: what follows is of a tiny model on the CPU"}
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    found |= {
        "capability": f"{major}.{minor}",
        "memory_gib": total / GIB,
        "free_gib": free / GIB,
    }
    if major < 8:
        found["FAIL"] = "compute capability 8.0 is needed"
    elif free < 0.8 * total:
        found["FAIL"] = "another process holds much of its memory"
    return found


def driver() -> str | None:
    """NVIDIA's, None if there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    answer = subprocess.run(query, check=False, stdout=subprocess.PIPE, text=True)
    first, _, _ = answer.stdout.partition("\n")
    return first if answer.returncode == 0 else None


def tests() -> dict:
    """Of the update's parts, the kernel among them."""
    files = "tests/test_policy.py", "tests/test_deal.py", "tests/test_rvpo.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(result.stdout)
    counts = re.findall(r"(\d+) (passed|failed|skipped)", result.stdout)
    found = {f"tests_{word}": int(n) for n, word in counts}
    if result.returncode:
        found["FAIL"] = reason(result.stdout)
    elif CUDA and "tests_skipped" in found:
        found["FAIL"] = "the kernel's own test was skipped"
    return found


def too_far(gap: float, limit: float) -> dict:
    """{"FAIL": why} if log-probs of sampler and trainer differ by more than they may."""
    if gap < limit:
        return {}
    return {"FAIL": f"log-probs of sampler and trainer are {gap:.2g} apart, limit {limit:g}"}


def run(name: str, engine: str, ranks: int, limit: float) -> dict:
    """Three steps of train.py, killed after the first checkpoint and resumed.

    On a CPU its files must be those of a run that was left alone."""
    options = ["--model", models.resolve(name), "--engine", engine, "--steps", 3]
    options += ["--save-every", 1, "--max-tokens", 24, "--lr", 1e-4]
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        killed, log = cwd / "runs/killed", cwd / "killed.log"
        began = time.monotonic()
        process = runs.start("killed", cwd, ranks, *options)
        runs.wait((killed / "state/step-1").exists, process)
        if process.poll() is not None:
            sys.exit(f"{log.read_text()}\nit ended with {process.poll()} before it could be killed")
        os.kill(int((cwd / "pid-0").read_text()), signal.SIGKILL)
        process.wait()
        resumed = time.monotonic()
        runs.finish(runs.start("killed", cwd, ranks, *options, "--resume", "runs/killed"), log)
        ended = time.monotonic()
        lines = [json.loads(line) for line in (killed / "metrics.jsonl").open()]
        steps = [line for line in lines if "loss" in line]
        found = {
            "engine": engine,
            "steps": [line["step"] for line in steps],
            "seconds_until_killed": resumed - began,
            "seconds_resumed": ended - resumed,
            "gap": max(line["sampler_gap"] for line in steps),
        }
        if found["steps"] != [1, 2, 3]:
            return found | {"FAIL": "metrics.jsonl should have each of three steps once"}
        if not CUDA:
            runs.finish(runs.start("alone", cwd, ranks, *options), cwd / "alone.log")
            differ = runs.differences(cwd / "runs/alone", killed)
            if differ:
                return found | {"FAIL": f"left alone it has other {', '.join(differ)}"}
    return found | too_far(found["gap"], limit)


def load(name: str, rank: int = 0) -> tuple[policies.Policy, torch.device]:
    """Random weights, which are made once. rank: of LoRA's adapters, if above 0."""
    device = join()
    on_rank_0(lambda: models.resolve(name))
    path = models.resolve(name)
    mesh = policies.make_mesh(device)
    if not rank:
        return policies.load(path, device, mesh), device
    lora = Lora(rank, 2.0 * rank, 0, name)
    return policies.load(path, device, mesh, policies.compute_dtype(device), lora=lora), device


def seconds(work) -> float:
    """Until the GPU has done it."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def free_gib() -> float:
    if not CUDA:
        return 0.0
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return free / GIB


def sync(name: str, limit: float) -> dict:
    """vLLM's log-probs against the trainer's: before it has the newest weights, and after a push.

    It sleeps in between."""
    if not importlib.util.find_spec("vllm"):
        return {"skipped": "vLLM is not installed"}
    policy, device = load(name)

    def push() -> None:
        engine.push(policies.full_weights(policy, engine.dtype))

    def gaps(sampled: list[tuple[int, list[Response]]]) -> torch.Tensor:
        """|log-prob of vLLM - the trainer's| of each token."""
        groups, theirs = [], []
        for i, responses in sampled:
            groups.append((prompts[i], [response.tokens for response in responses]))
            for response in responses:
                theirs += response.logp
        with torch.no_grad():
            logp = policy(policies.pack(groups, device), 1.0).cpu()
        if isinstance(policy, FSDPModule):
            policy.reshard()  # a forward without backward leaves embeddings and head gathered
        return (logp - torch.tensor(theirs)).abs()

    before = free_gib()
    path, tokenizer, stops, *_ = pretrained.describe(str(policy.source), 64)
    prompts = [[*range(3, 3 + n)] for n in (700, 17, 400, 129)]  # over and under a block
    seeds = [0, 100, 200, 300]
    engine = VLLMEngine(path, Decoding(tokenizer, stops, 1.0, 64), 800, gpu_memory=0.4)
    push()
    sampled = [*engine.generate(prompts, 8, seeds)]
    disturb(policy)
    stale = gaps(sampled).mean().item()
    seconds_sleep = seconds(engine.sleep)
    asleep = before - free_gib()
    seconds_push = seconds(push)
    gap = gaps([*engine.generate(prompts, 8, seeds)])
    found = {
        "gap": gap.mean().item(),
        "rms": gap.square().mean().sqrt().item(),
        "tokens": len(gap),
        "stale_gap": stale,
        "seconds_push": seconds_push,
        "seconds_sleep": seconds_sleep,
    }
    if CUDA:
        found["asleep_gib"] = asleep
    if stale <= 2 * found["gap"]:
        found["FAIL"] = "it pushed nothing new"
    return found | too_far(found["gap"], limit)


def disturb(policy: policies.Policy) -> None:
    """New weights, near the old ones."""
    with torch.no_grad():
        for parameter in policy.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local += 0.02 * torch.randn_like(local)


def weights(name: str) -> dict:
    """All of them, as vLLM gets them."""
    policy, device = load(name)
    dtype = policies.compute_dtype(device)

    def gather() -> None:
        for _ in policies.full_weights(policy, dtype):
            pass

    return {"seconds_full_weights": statistics.median(seconds(gather) for _ in range(3))}


def update(
    name: str,
    checkpointing: str,
    kernels: str = "eager",
    flash_attention_3: bool = False,
    lora: int = 0,
    within_gib: float = 0.0,
    budget: int = 16384,
) -> dict:
    """Updates of four micro-batches a rank, the first of them for warming up.

    kernels, flash_attention_3, lora: train.py's options. within_gib: of the GPU, if above 0, as if
    it had no more. budget: tokens of a micro-batch."""
    prompt, length, size = (1000, 256, 16) if CUDA else (100, 24, 4)
    if not CUDA:
        budget = 512
    elif within_gib:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(within_gib * GIB / total)
    tokens = prompt + size * (length - 1)  # that are computed of a group
    shape = {
        "prompt_tokens": prompt,
        "response_tokens": length,
        "group": size,
        "prompts": 4 * WORLD * (budget // tokens),
    }
    policy, device = load(name, lora)
    policy.recompute(checkpointing, budget)
    policy.use_kernels(kernels, flash_attention_3)
    learner = updates.Learner(policy, None, updates.make_optimizer(policy, 1e-6), device)
    groups = made_up_groups(**shape)
    times, norms = [], []

    def one_update() -> None:
        log = updates.update(learner, groups, 1, 0.0, 1.0, budget)
        norms.append(log["grad_norm"])

    try:
        for number in range(4):
            if CUDA and number == 1:  # the first makes AdamW's states, and fills caches
                torch.cuda.reset_peak_memory_stats()
            times.append(seconds(one_update))
    except torch.OutOfMemoryError:
        if checkpointing == "on":
            raise
        return {"skipped": "out of memory, as it may be"}
    median = statistics.median(times[1:])
    found = {
        "tokens_per_second": tokens * shape["prompts"] / median,
        "seconds_update": median,
        "grad_norm": norms[-1],
        **step.utilization(median, WORLD, model=name, **shape),
    }
    if CUDA:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        if WORLD == 1 and kernels == "eager":
            found |= simulated(name, checkpointing, lora, budget, found["peak_gib"])
    if not all(0 < norm < math.inf for norm in norms):
        found["FAIL"] = "a gradient is 0 or not finite"
    return found


def made_up_groups(
    prompt_tokens: int, response_tokens: int, group: int, prompts: int
) -> list[Group]:
    """Responses begin with different tokens, from 3 on.

    The pad token's embedding is 0, and RMSNorm makes its gradient overflow in a deep model."""
    responses = []
    for g in range(group):
        tokens = [*range(3 + g, 3 + g + response_tokens)]
        logp, mask = [-10.0] * response_tokens, [1] * response_tokens
        responses.append(Response(tokens, logp, mask, "", ""))
    rewards, advantages = torch.zeros(group, 1), torch.linspace(-1, 1, group)
    groups = []
    for p in range(prompts):
        prompt = Prompt([*range(3 + p, 3 + p + prompt_tokens)], None)
        groups.append(Group(prompt, [], responses, rewards, advantages))
    return groups


def simulated(name: str, checkpointing: str, lora: int, budget: int, peak: float) -> dict:
    """What tools/simulate.py says of the peak."""
    size = name.removeprefix("random-")
    options = f"--json --size {size} --gpus 1 --gradient-checkpointing {checkpointing}"
    options += f" --lora {lora} --tokens-per-microbatch {budget}"
    options += " --prompt 1000 --response 256 --group 16"  # as `update` has them
    command = [sys.executable, ROOT / "tools/simulate.py", *options.split()]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    *_, last = output.splitlines()
    expected = json.loads(last)["peak_gib"]
    found = {"simulated_gib": expected}
    if abs(peak / expected - 1) >= 0.15:
        found["FAIL"] = "its peak is not what tools/simulate.py says"
    return found


# The table


def main(args: argparse.Namespace) -> int:
    """All checks, then the table. Returns the exit code."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out.with_suffix(".log")
    content = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
        "versions": run_directory.versions(),
        "checks": [],
    }

    def check(name: str, what: tuple | str) -> dict:
        line = checked(name, what, log)
        content["checks"].append(line)
        # After each: the machine may be taken away.
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{name}: {line['outcome']}", file=sys.stderr, flush=True)
        return line["figures"]

    machine = check("device", ("device", 1, {}))
    for name, what in plan(args, **machine).items():
        if name.startswith((*args.only.split(","),)):
            check(name, what)
    for line in content["checks"]:
        print_line(line)
    print(args.out, log)
    return int(any(line["outcome"] == "FAIL" for line in content["checks"]))


def checked(name: str, what: tuple | str, log: Path) -> dict:
    """A line of results.json. what: function, processes and arguments, or why it is skipped."""
    began = time.monotonic()
    found = {"skipped": what} if isinstance(what, str) else found_by(log, *what)
    outcome = next((word for word in ("FAIL", "skipped") if word in found), "pass")
    return {
        "check": name,
        "outcome": outcome,
        "reason": found.pop(outcome, ""),
        "seconds": time.monotonic() - began,
        "figures": found,
    }


def print_line(line: dict) -> None:
    parts = [line["reason"]] if line["reason"] else []
    for name, figure in line["figures"].items():
        parts.append(f"{name} {figure:.3g}" if isinstance(figure, float) else f"{name} {figure}")
    what = f"{line['check']:28}{line['outcome']:8}{line['seconds']:4.0f} s"
    print(f"{what}  {', '.join(parts)}")


def plan(
    args: argparse.Namespace, gpus: int = 0, memory_gib: float = 0.0, **machine
) -> dict[str, tuple | str]:
    """Check -> function, processes and arguments; or why it is skipped.

    The machine is as `device` found it."""
    small = "random-0.5B" if gpus else "tiny"
    large = "random-1.5B" if memory_gib > 36 else small  # the largest whose update fits
    limit = args.gap_limit
    if limit is None:
        limit = 0.05 if gpus else 1e-3  # bfloat16, float32
    ranks = args.ranks or gpus
    lacking = "needs two GPUs" if gpus else "no GPU, and no --ranks"
    engine = "vllm" if importlib.util.find_spec("vllm") and not args.quick else "hf"
    trained = {"name": small, "engine": engine, "limit": limit}
    updated = {"name": large, "checkpointing": "on"}
    of_24_gib = {"name": "random-3B", "checkpointing": "on", "lora": 16}
    of_24_gib |= {"within_gib": 14.0, "budget": 4096}  # vLLM has the other 40% of 24 GB
    return {
        "tests": "--quick" if args.quick else ("tests", 1, {}),
        "run": ("run", 1, trained | {"ranks": 1}),
        "sync": ("sync", 1, {"name": large, "limit": limit}),
        "update": ("update", 1, updated),
        "update without recomputing": ("update", 1, updated | {"checkpointing": "off"}),
        "update lora": ("update", 1, updated | {"lora": 16}),
        "update compiled": ("update", 1, updated | {"kernels": "compile"}) if gpus else "no GPU",
        "update liger": lever(updated | {"kernels": "liger"}, "liger_kernel", gpus),
        "update flash 3": lever(
            updated | {"flash_attention_3": True}, "flash_attn_interface", gpus
        ),
        "update lora 3B, 24 GB": ("update", 1, of_24_gib) if gpus else "no GPU",
        "weights": ("weights", 1, {"name": large}),
        "sharded run": ("run", 1, trained | {"ranks": ranks}) if ranks > 1 else lacking,
        "sharded update": ("update", ranks, updated) if ranks > 1 else lacking,
    }


def lever(arguments: dict, module: str, gpus: int) -> tuple | str:
    """An update with kernels of another package."""
    if not gpus:
        return "no GPU"
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return "update", 1, arguments


def found_by(log: Path, check: str, processes: int, arguments: dict) -> dict:
    """What that function returns, from a process of its own, or one a rank.

    The log has all that they print."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [__file__, "--check", check, json.dumps(arguments)]
    one_thread = {"OMP_NUM_THREADS": "1", **os.environ}  # beside other jobs several are slower
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=one_thread, start_new_session=True
        )
        try:
            process.wait(LIMIT)
        except BaseException as error:  # Ctrl-C, too
            os.killpg(process.pid, signal.SIGTERM)  # torchrun hands it on to its ranks
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"FAIL": f"not finished after {LIMIT} s"}
    output = log.read_bytes()[begin:].decode(errors="replace")
    found = re.findall("^FOUND (.*)", output, re.MULTILINE)
    if process.returncode or not found:
        return {"FAIL": reason(output)}
    return json.loads(found[-1])


def reason(output: str) -> str:
    """The line that says most of what a process printed before it failed."""
    lines = re.findall(r"^(?:\[rank\d+\]:)?\s*(\S.*)", output, re.MULTILINE)
    telling = re.compile(r"error: |FAILED |(?!.*ChildFailed)[\w.]*(Error|Exception)\b")
    best = [line for line in lines if telling.match(line)]
    return (best or lines or ["it printed nothing"])[-1]


def one_check(name: str, arguments: str) -> None:
    """In a process of `found_by`."""
    result = globals()[name](**json.loads(arguments))
    if RANK == 0:
        print("\nFOUND " + json.dumps(result), flush=True)


if __name__ == "__main__":
    if not ARGS.check:
        sys.exit(main(ARGS))
    run_program(one_check, *ARGS.check)
