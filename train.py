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
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import balance
import checkpoint
import data
import files
import memory
import model
import policy as policies
import rewards as scoring
import rollout
import rvpo
import stop
from checkpoint import give_up, save_state
from files import make_run, write
from judge import Judge, check_missing, connect, total_counts
from options import check_args, parse_args, versions
from rewards import InputError
from rollout import RANK, WORLD, gather, on_rank_0
from update import make_optimizer, micro_batches, update

FIRST_SAVE = 600.0  # seconds until --save-every auto saves for the first time
CONSTANT = 10  # after as many steps a reward that has always been the same is pointed out


def score(judge: Judge | None, sampled: list) -> tuple[list, np.ndarray, dict]:
    """Of the whole batch, the same on every rank: P lists of G responses, raw rewards (P, G, K), NaN where a prompt has
    fewer than K channels, and what the judge did. sampled: this rank's share, see rollout.sample. Raises InputError on
    all ranks if a reward fails on one, and stop.Stop."""

    def outcome(rewards: Callable) -> np.ndarray | InputError:
        try:
            return rewards()
        except InputError as error:
            return error

    own = stop.interruptible(lambda: [(responses, outcome(rewards)) for responses, rewards in sampled])
    stop.check()
    everyone = gather(own)
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


def beginning() -> dict:
    """The progress of a run that has not begun, see checkpoint.py."""
    return {"step": 0, "saved": None, "bad_steps": 0, "ranges": {}, "first": {}, "lengths": {}}


def seed_rewards(seed: int, step: int) -> None:
    """A reward of the user's may draw at random: the same numbers, whether or not the run was resumed at this step. All
    else has seeds of its own."""
    random.seed(own := rollout.request_seed(seed, f"rewards {step}", RANK))
    np.random.seed(own)
    torch.manual_seed(own)


def channel_names(task: str, example: data.Example) -> list[str]:
    """What the prompt's channels are logged as."""
    return [criterion.label for criterion in example.criteria] or [reward.name for reward in scoring.TASKS[task]]


def widen(ranges: dict, names: list[list[str]], rewards: np.ndarray) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each channel so far. names: of each prompt's channels. rewards: (P, G, K)."""
    ranges = dict(ranges)
    for own, columns in zip(names, rewards.swapaxes(1, 2), strict=True):
        for name, values in zip(own, columns, strict=False):  # shorter than K where padded
            values = values[~np.isnan(values)].tolist() + list(ranges.get(name, ()))
            ranges |= {name: (min(values), max(values))} if values else {}
    return ranges


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
    digest = data.digest(*train, *held_out)
    if getattr(args, "data_sha256", digest) != digest:
        raise InputError(f"--resume {args.resume}: its data are not what they were when it began (SHA-256 in "
                         "config.json): bring them back, or begin a new run")
    args.data_sha256 = digest
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


def fit(args: argparse.Namespace, run: Path, device: torch.device, policy, optimizer, reference, engine,
        judge: Judge | None, train: list, held_out: list, progress: dict) -> dict[str, tuple[float, float]]:
    """The run itself, from progress["step"] on; progress is kept up to date for whoever saves it. Returns the last
    evaluation. Raises InputError if rewards fail or something cannot be written, and stop.Stop, on all ranks."""
    pair = balance.attention_cost(policy.lm.config)
    beta_schedule = rvpo.parse_beta(args.beta)
    bar = tqdm(total=args.steps, initial=progress["step"], disable=RANK > 0, unit="step", dynamic_ncols=True)
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

    def save_if_due() -> float:  # seconds that it took
        nonlocal saved, took
        if args.save_every == "auto":  # so that it takes 1% of the time
            due = gather([time.perf_counter() - saved >= (100 * took or FIRST_SAVE)])[0]
        else:
            due = int(args.save_every) and step % int(args.save_every) == 0
        if not due or step == begun:
            return 0.0
        start = now()
        save_state(args, run, policy, optimizer, progress)
        saved = now()
        took = saved - start
        return took

    engine.push(policies.full_weights(policy, engine.dtype))
    start = judge.start if judge else functools.partial(scoring.start, args.task)
    begun, bad_steps, ranges = progress["step"], progress["bad_steps"], progress["ranges"]
    saved, took = time.perf_counter(), 0.0
    for step in range(begun, args.steps + 1):
        # A checkpoint is what is known here: a run that is resumed repeats the evaluation that comes next.
        progress |= {"step": step, "bad_steps": bad_steps, "ranges": ranges, "lengths": files.lengths(run)}
        if bad_steps >= args.max_bad_steps and step > begun:
            raise InputError(f"a loss or gradient was not finite in each of the last {bad_steps} steps "
                             f"(--max-bad-steps): see bad_prompts in {run}/metrics.jsonl, and try a lower --lr")
        seed_rewards(args.seed, step)
        saving = save_if_due()
        if step in (0, args.steps) or (args.eval_every and step % args.eval_every == 0):
            last = run_evaluation(step)
            progress |= {"first": last} if step == 0 else {}
        if step == args.steps:
            break
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
        progress["step"] = None  # nothing that could be saved, until it is logged
        bad_steps = bad_steps + 1 if metrics["bad_updates"] else 0
        if metrics["bad_updates"]:
            metrics["bad_prompts"] = [slot for u in metrics["bad_updates"] for slot in slots[u].tolist()]
            say(f"step {step + 1}: a loss or gradient is not finite; updates left out: {metrics['bad_updates']}")
        times.append(now())
        engine.push(policies.full_weights(policy, engine.dtype))
        times.append(now())

        # Log.
        lengths = [len(response.tokens) for group in responses for response in group]
        phases = "sample", "score", "advantage", "write", "update", "sync"
        seconds = dict(zip(phases, np.diff(times).tolist(), strict=True)) | {"save": saving}
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
        ranges = widen(ranges, names, rewards.numpy())
        for name, (low, high) in ranges.items() if step + 1 == CONSTANT else ():
            if low == high:
                say(f"warning: reward '{name}' was {low:g} for every response of {CONSTANT} steps: it teaches nothing")
    bar.close()
    return last


def main() -> None:
    args = parse_args(__doc__)
    check_args(args)
    resuming = args.resume not in (None, "auto")
    make = contextlib.nullcontext(Path(args.resume)) if resuming else make_run(args.name, args.resume == "auto")
    progress, found = beginning(), None
    with make as run:
        if resuming and files.finished(run):
            if RANK == 0:
                print(f"{run} is finished, with all of its {args.steps} steps: nothing is left to do")
            return
        if resuming:
            found = files.latest(run)
            checkpoint.read(found)
        device, dtype, policy, reference, tokenizer, engine, judge, train, held_out = setup(args)
        optimizer = make_optimizer(policy, args.lr)
        if found:
            progress = checkpoint.load(found, policy, optimizer)
        config = {**vars(args), "world_size": WORLD, "device": str(device), "versions": versions()}
        try:
            on_rank_0(lambda: files.truncate(run, progress["lengths"]))
            on_rank_0(lambda: files.write_json(run / "config.json", config))
        except OSError as error:
            raise InputError(f"{run}: {error}") from error
        stop.catch_signals()
        try:
            last = fit(args, run, device, policy, optimizer, reference, engine, judge, train, held_out, progress)
            policies.save(policy, tokenizer, run / "checkpoint", dtype)
        except (InputError, stop.Stop) as error:  # on all ranks
            stopped = isinstance(error, stop.Stop)
            how = give_up(args, run, policy, optimizer, progress, None if stopped else tokenizer, dtype)
            if stopped and RANK == 0:
                print(f"\n{error}; {how}", file=sys.stderr, flush=True)
            if stopped or RANK:  # one sentence is enough
                sys.exit(error.code if stopped else 1)
            raise InputError(f"{error}; {how}") from error
    if RANK == 0:
        if (run / "state").exists():
            files.retire(run / "state")
        first = progress["first"]
        print(f"\n{len(held_out)} held-out prompts    before           after     (standard error)")
        for name in [name for name in first if name in last]:
            print(f"{name:>20}  {first[name][0]:.3f} ({first[name][1]:.3f})  {last[name][0]:.3f} ({last[name][1]:.3f})")
        print(f"\n{run}: metrics.jsonl, samples.jsonl, checkpoint/")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
