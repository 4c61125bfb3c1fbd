"""Train a policy with RVPO, or with one of the paper's baselines.

    python train.py                                                              # SmolLM2-135M on a laptop
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B --agg rvpo      # one node with 8 GPUs

Kept from GRPO: G rollouts a prompt instead of a critic, the clipped ratio, an optional KL penalty. Every number is, but
for rounding and random rewards, the same for any number of ranks. Begin with `fit`.
"""

import sys

from config import TrainConfig, parse
from ranks import RANK, WORLD, InputError, join, run_program

try:  # before torch is imported: a wrong option must not wait for it
    CONFIG = parse(TrainConfig, __doc__) if __name__ == "__main__" else None
except InputError as error:
    sys.exit(f"error: {error}")

import functools
import itertools
import math
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import checkpoint
import model
import policy as policies
import rvpo
from checkpoint import catch_signals, check_signals
from config import parse_beta
from model import Prompt
from rewards import Task, load_prompts, load_task, to_unit
from rollout import Decoding, Group, Response, Sampler, VLLMEngine

GRAD_CLIP = 1.0  # the gradient norm is clipped to this, as in ToolRL
PHASES = "sample", "score", "advantage", "write", "update", "sync", "save"  # of a step, in metrics.jsonl


# The update: optimizer steps on a batch of groups, each prompt computed once, and none that has nothing to teach.

class Learner(NamedTuple):  # what is trained, and what trains it
    policy: policies.Policy
    reference: policies.Policy | None  # of the KL penalty
    optimizer: torch.optim.Optimizer
    device: torch.device


def make_optimizer(policy, lr: float) -> torch.optim.AdamW:
    """With ToolRL's settings, in one fused kernel."""
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)


def computed(group: Group) -> int:
    """Tokens of a prompt and its responses that go through the model: a response's last one predicts nothing."""
    return len(group.prompt.ids) + sum(max(0, len(response.tokens) - 1) for response in group.responses)


def split(group: Group, limit: int) -> list[Group]:
    """Parts whose responses have at most `limit` computed tokens; a single one may have more."""
    parts, tokens = [[]], 0
    for i, response in enumerate(group.responses):
        n = max(0, len(response.tokens) - 1)
        if parts[-1] and tokens + n > limit:
            parts, tokens = [*parts, []], 0
        parts[-1].append(i)
        tokens += n
    return [group.part(chosen) for chosen in parts]


def deal(groups: list[Group], ranks: int, budget: int) -> list[list[list[Group]]]:
    """For each rank its micro-batches, at least one and equally many (sharded ranks wait for each other at every layer)
    of at most `budget` tokens, unless one response with its prompt has more. The largest group goes first, to the one
    with the fewest tokens. A group whose responses exceed the budget, or a rank's share of all, is split."""
    share = math.ceil(sum(computed(group) - len(group.prompt.ids) for group in groups) / ranks)
    parts = [part for group in groups for part in split(group, min(budget - len(group.prompt.ids), share))]
    parts.sort(key=computed, reverse=True)
    least = math.ceil(sum(min(computed(part), budget) for part in parts) / ranks / budget)
    for rounds in itertools.count(max(1, least)):  # as few as will do: each gathers all weights
        batches, tokens = [[] for _ in range(rounds * ranks)], [0] * (rounds * ranks)
        for part in parts:
            b = tokens.index(min(tokens))
            if batches[b] and tokens[b] + computed(part) > budget:
                break
            batches[b].append(part)
            tokens[b] += computed(part)
        else:
            break
    batches.sort(key=lambda batch: -sum(map(computed, batch)))  # those that ranks compute at one time are alike
    return [batches[rank::ranks] for rank in range(ranks)]


# What an idle rank computes: sharded layers need all ranks at every forward, AdamW needs gradients, if only of 0.
IDLE = [Group(Prompt([0], None), [], [Response([0], [0.0], [0], "", "")], torch.zeros(1, 0), torch.zeros(1))]


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def row_of(groups: list[Group], device: torch.device) -> tuple[policies.Row, Tensor, Tensor, Tensor]:
    """A micro-batch as one row, and of its N response tokens, in that order: mask, log-prob when sampled, advantage."""
    row = policies.pack([(group.prompt.ids, [r.tokens for r in group.responses]) for group in groups], device)
    responses = [response for group in groups for response in group.responses]
    lengths = torch.tensor([len(response.tokens) for response in responses])
    advantages = torch.cat([group.advantages for group in groups]).repeat_interleave(lengths)
    mask, logp = ([x for r in responses for x in r.mask], [x for r in responses for x in r.logp])
    return row, *(torch.as_tensor(x, dtype=torch.float32, device=device) for x in (mask, logp, advantages))


def update(learner: Learner, groups: list[Group], updates: int, kl: float, temperature: float,
           budget: int) -> dict[str, float]:
    """Optimizer steps on one batch of groups, `updates` of them, each on prompts of its own. kl: coefficient of the
    penalty. budget: most tokens in a micro-batch. A prompt whose advantages are all 0 has no gradient and is not
    computed, unless there is a KL penalty. Returns the mean loss over all of the tokens, other means over those that
    were computed, the largest gradient norm before clipping, and which updates were left out because loss or gradient
    was not finite (bad_updates; bad_prompts: places in the batch). Raises checkpoint.Stop on all ranks, with the policy
    unchanged."""
    policy, device = learner.policy, learner.device
    slots = np.array_split(np.arange(len(groups)), updates)
    # Sampled tokens of each update, also of prompts that are not computed. Counted first, over all ranks: any split
    # into micro-batches and ranks then gives the same mean over tokens, and losses and gradients simply add up.
    n_tokens = [sum(sum(response.mask) for slot in share for response in groups[slot].responses) for share in slots]
    kept = [[groups[slot] for slot in share if kl or groups[slot].advantages.any()] for share in slots]
    packed = [[row_of(batch or IDLE, device) for batch in deal(some, WORLD, budget)[RANK]] for some in kept]
    # Old log-probs. None for the first update: its policy is the one that sampled, and logp.detach() stands in.
    old_logp = [[None] * len(packed[0])]
    with torch.no_grad():
        for batches in packed[1:]:
            old_logp.append([check_signals() or policy(row, temperature) for row, *_ in batches])
    if isinstance(policy, FSDPModule):
        policy.reshard()  # a forward without backward leaves embeddings and head gathered: AdamW would step on copies
    names = [*"loss tokens clip_fraction is_weight sampler_gap entropy".split(), *["kl"] * bool(learner.reference)]
    sums, grad_norms, bad = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}, [], []
    for u, batches in enumerate(packed):
        losses = torch.zeros((), device=device)
        for i, ((row, mask, sampler_logp, advantages), old) in enumerate(zip(batches, old_logp[u], strict=True)):
            if u == 0:  # afterwards the policy has changed, and the step is finished
                check_signals()
            logp = policy(row, temperature)
            loss, stats = rvpo.policy_loss(logp, logp.detach() if old is None else old, sampler_logp, advantages, mask,
                                           max(1, n_tokens[u]))
            stats["entropy"] = -(logp.detach() * mask).sum()  # an estimate: the mean of -log p over sampled tokens
            stats["tokens"] = mask.sum()
            if learner.reference is not None:
                with torch.no_grad():
                    ref_logp = learner.reference(row, temperature)
                stats["kl"] = (rvpo.kl_k3(logp, ref_logp) * mask).sum()
                loss = loss + kl * stats["kl"] / max(1, n_tokens[u])
            stats["loss"] = loss * n_tokens[u]
            if isinstance(policy, FSDPModule):  # gradients go from node to node once, with those of the last batch
                policy.set_requires_all_reduce(i == len(batches) - 1)
            (loss * WORLD).backward()  # fully_shard takes the mean over ranks, this is a sum
            losses += loss.detach()
            for name in names:
                sums[name] += stats[name].detach()
        norm = step(learner, losses)
        (bad if norm is None else grad_norms).append(u if norm is None else norm)
    loss, tokens, *others = all_sum(torch.stack([*sums.values()])).tolist()
    return {"loss": loss / max(1, sum(n_tokens)),
            **{name: total / tokens if tokens else math.nan for name, total in zip(names[2:], others, strict=True)},
            "grad_norm": max(grad_norms, default=math.nan), "bad_updates": bad,
            "bad_prompts": [slot for u in bad for slot in slots[u].tolist()],
            "skipped_prompts": len(groups) - sum(map(len, kept))}


def step(learner: Learner, loss: Tensor) -> float | None:
    """An optimizer step on the gradients that are there. Returns their norm before clipping. None, on all ranks, if it
    or the loss (this rank's) is not finite: then nothing was changed."""
    norm = torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), GRAD_CLIP)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    finite = math.isfinite(norm) and math.isfinite(all_sum(loss).item())
    if finite:
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    return norm if finite else None


# The loop

def set_advantages(groups: list[Group], agg: str, beta: float) -> None:
    """Sets the advantages (G,) of each of P groups, from the rewards of all."""
    width = max(len(group.channels) for group in groups)  # K; a prompt with fewer channels is padded with NaN
    rewards = torch.full((len(groups), len(groups[0].responses), width), math.nan, dtype=torch.float64)  # (P, G, K)
    weights = torch.zeros(len(groups), width, dtype=torch.float64)  # (P, K)
    for p, group in enumerate(groups):
        # softmin takes absolute rewards: each channel 0 at its worst, 1 at its best
        k = len(group.channels)
        rewards[p, :, :k] = to_unit(group.channels, group.rewards) if agg == "softmin" else group.rewards
        weights[p, :k] = torch.tensor([channel.weight for channel in group.channels])
    for group, advantages in zip(groups, rvpo.advantages(rewards, agg, beta, weights), strict=True):
        group.advantages = advantages


def prompt_at(position: int, n: int, seed: int) -> int:
    """Index of the prompt at a position of the endless stream of shuffled epochs of n prompts."""
    return int(shuffled(n, seed, position // n)[position % n])


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def evaluate(sampler: Sampler, held_out: list[Prompt], log, step: int) -> None:
    """One sample for each held-out prompt, with the same request seeds each time."""
    groups, task = sampler.score(held_out, sampler.sample(held_out, 1, "eval")), sampler.task
    report = task.report([group.rewards.numpy() for group in groups]) if groups else {}
    scores, full = [], {}
    for group in groups:
        response, rewards = group.responses[0].text, group.rewards[0].numpy()
        by_name, _ = task.result(group.prompt.example, response, rewards)
        scores.append(by_name)
        full |= {channel.name: channel.full for channel in group.channels}
    log.evaluation(step, scores, report, full)
    if groups:
        task.check(report)


def fit(config: TrainConfig, learner: Learner, sampler: Sampler, prompts: list[Prompt], log, evaluate,
        checkpoints) -> None:
    """The run itself, from checkpoints.state on. log, checkpoints: as in checkpoint.py. evaluate: of the step it is at.
    Raises InputError if rewards fail, losses are not finite or a file cannot be written, and checkpoint.Stop."""
    def now() -> float:
        if learner.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    state, engine, beta_schedule = checkpoints.state, sampler.engine, parse_beta(config.beta)
    engine.push(policies.full_weights(learner.policy, engine.dtype))
    while True:
        saving = checkpoints.save_if_due()
        if state.step in (0, config.steps) or (config.eval_every and state.step % config.eval_every == 0):
            evaluate(state.step)
        if state.step == config.steps:
            return

        # Sample and score the P prompts of this step. A judge is already at work while the last prompts are sampled.
        times = [now()]
        positions = range(state.step * config.prompts, (state.step + 1) * config.prompts)
        batch = [prompts[prompt_at(position, len(prompts), config.seed)] for position in positions]
        sampled = sampler.sample(batch, config.group, state.step)
        times.append(now())
        groups = sampler.score(batch, sampled)  # P of them, on every rank
        report = sampler.task.report([group.rewards.numpy() for group in groups])
        times.append(now())

        # Advantages of the whole batch, on every rank; written before anything can go wrong with them.
        beta = rvpo.beta_at(beta_schedule, state.step, config.steps)
        set_advantages(groups, config.agg, beta)
        times.append(now())
        log.groups(state.step + 1, groups)
        sampler.task.check(report)
        times.append(now())

        engine.sleep()
        left = 1 - (config.lr_schedule == "linear") * state.step / config.steps
        for parameters in learner.optimizer.param_groups:
            parameters["lr"] = lr = config.lr * min(left, (state.step + 1) / (config.warmup + 1))
        metrics = update(learner, groups, config.updates, config.kl, config.temperature, config.tokens_per_microbatch)
        times.append(now())
        engine.push(policies.full_weights(learner.policy, engine.dtype))
        times.append(now())

        metrics |= {"beta": beta, "lr": lr, "seconds": dict(zip(PHASES, [*np.diff(times), saving], strict=True))}
        log.step(state.step + 1, groups, metrics | ({"judge": report} if report else {}))
        state.bad_steps = state.bad_steps + 1 if metrics["bad_updates"] else 0
        state.step += 1


# The program

def setup(config: TrainConfig, device: torch.device, task: Task, known: model.Pretrained,
          longest: int):
    """Model and engine. longest: tokens of a prompt with its response. Returns (learner, sampler,
    what writes the policy into a directory). Raises InputError."""
    path, tokenizer = known.path, known.tokenizer
    decoding = Decoding(tokenizer, known.stops, config.temperature, config.max_tokens)
    mesh, half = policies.make_mesh(device), policies.compute_dtype(device)
    model.announce(config.model)
    with model.readable(config.model):
        policy = policies.load(path, device, mesh)
        reference = policies.load(path, device, mesh, half, trained=False) if config.kl else None
        optimizer = make_optimizer(policy, config.lr)
        checkpoint.tensors(policy, optimizer)  # AdamW's moments, too: made later they would take blocks that vLLM needs
        policy.recompute(config.gradient_checkpointing, config.tokens_per_microbatch)
        if config.engine == "vllm":
            at_a_time = min(32, max(config.prompts * config.group, config.eval_prompts))
            engine = VLLMEngine(path, decoding, longest, config.gpu_memory, at_a_time)
        else:
            from local import hf

            engine = hf.HFEngine(hf.load(path, device, half), decoding)
    learner = Learner(policy, reference, optimizer, device)
    write_policy = functools.partial(checkpoint.save_policy, policy, tokenizer, known.dtype)
    return learner, Sampler(engine, task, config.seed), write_policy


def main(config: TrainConfig) -> None:
    device = join()
    today = {"date": model.today(config.date)}  # a run that is resumed has its own
    with checkpoint.open_run(config.model_dump() | today, config._given) as (run, options, state):
        config = TrainConfig(**options)
        task = load_task(config.task_options())
        wanted = config.steps * config.prompts
        train, held_out = load_prompts(task, config.task, wanted, config.eval_prompts)
        if not train:
            raise InputError(f"--task {config.task}: there are no prompts to train on")
        digest = checkpoint.check_data(run, train + held_out)
        task.try_out(train[0])  # a faulty reward is found now, and not after the model is loaded
        known = model.describe(config.model, config.max_tokens, trained=True)
        train, held_out = (
            model.encode(known.tokenizer, examples, known.room, known.embeddings, config.date,
                         config.enable_thinking) for examples in (train, held_out))
        tokens = checkpoint.check_tokens(run, train + held_out)
        longest = max(len(prompt.ids) for prompt in train + held_out) + config.max_tokens
        about = {**config.model_dump(), "data_sha256": digest, "tokens_sha256": tokens, "device": str(device),
                 "world_size": WORLD, "versions": checkpoint.versions()}
        tracker = checkpoint.open_tracker(run, about, resumed=checkpoint.latest(run) is not None)
        learner, sampler, write_policy = setup(config, device, task, known, longest)
        log = checkpoint.RunLog(run, config.steps, state.step, write_policy if config.keep_policies else None, tracker)
        checkpoints = checkpoint.Checkpoints(log, learner.policy, learner.optimizer, config.save_every, state)
        log.begin(state, about)
        catch_signals()
        with checkpoints.saving_what_can_be(write_policy):
            fit(config, learner, sampler, train, log, functools.partial(evaluate, sampler, held_out, log), checkpoints)
            write_policy(run / "checkpoint")
    checkpoint.finish(log, len(held_out))


if __name__ == "__main__":
    run_program(main, CONFIG)
