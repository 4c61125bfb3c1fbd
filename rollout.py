"""Sampling: G responses to a prompt, from vLLM inside the training process, and their rewards.

Tokens are drawn at temperature T from the full distribution. With top_p, top_k or min_p the
log-probs below would be those of another distribution, and would bias the update.
"""

import hashlib
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from infra.prompts import Prompt
from infra.ranks import LAUNCHED, RANK, WORLD, InputError, gather
from infra.signals import check_signals, interruptible
from rewards import Channel, Task

NO_PROBABILITIES = (
    "the model gives NaN for the next token: its weights are damaged, or training "
    "has diverged: begin again with a lower --lr"
)


class Response(NamedTuple):
    tokens: list[int]  # the stop token included
    logp: list[float]  # of each token when it was sampled, at the sampling temperature
    mask: list[int]  # 1 = sampled. 0 is for tokens that an engine of yours puts in: not trained on
    finish: str  # "stop", or "length" if the response was cut off
    text: str  # what rewards see: Prompt.opened, then the tokens without the stop token


@dataclass
class Group:
    """One prompt of a step, with all that is known of it.

    A step is a list of P groups, the same on every rank.
    """

    prompt: Prompt
    channels: list[Channel]  # K of them
    responses: list[Response]  # G of them
    rewards: Tensor  # (G, K) float64, raw, NaN where one is missing
    advantages: Tensor | None = None  # (G,)

    def part(self, chosen: list[int]) -> "Group":
        """The same with some of its responses."""
        return Group(
            self.prompt,
            self.channels,
            [self.responses[i] for i in chosen],
            self.rewards[chosen],
            self.advantages[chosen],
        )


class Decoding(NamedTuple):  # how an engine samples a response, and reads it
    tokenizer: object
    stops: list[int]  # the tokens that end a response
    temperature: float
    max_tokens: int


class Engine(Protocol):
    """What samples. Replace it to sample elsewhere; local/hf.py is the shortest one."""

    dtype: torch.dtype  # of the weights that `push` takes
    decoding: Decoding

    def generate(
        self, prompts: list[list[int]], group: int, seeds: list[int]
    ) -> Iterator[tuple[int, list[Response]]]:
        """Samples `group` responses to each prompt, given as token ids.

        seeds: one a prompt; the same seed must give the same responses. Yields (index of the
        prompt, its responses) as prompts finish, in any order. Raises InputError if the model
        gives no probabilities.
        """

    def sleep(self) -> None:
        """Gives the GPU's memory up until the next `push`."""

    def push(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights, (name, tensor) each, and forgets what it cached."""


class Sampler:
    """Prompts -> groups with rewards, by an engine and the task that scores what it samples."""

    def __init__(self, engine: Engine, task: Task, seed: int):
        self.engine = engine
        self.task = task
        self.seed = seed

    def sample(
        self, prompts: list[Prompt], group: int, step: int | str
    ) -> list[tuple[list[Response], Callable]]:
        """Samples `group` responses to each prompt of this rank's part, every WORLD-th one.

        Returns for each the responses and a function that waits for their rewards (G, K). A judge
        begins with a prompt as soon as its responses are finished, and works while others are
        sampled. If the engine fails, an InputError stands in place of the function, for `score` to
        raise on all ranks. Raises signals.Stop on all ranks.
        """
        self.seed_rewards(step)
        mine = prompts[RANK::WORLD]
        places = range(RANK, len(prompts), WORLD)
        seeds = [request_seed(self.seed, step, place) for place in places]
        sampled = [None] * len(mine)

        def work() -> None:
            try:
                ids = [prompt.ids for prompt in mine]
                for i, responses in self.engine.generate(ids, group, seeds):
                    sampled[i] = self.begin_scoring(mine[i], responses)
            except InputError as error:
                sampled[:] = [([], error)] * len(mine)

        interruptible(work)
        check_signals()
        return sampled

    def seed_rewards(self, step: int | str) -> None:
        """A reward that draws at random draws the same in a run that is resumed at this step."""
        seed = request_seed(self.seed, f"rewards {step}", RANK)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def begin_scoring(
        self, prompt: Prompt, responses: list[Response]
    ) -> tuple[list[Response], Callable]:
        for response in responses:
            if math.isnan(sum(response.logp)):
                raise InputError(NO_PROBABILITIES)
        if prompt.opened:
            responses = [r._replace(text=prompt.opened + r.text) for r in responses]
        texts = [response.text for response in responses]
        return responses, self.task.start(prompt.example, texts)

    def score(
        self, prompts: list[Prompt], sampled: list[tuple[list[Response], Callable]]
    ) -> list[Group]:
        """Waits for the rewards. Returns one group per prompt, for the whole batch, on every rank.

        sampled: what `sample` returned on this rank. Raises InputError on all ranks if the engine
        or a reward failed on one of them, and signals.Stop.
        """
        scored = interruptible(
            lambda: [(responses, wait(rewards)) for responses, rewards in sampled]
        )
        check_signals()
        scored = gather(scored)
        groups = []
        for prompt, (responses, rewards) in zip(prompts, scored, strict=True):
            if isinstance(rewards, InputError):
                raise rewards
            channels = self.task.channels(prompt.example)
            groups.append(Group(prompt, channels, responses, torch.from_numpy(rewards)))
        return groups


def wait(rewards: Callable | InputError) -> np.ndarray | InputError:
    """The rewards (G, K). An error is returned: all ranks have to learn of it before one raises."""
    if isinstance(rewards, InputError):
        return rewards
    try:
        return rewards()
    except InputError as error:
        return error


def request_seed(seed: int, step: int | str, place: int) -> int:
    """Seed of one prompt's G samples, from the run's seed, the step, and the prompt's place in it.

    On a CPU the same command gives the same rollouts on any number of ranks; GPUs round differently
    in batches of another shape. It is a hash because vLLM gives sample i the seed plus i: the
    seeds of two prompts should not be neighbours.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1  # 31 bits


def make_response(
    tokens: list[int], logp: list[float], finish: str, decoding: Decoding
) -> Response:
    ended = bool(tokens) and tokens[-1] in decoding.stops
    kept = tokens[:-1] if ended else tokens
    text = decoding.tokenizer.decode(kept, skip_special_tokens=False)
    return Response(tokens, logp, [1] * len(tokens), finish, text)


class VLLMEngine:
    """vLLM in this process, one engine a rank. An `Engine`.

    It holds a copy of the policy that `push` renews or, if `fixed`, the checkpoint as it is. All
    ranks build theirs together: they agree on the size of the KV cache.
    """

    def __init__(
        self,
        path: Path,
        decoding: Decoding,
        max_len: int,
        gpu_memory: float,
        at_a_time: int = 32,
        fixed: bool = False,
    ):
        """max_len: tokens of a prompt and its response. gpu_memory: vLLM's share of a GPU.
        at_a_time: on a CPU, how many responses the KV cache has room for."""
        cuda = torch.cuda.is_available()
        prepare_import(cuda)
        from vllm import LLM

        self.decoding = decoding
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.sleeps = cuda and not fixed
        self.sampling = {
            "temperature": decoding.temperature,
            "max_tokens": decoding.max_tokens,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": decoding.stops,
            "detokenize": False,
        }
        if cuda:
            options = {
                "gpu_memory_utilization": gpu_memory,
                "enable_sleep_mode": self.sleeps,
                # Large GPUs have 1024 and 16384 by default. That takes gigabytes of the KV cache.
                "max_num_seqs": 256,
                "max_num_batched_tokens": 8192,
            }
        else:
            from local import cpu

            options = cpu.vllm_options(max_len, at_a_time)
        if LAUNCHED:  # by torchrun: this rank's device, not device 0 for all
            options["distributed_executor_backend"] = "external_launcher"
        if fixed:
            # Else it would prefer Mistral's consolidated.safetensors to the files that others take.
            options["load_format"] = "safetensors"
            options["use_tqdm_on_load"] = False
        else:
            # The first push fills the weights. The head is untied, because vLLM's CPU build does
            # not renew a tied one.
            options["load_format"] = "dummy"
            options["hf_overrides"] = {
                "tie_word_embeddings": False,
                "head_dtype": "float32",  # as in policy.LogProbs
            }
        self.llm = LLM(
            str(path),
            dtype=self.dtype,
            max_model_len=max_len,
            disable_log_stats=True,
            logprobs_mode="processed_logprobs",  # at temperature T; the default reports them at 1
            **options,
        )

    def generate(
        self, prompts: list[list[int]], group: int, seeds: list[int]
    ) -> Iterator[tuple[int, list[Response]]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(
                n=group, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY, **self.sampling
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    responses = [self.response(sample) for sample in output.outputs]
                    yield int(output.request_id), responses

    def response(self, sample) -> Response:
        logp = []
        for choices in sample.logprobs:  # {token: its log-prob}, of the sampled token alone
            (choice,) = choices.values()
            logp.append(choice.logprob)
        return make_response([*sample.token_ids], logp, sample.finish_reason, self.decoding)

    def sleep(self) -> None:
        """Weights and KV cache are stale after an update: both are given up."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def push(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        if self.sleeps:
            torch.cuda.empty_cache()  # vLLM needs back what the update had
            self.llm.wake_up(tags=["weights"])  # nothing to do when it is awake
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM kept its prefix cache: the next samples would come from the old weights"
            )


def prepare_import(cuda: bool) -> None:
    """What vLLM reads while it is imported. setdefault: whoever sets one by hand means it."""
    # The engine runs in this process, and not in a child.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all threads share one core
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # It logs before it has read its level.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # its own imports
    if not cuda:
        from local import cpu

        cpu.prepare()
