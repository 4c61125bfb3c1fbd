"""Train a policy with RVPO, or with one of the paper's baselines.

    python train.py                                    # SmolLM2-135M on a laptop
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B --agg rvpo   # 8 GPUs

Kept from GRPO: G rollouts a prompt instead of a critic, the clipped ratio, an optional KL penalty.
On a CPU every number is the same for any number of ranks, up to rounding, unless a reward draws at
random. The loop is `fit`, a step is `step`, and its optimizer steps are `update` in update.py.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import policy as policies
import rvpo
from config import parse_beta, parse_clip
from infra import pretrained, resume, run_directory
from infra.adapters import Base, Lora
from infra.log import Log, RunLog, open_tracker
from infra.prompts import Prompt, encode, today
from infra.signals import catch_signals
from infra.state import Checkpoints, NoCheckpoints, make_moments
from infra.terminal import introduce
from rewards import Channel, described, distinct, to_unit
from rollout import Decoding, Engine, Group, Sampler, VLLMEngine
from tasks import load_prompts, load_task
from update import Learner, Loss, make_optimizer, update


def fit(
    config: TrainConfig,
    learner: Learner,
    sampler: Sampler,
    prompts: list[Prompt],
    log: Log,
    evaluate_at: Callable[[int], None],
    checkpoints: NoCheckpoints,
) -> None:
    """Trains from checkpoints.state on, until config.steps are done.

    checkpoints: a Checkpoints saves what a run resumes from; its base class saves nothing.
    evaluate_at: evaluates the policy after so many steps. Raises InputError if a reward fails, if
    losses are not finite, or if a file cannot be written. Raises signals.Stop if the run is to end.
    """
    state = checkpoints.state
    sampler.engine.push(policies.full_weights(learner.policy, sampler.engine.dtype))
    while True:
        seconds_saving = checkpoints.save_if_due()
        if is_evaluated(state.step, config):
            evaluate_at(state.step)
        if state.step == config.steps:
            return
        groups, metrics = step(config, learner, sampler, prompts, log, state.step)
        metrics["seconds"]["save"] = seconds_saving  # of the save before this step
        log.step(state.step + 1, groups, metrics)
        state.bad_steps = state.bad_steps + 1 if metrics["bad_updates"] else 0
        state.step += 1


def step(
    config: TrainConfig,
    learner: Learner,
    sampler: Sampler,
    prompts: list[Prompt],
    log: Log,
    steps_done: int,
) -> tuple[list[Group], dict]:
    """Samples one batch and trains on it. Returns its groups and what is logged of the step."""
    engine = sampler.engine
    watch = Stopwatch(learner.device)

    # 1. Sample G responses to each of P prompts. A judge begins while others are sampled.
    batch = prompts_of_step(prompts, steps_done, config)
    sampled = sampler.sample(batch, config.group, steps_done)
    watch.lap("sample")

    # 2. Score them. From here on every rank has all P groups. `report` adds up what judges did,
    # over all ranks; `check` ends a run whose judge failed, once all is written down.
    groups = sampler.score(batch, sampled)
    judged = sampler.task.report([group.rewards.numpy() for group in groups])
    watch.lap("score")

    # 3. Compute the advantages of the whole batch.
    beta = rvpo.beta_at(parse_beta(config.beta), steps_done, config.steps)
    set_advantages(groups, config.agg, beta)
    watch.lap("advantage")

    # 4. Write everything down, before anything can go wrong with it.
    log.groups(steps_done + 1, groups)
    sampler.task.check(judged)
    watch.lap("write")

    # 5. Update the policy. The engine gives its memory up for that.
    engine.sleep()
    lr = learning_rate(config, steps_done)
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = lr
    metrics = update(
        learner,
        groups,
        config.updates,
        config.kl,
        config.temperature,
        config.tokens_per_microbatch,
    )
    watch.lap("update")

    # 6. Hand the new weights to the engine.
    engine.push(policies.full_weights(learner.policy, engine.dtype))
    watch.lap("sync")

    metrics |= {"beta": beta, "lr": lr, "seconds": watch.seconds}
    if judged:
        metrics["judge"] = judged
    return groups, metrics


def is_evaluated(step: int, config: TrainConfig) -> bool:
    """Is the policy evaluated after so many steps? At first and at last it always is."""
    if step in (0, config.steps):
        return True
    return config.eval_every > 0 and step % config.eval_every == 0


def prompts_of_step(prompts: list[Prompt], step: int, config: TrainConfig) -> list[Prompt]:
    """The next P prompts of an endless stream of shuffled epochs."""
    first = step * config.prompts
    positions = range(first, first + config.prompts)
    return [prompts[prompt_at(position, len(prompts), config.seed)] for position in positions]


def prompt_at(position: int, n: int, seed: int) -> int:
    """Index of the prompt at a position of the stream of n prompts."""
    return int(shuffled(n, seed, position // n)[position % n])


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def set_advantages(groups: list[Group], agg: str, beta: float) -> None:
    """Sets the advantages (G,) of each of P groups, from the rewards of all."""
    P = len(groups)
    G = len(groups[0].responses)
    K = max(len(group.channels) for group in groups)
    # A prompt that has fewer channels is padded with missing rewards.
    rewards = torch.full((P, G, K), math.nan, dtype=torch.float64)  # (P, G, K) raw
    weights = torch.zeros(P, K, dtype=torch.float64)  # (P, K)
    for p, group in enumerate(groups):
        k = len(group.channels)
        rewards[p, :, :k] = group.rewards
        if agg == "softmin":  # it takes absolute rewards: 0 at a channel's worst, 1 at its best
            rewards[p, :, :k] = to_unit(group.channels, group.rewards)
        weights[p, :k] = torch.tensor([channel.weight for channel in group.channels])
    advantages = rvpo.advantages(rewards, agg, beta, weights)  # (P, G)
    for p, group in enumerate(groups):
        group.advantages = advantages[p]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step: warm-up and, if asked for, a linear fall to 0 at the end of the run."""
    warmed_up = (step + 1) / (config.warmup + 1)
    left = 1.0
    if config.lr_schedule == "linear":
        left = 1 - step / config.steps
    return config.lr * min(left, warmed_up)


class Stopwatch:
    """Seconds of a step's phases. A phase ends when its work on the GPU is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.began = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        ended = self.now()
        self.seconds[phase] = ended - self.began
        self.began = ended


def evaluate(sampler: Sampler, held_out: list[Prompt], log: Log, step: int) -> None:
    """One sample for each held-out prompt, with the same request seeds each time."""
    task = sampler.task
    groups = sampler.score(held_out, sampler.sample(held_out, 1, "eval"))
    judged = task.report([group.rewards.numpy() for group in groups]) if groups else {}
    scores = []
    full = {}  # of each channel, the value that satisfies it
    for group in groups:
        (response,) = group.responses
        (rewards,) = group.rewards.numpy()
        by_name, _ = task.result(group.prompt.example, response.text, rewards)
        scores.append(by_name)
        full |= {channel.name: channel.full for channel in group.channels}
    log.evaluation(step, scores, judged, full)
    if groups:
        task.check(judged)


def main(config: TrainConfig) -> None:
    """The program: everything that can be wrong is found before weights are loaded."""
    config.say_engine()
    device = join()
    dated = {"date": today(config.date)}  # a resumed run keeps the day on which it began
    with resume.open_run(config.model_dump() | dated, config._given) as (run, options, state):
        config = TrainConfig(**options)
        task = load_task(config)
        n_train = config.steps * config.prompts
        train, held_out = load_prompts(task, config.task, n_train, config.eval_prompts)
        if not train:
            raise InputError(f"--task {config.task}: there are no prompts to train on")
        data_sha256 = resume.check_data(run, train + held_out)
        channels = distinct(task, train + held_out)
        introduce(config, channels)
        trains = not config.plan  # a plan asks no judge, and needs no weights
        if trains:
            task.try_out(train[0])  # a faulty reward is found before the model is loaded

        known = pretrained.describe(config.model, config.max_tokens, True, with_weights=trains)
        tokenize = functools.partial(
            encode,
            known.tokenizer,
            limit=known.room,
            embeddings=known.embeddings,
            date=config.date,
            thinking=config.enable_thinking,
        )
        train = tokenize(train)
        held_out = tokenize(held_out)
        if config.plan:
            from tools import plan

            plan.show(config, task, known, train, held_out)
            sys.exit()  # the run's directory, which is empty, is removed
        tokens_sha256 = resume.check_tokens(run, train + held_out)
        about = {
            **about_run(config, channels, device),
            "data_sha256": data_sha256,
            "tokens_sha256": tokens_sha256,
        }
        tracker = open_tracker(run, about, resumed=run_directory.latest(run) is not None)

        longest = max(len(prompt.ids) for prompt in train + held_out) + config.max_tokens
        learner, engine = load(config, device, known, longest)
        sampler = Sampler(engine, task, config.seed)
        write_policy = functools.partial(
            policies.save_policy, learner.policy, known.tokenizer, known.dtype
        )
        kept = write_policy if config.keep_policies else None
        evaluated = [step for step in range(config.steps + 1) if is_evaluated(step, config)]
        log = RunLog(run, config.steps, state.step, kept, tracker, evaluated)
        checkpoints = Checkpoints(log, learner.policy, learner.optimizer, config.save_every, state)
        log.begin(state.lengths, about)
        evaluate_at = functools.partial(evaluate, sampler, held_out, log)
        catch_signals()
        with checkpoints.saving_what_can_be(write_policy):
            fit(config, learner, sampler, train, log, evaluate_at, checkpoints)
            write_policy(run / "checkpoint")
    resume.finish(log, len(held_out), config.temperature)


def about_run(config: TrainConfig, channels: list[Channel], device: torch.device) -> dict:
    """What config.json says, beside the hashes of data and tokens."""
    return {
        **config.model_dump(),
        "channels": described(channels),
        "device": str(device),
        "world_size": WORLD,
        "versions": run_directory.versions(),
    }


def base_name(model: str, path: Path) -> str:
    """What an adapter's file names as its model: a hub id, or the directory that was loaded."""
    is_hub_id = model != "smollm2" and not Path(model).expanduser().is_dir()
    return model if is_hub_id else str(path.resolve())


def load(
    config: TrainConfig, device: torch.device, known: pretrained.Pretrained, longest: int
) -> tuple[Learner, Engine]:
    """Model, optimizer and engine. Raises InputError.

    longest: tokens of the longest prompt with its response.
    """
    decoding = Decoding(known.tokenizer, known.stops, config.temperature, config.max_tokens)
    mesh = policies.make_mesh(device)
    dtype = policies.compute_dtype(device)  # bfloat16 on a GPU
    pretrained.announce(config.model)
    with pretrained.readable(config.model):
        if config.lora:
            alpha = config.lora_alpha or 2 * config.lora
            lora = Lora(config.lora, alpha, config.seed, base_name(config.model, known.path))
            policy = policies.load(known.path, device, mesh, dtype, lora=lora)
        else:
            policy = policies.load(known.path, device, mesh)
        reference = None
        if config.kl and config.lora:
            reference = Base(policy)
        elif config.kl:
            reference = policies.load(known.path, device, mesh, dtype, trained=False)
        optimizer = make_optimizer(policy, config.lr)
        # Made later, they would take blocks of memory that vLLM needs.
        make_moments(optimizer)
        policy.recompute(config.gradient_checkpointing, config.tokens_per_microbatch)
        policy.use_kernels(config.kernels, config.flash_attention_3)
        if config.engine == "vllm":
            at_a_time = min(32, max(config.prompts * config.group, config.eval_prompts))
            engine = VLLMEngine(known.path, decoding, longest, config.gpu_memory, at_a_time)
        else:
            from local import hf

            engine = hf.HFEngine(hf.load(known.path, device, dtype), decoding)
    loss = Loss(parse_clip(config.clip), config.mask_truncated, config.correction)
    return Learner(policy, reference, optimizer, device, loss), engine


if __name__ == "__main__":
    run_program(main, CONFIG)
