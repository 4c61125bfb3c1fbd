"""Is all well on this machine's GPUs? One table in about ten minutes, with or without vLLM; nothing is downloaded.

    make gpu                                # or python tools/gpu.py; on a CPU: the same with a tiny model
    python tools/gpu.py --only run,update   # some of the checks
    python tools/gpu.py --ranks 2           # GPUs to shard over, default all; on a CPU: processes

A line is pass, FAIL or skipped, with the reason and figures; the exit code is 1 if one is FAIL. Weights are random:
those in the shapes of Qwen2.5-0.5B and 1.5B take 4 GB in the folder for temporary files, and stay there.
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
        help="every figure, with "
        "date, command, versions; what the checks print goes to a .log beside it (default runs/gpu-DATE/results.json)",
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
from infra import pretrained, prompts, run_directory
from infra.ranks import RANK, WORLD, join, on_rank_0, run_program
from local import models
from rollout import Decoding, Group, Response, VLLMEngine
from tools import step

LIMIT = 600  # seconds for a check: a rank that waits for another one would wait for hours
GIB = 2**30
CUDA = torch.cuda.is_available()


# The checks. Each is a process: what it leaves in a GPU, or breaks, is not the next one's. It returns figures, and the
# reason under "FAIL" or "skipped".


def device() -> dict:
    query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    smi = shutil.which(query[0]) and subprocess.run(
        query, check=False, stdout=subprocess.PIPE, text=True
    )
    driver = smi.stdout.partition("\n")[0] if smi and smi.returncode == 0 else None
    name = torch.cuda.get_device_name() if CUDA else step.machine(argparse.Namespace(gpu=False))
    found = {
        "name": name,
        "gpus": torch.cuda.device_count() if CUDA else 0,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if not CUDA:
        return found | (
            {
                "FAIL": "this torch cannot use the GPU that nvidia-smi shows: is it the Python with "
                "requirements.txt, and the driver 580 or newer?"
            }
            if driver
            else {"skipped": "no GPU: what follows is of a tiny model on the CPU"}
        )
    (free, total), capability = torch.cuda.mem_get_info(), torch.cuda.get_device_capability()
    found |= {
        "capability": "{}.{}".format(*capability),
        "memory_gib": total / GIB,
        "free_gib": free / GIB,
    }
    if capability < (8, 0):
        return found | {"FAIL": "compute capability 8.0 is needed"}
    return found | (
        {"FAIL": "another process holds much of its memory"} if free < 0.8 * total else {}
    )


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
    found = {
        f"tests_{word}": int(n)
        for n, word in re.findall(r"(\d+) (passed|failed|skipped)", result.stdout)
    }
    if result.returncode or (CUDA and "tests_skipped" in found):
        found["FAIL"] = (
            reason(result.stdout) if result.returncode else "the kernel's own test was skipped"
        )
    return found


def far(gap: float, limit: float) -> dict:
    return (
        {}
        if gap < limit
        else {"FAIL": f"log-probs of sampler and trainer are {gap:.2g} apart, limit {limit:g}"}
    )


def run(name: str, engine: str, ranks: int, limit: float) -> dict:
    """Three steps of train.py, killed after the first checkpoint and resumed; on a CPU as if it had been left alone."""
    words = [
        "--model",
        models.resolve(name),
        "--engine",
        engine,
        "--steps",
        3,
        "--save-every",
        1,
        "--max-tokens",
        24,
        "--lr",
        1e-4,
    ]
    with tempfile.TemporaryDirectory() as folder:
        cwd, began = Path(folder), time.monotonic()
        killed, log = cwd / "runs/killed", cwd / "killed.log"
        process = runs.start("killed", cwd, ranks, *words)
        runs.wait((killed / "state/step-1").exists, process)
        if process.poll() is not None:
            sys.exit(f"{log.read_text()}\nit ended with {process.poll()} before it could be killed")
        os.kill(int((cwd / "pid-0").read_text()), signal.SIGKILL)
        process.wait()
        then = time.monotonic()
        runs.finish(runs.start("killed", cwd, ranks, *words, "--resume", "runs/killed"), log)
        steps = [
            line for line in map(json.loads, (killed / "metrics.jsonl").open()) if "loss" in line
        ]
        found = {
            "engine": engine,
            "steps": [line["step"] for line in steps],
            "seconds_until_killed": then - began,
            "seconds_resumed": time.monotonic() - then,
            "gap": max(line["sampler_gap"] for line in steps),
        }
        if found["steps"] != [1, 2, 3]:
            return found | {"FAIL": "metrics.jsonl should have each of three steps once"}
        if not CUDA:
            runs.finish(runs.start("alone", cwd, ranks, *words), cwd / "alone.log")
            if differ := runs.differences(cwd / "runs/alone", killed):
                return found | {"FAIL": f"left alone it has other {', '.join(differ)}"}
    return found | far(found["gap"], limit)


def load(name: str) -> tuple[policies.Policy, torch.device]:
    """Random weights, which are made once."""
    device = join()
    on_rank_0(lambda: models.resolve(name))
    return policies.load(models.resolve(name), device, policies.make_mesh(device)), device


def seconds(work) -> float:
    """Until the GPU has done it."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def sync(name: str, limit: float) -> dict:
    """vLLM's log-probs against the trainer's, when it lacks the newest weights, and when it has slept and got them."""
    if not importlib.util.find_spec("vllm"):
        return {"skipped": "vLLM is not installed"}

    def gaps(sampled: list) -> torch.Tensor:
        """|log-prob of vLLM - the trainer's| of each token."""
        groups = [
            (prompts[i], [response.tokens for response in responses]) for i, responses in sampled
        ]
        with torch.no_grad():
            logp = policy(policies.pack(groups, device), 1.0).cpu()
        if isinstance(policy, FSDPModule):
            policy.reshard()  # a forward without backward leaves embeddings and head gathered
        return (
            logp - torch.tensor([x for _, responses in sampled for r in responses for x in r.logp])
        ).abs()

    def free() -> float:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / GIB if CUDA else 0.0

    policy, device = load(name)
    before, (path, tokenizer, stops, *_) = free(), pretrained.describe(str(policy.source), 64)
    prompts, seeds = (
        [[*range(3, 3 + n)] for n in (700, 17, 400, 129)],
        [0, 100, 200, 300],
    )  # over and under a block
    engine = VLLMEngine(path, Decoding(tokenizer, stops, 1.0, 64), 800, gpu_memory=0.4)
    engine.push(policies.full_weights(policy, engine.dtype))
    sampled = [*engine.generate(prompts, 8, seeds)]
    with torch.no_grad():
        for parameter in policy.parameters():
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            part += 0.02 * torch.randn_like(part)
    stale, sleep = gaps(sampled).mean().item(), seconds(engine.sleep)
    asleep, push = (
        before - free(),
        seconds(lambda: engine.push(policies.full_weights(policy, engine.dtype))),
    )
    gap = gaps([*engine.generate(prompts, 8, seeds)])
    found = {
        "gap": gap.mean().item(),
        "rms": gap.square().mean().sqrt().item(),
        "tokens": len(gap),
        "stale_gap": stale,
        "seconds_push": push,
        "seconds_sleep": sleep,
    } | ({"asleep_gib": asleep} if CUDA else {})
    return found | (
        far(found["gap"], limit)
        or ({} if stale > 2 * found["gap"] else {"FAIL": "it pushed nothing new"})
    )


def weights(name: str) -> dict:
    """All of them, as vLLM gets them."""
    policy, device = load(name)
    return {
        "seconds_full_weights": statistics.median(
            seconds(
                lambda: [
                    None for _ in policies.full_weights(policy, policies.compute_dtype(device))
                ]
            )
            for _ in range(3)
        )
    }


def update(name: str, checkpointing: str, compiled: bool = False) -> dict:
    """Updates of four micro-batches a rank, the first of them for warming up. compiled: each layer by torch.compile,
    which train.py does not do."""
    prompt, length, size, budget = (1000, 256, 16, 16384) if CUDA else (100, 24, 4, 512)
    row = prompt + size * (length - 1)  # tokens that are computed of a group
    shape = {
        "prompt_tokens": prompt,
        "response_tokens": length,
        "group": size,
        "prompts": 4 * WORLD * (budget // row),
    }
    policy, device = load(name)
    policy.recompute(checkpointing, budget)
    for layer in policy.lm.base_model.layers if compiled else ():
        layer.compile()
    learner = updates.Learner(policy, None, updates.make_optimizer(policy, 1e-6), device)
    # From token 3 on: the pad token's embedding is 0, and RMSNorm makes its gradient overflow in a deep model.
    responses = [
        Response([*range(3 + g, 3 + g + length)], [-10.0] * length, [1] * length, "", "")
        for g in range(size)
    ]
    groups = [
        Group(
            prompts.Prompt([*range(3 + p, 3 + p + prompt)], None),
            [],
            responses,
            torch.zeros(size, 1),
            torch.linspace(-1, 1, size),
        )
        for p in range(shape["prompts"])
    ]
    times, norms = [], []
    try:
        for number in range(4):
            if CUDA and number == 1:  # the first makes AdamW's states, and fills caches
                torch.cuda.reset_peak_memory_stats()
            times.append(
                seconds(
                    lambda: norms.append(
                        updates.update(learner, groups, 1, 0.0, 1.0, budget)["grad_norm"]
                    )
                )
            )
    except torch.OutOfMemoryError:
        if checkpointing == "on":
            raise
        return {"skipped": "out of memory, as it may be"}
    median = statistics.median(times[1:])
    found = {
        "tokens_per_second": row * shape["prompts"] / median,
        "seconds_update": median,
        "grad_norm": norms[-1],
        **step.utilization(median, WORLD, model=name, **shape),
    }
    if CUDA:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found |= simulated(name, checkpointing, found["peak_gib"]) if WORLD == 1 else {}
    return (
        found
        if all(0 < norm < math.inf for norm in norms)
        else found | {"FAIL": "a gradient is 0 or not finite"}
    )


def simulated(name: str, checkpointing: str, peak: float) -> dict:
    """What tools/simulate.py says of the peak."""
    words = [
        "--json",
        "--size",
        name.removeprefix("random-"),
        "--gpus",
        "1",
        "--gradient-checkpointing",
        checkpointing,
        *"--prompt 1000 --response 256 --group 16 --tokens-per-microbatch 16384".split(),
    ]  # as in `update`
    out = subprocess.run(
        [sys.executable, ROOT / "tools/simulate.py", *words], check=True, stdout=subprocess.PIPE
    )
    expected = json.loads(out.stdout.splitlines()[-1])["peak_gib"]
    close = abs(peak / expected - 1) < 0.15
    return {"simulated_gib": expected} | (
        {} if close else {"FAIL": "its peak is not what tools/simulate.py says"}
    )


# The table


def reason(output: str) -> str:
    """The line that says most of what a process printed before it failed."""
    lines = re.findall(r"^(?:\[rank\d+\]:)?\s*(\S.*)", output, re.MULTILINE) or [
        "it printed nothing"
    ]
    telling = [
        line
        for line in lines
        if re.match(r"error: |FAILED |(?!.*ChildFailed)[\w.]*(Error|Exception)\b", line)
    ]
    return (telling or lines)[-1]


def found_by(log: Path, check: str, processes: int, arguments: dict) -> dict:
    """What that function returns, from a process of its own, or one a rank. The log has all that they print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (
        processes > 1
    )
    words = [sys.executable, *launcher, __file__, "--check", check, json.dumps(arguments)]
    one_thread = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
    }  # beside other jobs several are slower than one
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            words, stdout=file, stderr=file, env=one_thread, start_new_session=True
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
    return json.loads(found[-1]) if found and process.returncode == 0 else {"FAIL": reason(output)}


def plan(
    args: argparse.Namespace, gpus: int = 0, memory_gib: float = 0.0, **machine
) -> dict[str, tuple | str]:
    """Check -> function, processes and arguments; or why it is skipped. The machine is as `device` found it."""
    small = "random-0.5B" if gpus else "tiny"
    large = "random-1.5B" if memory_gib > 36 else small  # the largest whose update fits
    limit = (
        (0.05 if gpus else 1e-3) if args.gap_limit is None else args.gap_limit
    )  # bfloat16, float32
    ranks, lacking = args.ranks or gpus, "needs two GPUs" if gpus else "no GPU, and no --ranks"
    engine = "vllm" if importlib.util.find_spec("vllm") and not args.quick else "hf"
    trained, updated = (
        {"name": small, "engine": engine, "limit": limit},
        {"name": large, "checkpointing": "on"},
    )
    return {
        "tests": "--quick" if args.quick else ("tests", 1, {}),
        "run": ("run", 1, trained | {"ranks": 1}),
        "sync": ("sync", 1, {"name": large, "limit": limit}),
        "update": ("update", 1, updated),
        "update without recomputing": ("update", 1, updated | {"checkpointing": "off"}),
        "update compiled": ("update", 1, updated | {"compiled": True}) if gpus else "no GPU",
        "weights": ("weights", 1, {"name": large}),
        "sharded run": ("run", 1, trained | {"ranks": ranks}) if ranks > 1 else lacking,
        "sharded update": ("update", ranks, updated) if ranks > 1 else lacking,
    }


def main(args: argparse.Namespace) -> int:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    date, log, lines = time.strftime("%Y-%m-%d %H:%M:%S"), args.out.with_suffix(".log"), []

    def check(name: str, what: tuple | str) -> dict:
        began = time.monotonic()
        found = {"skipped": what} if isinstance(what, str) else found_by(log, *what)
        outcome = next((word for word in ("FAIL", "skipped") if word in found), "pass")
        lines.append(
            {
                "check": name,
                "outcome": outcome,
                "reason": found.pop(outcome, ""),
                "seconds": time.monotonic() - began,
                "figures": found,
            }
        )
        content = {
            "date": date,
            "command": shlex.join(sys.argv),
            "versions": run_directory.versions(),
            "checks": lines,
        }
        args.out.write_text(
            json.dumps(content, indent=1) + "\n"
        )  # after each: the machine may be taken away
        print(f"{name}: {outcome}", file=sys.stderr, flush=True)
        return found

    for name, what in plan(args, **check("device", ("device", 1, {}))).items():
        if name.startswith((*args.only.split(","),)):
            check(name, what)
    for line in lines:
        figures = (
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in line["figures"].items()
        )
        print(f"{line['check']:28}{line['outcome']:8}{line['seconds']:4.0f} s  ", end="")
        print(*filter(None, [line["reason"], *figures]), sep=", ")
    print(args.out, log)
    return int(any(line["outcome"] == "FAIL" for line in lines))


def one_check(name: str, arguments: str) -> None:
    result = globals()[name](**json.loads(arguments))
    if RANK == 0:
        print("\nFOUND " + json.dumps(result), flush=True)


if __name__ == "__main__":
    if not ARGS.check:
        sys.exit(main(ARGS))
    run_program(one_check, *ARGS.check)
