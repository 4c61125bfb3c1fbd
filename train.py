"""Train a policy with RVPO, or with one of the paper's baselines.

    python train.py                                                              # SmolLM2-135M on a laptop
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B --agg rvpo      # one node with 8 GPUs

Kept from GRPO: G rollouts a prompt instead of a critic, the clipped ratio, an optional KL penalty. Every number is, but
for rounding and random rewards, the same for any number of ranks. Begin with `fit`.
"""

import sys

from config import TrainConfig, parse
from infra.ranks import WORLD, InputError, join, run_program

try:  # before torch is imported: a wrong option must not wait for it
    CONFIG = parse(TrainConfig, __doc__) if __name__ == "__main__" else None
except InputError as error:
    sys.exit(f"error: {error}")

import functools
import math
import time

import numpy as np
import torch

import policy as policies
import rvpo
from config import parse_beta
from infra import pretrained, resume, run_directory
from infra.log import RunLog, open_tracker
from infra.prompts import Prompt, encode, today
from infra.signals import catch_signals
from infra.state import Checkpoints, tensors
from rewards import Task, to_unit
from rollout import Decoding, Group, Sampler, VLLMEngine
from tasks import load_prompts, load_task
from update import Learner, make_optimizer, update

PHASES = (
    "sample",
    "score",
    "advantage",
    "write",
    "update",
    "sync",
    "save",
)  # of a step, in metrics.jsonl


# The loop


def set_advantages(groups: list[Group], agg: str, beta: float) -> None:
    """Sets the advantages (G,) of each of P groups, from the rewards of all."""
    width = max(
        len(group.channels) for group in groups
    )  # K; a prompt with fewer channels is padded with NaN
    rewards = torch.full(
        (len(groups), len(groups[0].responses), width), math.nan, dtype=torch.float64
    )  # (P, G, K)
    weights = torch.zeros(len(groups), width, dtype=torch.float64)  # (P, K)
    for p, group in enumerate(groups):
        # softmin takes absolute rewards: each channel 0 at its worst, 1 at its best
        k = len(group.channels)
        rewards[p, :, :k] = (
            to_unit(group.channels, group.rewards) if agg == "softmin" else group.rewards
        )
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


def fit(
    config: TrainConfig,
    learner: Learner,
    sampler: Sampler,
    prompts: list[Prompt],
    log,
    evaluate,
    checkpoints,
) -> None:
    """The run itself, from checkpoints.state on. log, checkpoints: as in checkpoint.py. evaluate: of the step it is at.
    Raises InputError if rewards fail, losses are not finite or a file cannot be written, and signals.Stop."""

    def now() -> float:
        if learner.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    state, engine, beta_schedule = checkpoints.state, sampler.engine, parse_beta(config.beta)
    engine.push(policies.full_weights(learner.policy, engine.dtype))
    while True:
        saving = checkpoints.save_if_due()
        if state.step in (0, config.steps) or (
            config.eval_every and state.step % config.eval_every == 0
        ):
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
        metrics = update(
            learner,
            groups,
            config.updates,
            config.kl,
            config.temperature,
            config.tokens_per_microbatch,
        )
        times.append(now())
        engine.push(policies.full_weights(learner.policy, engine.dtype))
        times.append(now())

        metrics |= {
            "beta": beta,
            "lr": lr,
            "seconds": dict(zip(PHASES, [*np.diff(times), saving], strict=True)),
        }
        log.step(state.step + 1, groups, metrics | ({"judge": report} if report else {}))
        state.bad_steps = state.bad_steps + 1 if metrics["bad_updates"] else 0
        state.step += 1


# The program


def setup(
    config: TrainConfig,
    device: torch.device,
    task: Task,
    known: pretrained.Pretrained,
    longest: int,
):
    """Model and engine. longest: tokens of a prompt with its response. Returns (learner, sampler,
    what writes the policy into a directory). Raises InputError."""
    path, tokenizer = known.path, known.tokenizer
    decoding = Decoding(tokenizer, known.stops, config.temperature, config.max_tokens)
    mesh, half = policies.make_mesh(device), policies.compute_dtype(device)
    pretrained.announce(config.model)
    with pretrained.readable(config.model):
        policy = policies.load(path, device, mesh)
        reference = policies.load(path, device, mesh, half, trained=False) if config.kl else None
        optimizer = make_optimizer(policy, config.lr)
        tensors(
            policy, optimizer
        )  # AdamW's moments, too: made later they would take blocks that vLLM needs
        policy.recompute(config.gradient_checkpointing, config.tokens_per_microbatch)
        if config.engine == "vllm":
            at_a_time = min(32, max(config.prompts * config.group, config.eval_prompts))
            engine = VLLMEngine(path, decoding, longest, config.gpu_memory, at_a_time)
        else:
            from local import hf

            engine = hf.HFEngine(hf.load(path, device, half), decoding)
    learner = Learner(policy, reference, optimizer, device)
    write_policy = functools.partial(policies.save_policy, policy, tokenizer, known.dtype)
    return learner, Sampler(engine, task, config.seed), write_policy


def main(config: TrainConfig) -> None:
    device = join()
    dated = {"date": today(config.date)}  # a run that is resumed has its own
    with resume.open_run(config.model_dump() | dated, config._given) as (run, options, state):
        config = TrainConfig(**options)
        task = load_task(config)
        wanted = config.steps * config.prompts
        train, held_out = load_prompts(task, config.task, wanted, config.eval_prompts)
        if not train:
            raise InputError(f"--task {config.task}: there are no prompts to train on")
        digest = resume.check_data(run, train + held_out)
        task.try_out(train[0])  # a faulty reward is found now, and not after the model is loaded
        known = pretrained.describe(config.model, config.max_tokens, trained=True)
        train, held_out = (
            encode(
                known.tokenizer,
                examples,
                known.room,
                known.embeddings,
                config.date,
                config.enable_thinking,
            )
            for examples in (train, held_out)
        )
        tokens = resume.check_tokens(run, train + held_out)
        longest = max(len(prompt.ids) for prompt in train + held_out) + config.max_tokens
        about = {
            **config.model_dump(),
            "data_sha256": digest,
            "tokens_sha256": tokens,
            "device": str(device),
            "world_size": WORLD,
            "versions": run_directory.versions(),
        }
        tracker = open_tracker(run, about, resumed=run_directory.latest(run) is not None)
        learner, sampler, write_policy = setup(config, device, task, known, longest)
        log = RunLog(
            run, config.steps, state.step, write_policy if config.keep_policies else None, tracker
        )
        checkpoints = Checkpoints(log, learner.policy, learner.optimizer, config.save_every, state)
        log.begin(state.lengths, about)
        catch_signals()
        with checkpoints.saving_what_can_be(write_policy):
            fit(
                config,
                learner,
                sampler,
                train,
                log,
                functools.partial(evaluate, sampler, held_out, log),
                checkpoints,
            )
            write_policy(run / "checkpoint")
    resume.finish(log, len(held_out))


if __name__ == "__main__":
    run_program(main, CONFIG)
