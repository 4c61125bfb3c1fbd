"""G samples a prompt, from vLLM inside the training process, and their rewards.

Sampling is at temperature T from the full distribution: top_p, top_k and min_p would make the log-probs below those of
another distribution, and bias the update.
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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infra.prompts import Prompt
from infra.ranks import LAUNCHED, RANK, WORLD, InputError, gather
from infra.signals import check_signals, interruptible
from rewards import Channel, Task


class Response(NamedTuple):
    tokens: list[int]  # the stop token included
    logp: list[float]  # of each token when it was sampled, at the sampling temperature
    mask: list[int]  # 1 = sampled, 0 = put there by an environment (not trained on)
    finish: str  # "stop", or "length" if the response was cut off
    text: str  # Prompt.opened, then all tokens but the stop token: rewards see other special tokens


@dataclass
class Group:
    """One prompt of a step with all that is known of it. A step is a list of P groups, the same on every rank."""

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


NO_PROBABILITIES = (
    "the model gives NaN for the next token: its weights are damaged, or training "
    "has diverged: begin again with a lower --lr"
)


class Decoding(NamedTuple):  # how an engine samples a response, and reads it
    tokenizer: object
    stops: list[int]  # the tokens that end a response
    temperature: float
    max_tokens: int


def make_response(
    tokens: list[int], logp: list[float], finish: str, decoding: Decoding
) -> Response:
    kept = tokens[:-1] if tokens and tokens[-1] in decoding.stops else tokens
    return Response(
        tokens,
        logp,
        [1] * len(tokens),
        finish,
        decoding.tokenizer.decode(kept, skip_special_tokens=False),
    )


def request_seed(seed: int, step: int | str, slot: int) -> int:
    """Seed of one prompt's G samples, from (run seed, step, the prompt's place in the step): on a CPU the same command
    gives the same rollouts on any number of ranks (GPUs round differently in batches of another shape). vLLM adds the
    sample's number, hence the hash: neighbours hardly meet."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{slot}".encode()).digest()[:4]) >> 1


class Sampler:
    """Prompts -> groups with rewards, by an engine and the task that scores what it samples."""

    def __init__(self, engine, task: Task, seed: int):
        self.engine, self.task, self.seed = engine, task, seed

    def sample(
        self, prompts: list[Prompt], group: int, step: int | str
    ) -> list[tuple[list[Response], Callable]]:
        """`group` responses to each prompt of this rank's share, and a function that returns their rewards (G, K).
        A judge begins with a prompt as soon as it is finished, and is at work while others are being sampled.
        If the engine fails, an InputError in the function's place, for `score` to raise on all ranks.
        Raises checkpoint.Stop on all ranks."""
        for generator in (
            random.seed,
            np.random.seed,
            torch.manual_seed,
        ):  # a reward may draw at random: the same
            generator(
                request_seed(self.seed, f"rewards {step}", RANK)
            )  # in a run that was resumed at this step
        mine = prompts[RANK::WORLD]
        seeds = [request_seed(self.seed, step, slot) for slot in range(RANK, len(prompts), WORLD)]
        out = [None] * len(mine)

        def work() -> None:
            try:
                ids = [prompt.ids for prompt in mine]
                for i, responses in self.engine.generate(ids, group, seeds):
                    if math.isnan(sum(logp for response in responses for logp in response.logp)):
                        raise InputError(NO_PROBABILITIES)
                    if opened := mine[i].opened:
                        responses = [r._replace(text=opened + r.text) for r in responses]
                    texts = [response.text for response in responses]
                    out[i] = responses, self.task.start(mine[i].example, texts)
            except InputError as error:
                out[:] = [([], error)] * len(mine)

        interruptible(work)
        check_signals()
        return out

    def score(
        self, prompts: list[Prompt], sampled: list[tuple[list[Response], Callable]]
    ) -> list[Group]:
        """A group a prompt, of the whole batch, the same on every rank. sampled: what `sample` returned of it here.
        Raises InputError on all ranks if engine or reward fails on one, and checkpoint.Stop."""

        def outcome(rewards: Callable | InputError) -> np.ndarray | InputError:
            try:
                return rewards if isinstance(rewards, InputError) else rewards()
            except InputError as error:
                return error

        scored = interruptible(
            lambda: [(responses, outcome(rewards)) for responses, rewards in sampled]
        )
        check_signals()
        scored = gather(scored)
        for error in (rewards for _, rewards in scored if isinstance(rewards, InputError)):
            raise error
        return [
            Group(prompt, self.task.channels(prompt.example), responses, torch.from_numpy(rewards))
            for prompt, (responses, rewards) in zip(prompts, scored, strict=True)
        ]


class VLLMEngine:
    """vLLM in this process, one engine a rank, with a copy of the policy that `push` renews, or the checkpoint as it is
    (fixed). All ranks build theirs together: they agree on the size of the KV cache."""

    def __init__(
        self,
        path: Path,
        decoding: Decoding,
        max_len: int,
        gpu_memory: float,
        at_a_time: int = 32,
        fixed: bool = False,
    ):
        """max_len: prompt and response. gpu_memory: vLLM's share of a GPU. at_a_time: on a CPU, the number of responses
        that the KV cache has room for."""
        cuda = torch.cuda.is_available()
        # Read when vLLM is imported. setdefault: whoever sets one by hand means it.
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # the engine in this process, not in a child
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # It logs before it has read that.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
        os.environ.setdefault(
            "VLLM_CPU_OMP_THREADS_BIND", "nobind"
        )  # else all threads share one core
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module="vllm"
        )  # about its own imports
        if not cuda:
            from local import cpu

            cpu.prepare()
        from vllm import LLM

        self.decoding = decoding
        self.sampling = {
            "temperature": decoding.temperature,
            "max_tokens": decoding.max_tokens,
            "logprobs": 0,
            "stop_token_ids": decoding.stops,
            "detokenize": False,
        }
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.sleeps = cuda and not fixed
        if cuda:  # by default large GPUs have 1024 and 16384 here, which takes gigabytes of a 14B model's KV cache
            options = {
                "gpu_memory_utilization": gpu_memory,
                "enable_sleep_mode": self.sleeps,
                "max_num_seqs": 256,
                "max_num_batched_tokens": 8192,
            }
        else:
            options = cpu.vllm_options(max_len, at_a_time)
        if LAUNCHED:  # by torchrun: this rank's device, not device 0 for all
            options["distributed_executor_backend"] = "external_launcher"
        if fixed:
            # Else it would prefer Mistral's consolidated.safetensors to the files that others take.
            options |= {"load_format": "safetensors", "use_tqdm_on_load": False}
        else:
            # The first push fills the weights, a tied head too, which a reload would leave stale on a CPU.
            options |= {
                "load_format": "dummy",
                "hf_overrides": {"tie_word_embeddings": False, "head_dtype": "float32"},
            }  # as in LogProbs
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
        """Token ids of prompts -> (index of a prompt, its `group` responses), in the order in which they finish."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(
                n=group, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY, **self.sampling
            )
            self.llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                if output.finished:
                    yield (
                        int(output.request_id),
                        [
                            make_response(
                                [*sample.token_ids],
                                [next(iter(at.values())).logprob for at in sample.logprobs],
                                sample.finish_reason,
                                self.decoding,
                            )
                            for sample in output.outputs
                        ],
                    )

    def sleep(self) -> None:
        """Gives a GPU's memory up until the next `push`: weights and KV cache, which both are stale by then."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def push(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take the policy's weights over, (name, tensor) each, and drop what was cached under the old ones."""
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
