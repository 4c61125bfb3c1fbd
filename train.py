"""Train a policy with RVPO, or with one of the paper's baselines: sample, score, advantages, update, log.

    python train.py                                                              # SmolLM2-135M on a laptop
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B --agg rvpo      # one node with 8 GPUs

Kept from GRPO: G rollouts a prompt instead of a critic, the clipped ratio, an optional KL penalty. Each rank samples
its share of the step's prompts; responses and rewards are gathered, and the update is dealt out anew by work
(balance.py). Every number below is, but for rounding, the same for any number of ranks.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import balance
import data
import memory
import model
import policy as policies
import rewards as scoring
import rollout
import rvpo
from judge import Judge, check_missing, connect, total_counts
from options import check_args, parse_args, versions
from rewards import InputError
from rollout import RANK, WORLD, gather
from update import micro_batches, update


def score(judge: Judge | None, sampled: list) -> tuple[list, np.ndarray, dict]:
    """Of the whole batch, the same on every rank: P lists of G responses, raw rewards (P, G, K), NaN where a prompt has
    fewer than K channels, and what the judge did. sampled: this rank's share, see rollout.sample. Raises InputError on
    all ranks if a reward fails on one."""

    def outcome(rewards: Callable) -> np.ndarray | InputError:
        try:
            return rewards()
        except InputError as error:
            return error

    everyone = gather([(responses, outcome(rewards)) for responses, rewards in sampled])
    for _, own in everyone:
        if isinstance(own, InputError):
            raise own
    width = max(own.shape[1] for _, own in everyone)
    padded = [np.pad(own, ((0, 0), (0, width - own.shape[1])), constant_values=np.nan) for _, own in everyone]
    counts = total_counts(judge, [own for _, own in everyone]) if judge else {}
    return [responses for responses, _ in everyone], np.stack(padded), counts


def channel_weights(batch: list, width: int) -> torch.Tensor:
    """(P, K): the weights of each prompt's criteria, 0 where it has fewer than K."""
    weights = torch.zeros(len(batch), width, dtype=torch.float64)
    for p, (_, example) in enumerate(batch):
        weights[p, :len(example.criteria)] = torch.tensor([criterion.weight for criterion in example.criteria])
    return weights


def channel_names(task: str, example: data.Example) -> list[str]:
    """What the prompt's channels are logged as."""
    return [criterion.label for criterion in example.criteria] or [reward.name for reward in scoring.TASKS[task]]


def evaluate(engine, judge: Judge | None, start: Callable, held_out: list,
             args: argparse.Namespace) -> tuple[dict[str, tuple[float, float]], dict]:
    """One sample for each held-out prompt, with the same request seeds each time. Mean and standard error over prompts
    of every channel and of the joint rate (all channels satisfied), and what the judge did. start: as rollout.sample
    has it."""
    _, rewards, counts = score(judge, rollout.sample(engine, start, held_out, 1, args.seed, "eval"))
    columns: dict[str, list[float]] = {}
    for (_, example), own in zip(held_out, rewards[:, 0], strict=True):
        names = np.array(channel_names(args.task, example))
        for name in dict.fromkeys(names.tolist()):
            values = own[:len(names)][(names == name) & ~np.isnan(own[:len(names)])]
            columns.setdefault(name, []).extend([values.mean()] if len(values) else [])
    joint = scoring.satisfied(args.task, rewards[:, 0])
    columns["joint"] = joint[~np.isnan(joint)].tolist()
    return {name: (np.mean(x), np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan)
            for name, x in columns.items() if x}, counts


def setup(args: argparse.Namespace):
    """Distributed, model, engine, judge and data. Returns (device, checkpoint dtype, policy, reference, tokenizer,
    engine, judge, training prompts, held-out prompts). Raises InputError, as early as it can."""
    rubric, judge = {}, None
    if args.task in scoring.JUDGED:
        rubric, judge = {"weights": args.criterion_weights, "pitfalls": args.pitfalls}, connect(args)
    train, held_out = data.load(args.task, args.data, args.eval_data, args.steps * args.prompts, args.eval_prompts,
                                **rubric)
    if judge is None:  # a faulty reward is found now, and not after the model is loaded
        scoring.score(args.task, [train[0].messages[-1]["content"]] * 2, ["", train[0].reference],
                      [train[0].reference] * 2)
    path, tokenizer, stops, dtype, room = model.describe(args.model, args.max_tokens)
    model.check_architecture(args.model, path)
    train, held_out = data.encode(tokenizer, train, room), data.encode(tokenizer, held_out, room)
    longest = max(len(ids) for ids, _ in train + held_out) + args.max_tokens
    device = rollout.join_ranks()
    checkpointing = memory.check(args, path, longest)
    with model.readable(args.model):
        mesh = policies.make_mesh(device)
        policy = policies.load(path, device, mesh, gradient_checkpointing=checkpointing)
        dtype_there = policies.compute_dtype(device)
        reference = policies.load(path, device, mesh, dtype_there).requires_grad_(False) if args.kl else None
        if args.engine == "vllm":
            at_a_time = min(32, max(args.prompts * args.group, args.eval_prompts))
            engine = rollout.VLLMEngine(path, tokenizer, stops, longest, args.temperature, args.max_tokens, args.seed,
                                        args.gpu_memory, args.tp, at_a_time=at_a_time)
        else:
            engine = rollout.HFEngine(model.load(path, device, dtype_there), tokenizer, stops, args.temperature,
                                      args.max_tokens)
    return device, dtype, policy, reference, tokenizer, engine, judge, train, held_out


def write(file: Path, *records: dict) -> None:
    """Append JSON lines, on rank 0. NaN and infinity, which are no JSON, become null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    if RANK == 0:
        with file.open("a") as out:
            out.writelines(json.dumps(plain(record)) + "\n" for record in records)


def fit(args: argparse.Namespace, run: Path, device: torch.device, policy, reference, engine, judge: Judge | None,
        train: list, held_out: list) -> tuple[dict, dict]:
    """The run itself. Returns the first and the last evaluation. Raises InputError if rewards fail."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    pair = balance.attention_cost(policy.lm.config)
    beta_schedule = rvpo.parse_beta(args.beta)
    bar = tqdm(total=args.steps, disable=RANK > 0, unit="step", dynamic_ncols=True)
    say = bar.write if RANK == 0 else lambda line: None

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run_evaluation(step: int) -> dict[str, tuple[float, float]]:
        result, counts = evaluate(engine, judge, start, held_out, args) if held_out else ({}, {})
        write(run / "metrics.jsonl", {"step": step, "eval": result, **({"judge": counts} if counts else {})})
        if counts:
            check_missing(counts, counts["missing"], "the judge's verdicts are", args.judge_max_missing)
        say(f"held out, {step} steps: " + " ".join(f"{name} {mean:.2f}" for name, (mean, _) in result.items()))
        return result

    engine.push(policies.full_weights(policy, engine.dtype))
    start = judge.start if judge else functools.partial(scoring.start, args.task)
    first = last = run_evaluation(0)
    for step in range(args.steps):
        times = [now()]

        # Sample and score the P prompts of this step. A judge is already at work while the last prompts are sampled.
        positions = range(step * args.prompts, (step + 1) * args.prompts)
        batch = [train[data.prompt_at(position, len(train), args.seed)] for position in positions]  # P (ids, Example)
        sampled = rollout.sample(engine, start, batch, args.group, args.seed, step)
        times.append(now())
        responses, rewards, judged = score(judge, sampled)  # P lists of G, (P, G, K)
        times.append(now())

        # Advantages of the whole batch, on every rank.
        beta, rewards = rvpo.beta_at(beta_schedule, step, args.steps), torch.from_numpy(rewards)
        weights = channel_weights(batch, rewards.shape[-1]) if judge else None  # (P, K)
        absolute = scoring.unit(args.task, rewards) if args.agg == "softmin" else rewards
        advantages = rvpo.advantages(absolute, args.agg, beta, weights)  # (P, G)
        times.append(now())

        # Written before anything can go wrong with them.
        names = [channel_names(args.task, example) for _, example in batch]  # P lists
        write(run / "samples.jsonl", *(
            {"step": step + 1, "prompt": example.messages, "response": response.text, "finish": response.finish,
             "rewards": dict(zip([f"{k} {c.text}" for k, c in enumerate(example.criteria, 1)] or names[p],
                                 rewards[p, g].tolist(), strict=False)),  # shorter than K where padded
             "advantage": advantages[p, g].item()}
            for p, (_, example) in enumerate(batch) for g, response in enumerate(responses[p])))
        if judge:
            check_missing(judged, judged["missing"], "the judge's verdicts are", args.judge_max_missing)
        times.append(now())

        # Update, each optimizer step on its own share of the prompts.
        engine.sleep()
        slots = np.array_split(np.arange(args.prompts), args.updates)
        updates = [(sum(sum(response.mask) for slot in share for response in responses[slot]),
                    micro_batches(share, batch, responses, advantages, pair, args)) for share in slots]
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr = args.lr * min(1.0, (step + 1) / (args.warmup + 1))
        metrics = update(policy, reference, optimizer, updates, args, device)
        times.append(now())
        engine.push(policies.full_weights(policy, engine.dtype))
        times.append(now())

        # Log.
        lengths = [len(response.tokens) for group in responses for response in group]
        phases = "sample", "score", "advantage", "write", "update", "sync"
        seconds = dict(zip(phases, np.diff(times).tolist(), strict=True))
        joint = torch.from_numpy(scoring.satisfied(args.task, rewards.numpy())).nanmean().item()
        metrics |= {
            "joint": joint, "beta": beta, "lr": lr,
            "advantage_std": advantages.std().item(), "no_signal": 1 - rvpo.has_signal(rewards).double().mean().item(),
            "skipped_prompts": 0 if args.kl else (advantages == 0).all(-1).sum().item(),
            "truncated": np.mean([response.finish == "length" for group in responses for response in group]),
            "length_mean": np.mean(lengths), "length_max": max(lengths),
            "tokens_per_second": sum(lengths) / (times[-1] - times[0]), "seconds": seconds,
            "channels": rvpo.channel_stats(rewards, beta, names, weights),
        }
        if judge:
            metrics["judge"] = {**judged, "share_of_step": judged["seconds"] / (times[-1] - times[0])}
        write(run / "metrics.jsonl", {"step": step + 1, **metrics})
        say(f"step {step + 1}: joint {joint:.2f} | "
            + " ".join(f"{name} {stats['mean']:.2f}" for name, stats in metrics["channels"].items())
            + f" | grad {metrics['grad_norm']:.2f} entropy {metrics['entropy']:.2f} length {np.mean(lengths):.0f} | "
            + " ".join(f"{phase} {t:.1f}s" for phase, t in seconds.items() if t >= 0.05)
            + (f" | judge {judged['requests']} requests {judged['seconds']:.1f}s" if judge else ""))
        bar.set_postfix(joint=f"{joint:.2f}", grad=f"{metrics['grad_norm']:.2f}", refresh=False)
        bar.update()
        if step + 1 == args.steps or (args.eval_every and (step + 1) % args.eval_every == 0):
            last = run_evaluation(step + 1)
    bar.close()
    return first, last


@contextlib.contextmanager
def make_run(name: str):
    """The new folder runs/name, made before anything is loaded; removed if an error comes before it has a file."""
    run = Path("runs") / name
    if RANK == 0:
        try:
            run.mkdir(parents=True)
        except FileExistsError as error:
            raise InputError(f"{run} exists: choose another --name, or delete it") from error
        except OSError as error:
            raise InputError(f"{run} cannot be made: {error}") from error
    try:
        yield run
    except BaseException:  # Ctrl-C, too
        if RANK == 0 and not any(run.iterdir()):
            run.rmdir()
        raise


def main() -> None:
    args = parse_args(__doc__)
    check_args(args)
    with make_run(args.name) as run:
        device, dtype, policy, reference, tokenizer, engine, judge, train, held_out = setup(args)
        if RANK == 0:
            config = {**vars(args), "world_size": WORLD, "device": str(device), "versions": versions()}
            (run / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        try:
            first, last = fit(args, run, device, policy, reference, engine, judge, train, held_out)
        except InputError as error:  # on all ranks
            policies.save(policy, tokenizer, run / "checkpoint", dtype)
            if RANK:
                sys.exit(1)  # one sentence is enough
            raise InputError(f"{error}; the policy as it was then is in {run}/checkpoint") from error
    policies.save(policy, tokenizer, run / "checkpoint", dtype)
    if RANK == 0:
        print(f"\n{len(held_out)} held-out prompts    before           after     (standard error)")
        for name in [name for name in first if name in last]:
            print(f"{name:>20}  {first[name][0]:.3f} ({first[name][1]:.3f})  {last[name][0]:.3f} ({last[name][1]:.3f})")
        print(f"\n{run}: metrics.jsonl, samples.jsonl, checkpoint/")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
