"""Sampling with transformers' generate, for machines without vLLM (--engine hf). Slower; the same interface."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from infra.ranks import InputError
from rollout import NO_PROBABILITIES, Decoding, Response, make_response


def load(path: Path, device: torch.device, dtype: torch.dtype = torch.float32):
    """As transformers has it, for sampling with its `generate`."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise InputError(
            f"{path} lacks weights that its config.json asks for, {min(info['missing_keys'])} for one"
        )
    return model.to(device).eval()


def finite(_, logits: torch.Tensor) -> torch.Tensor:
    """Before they are sampled from, which would fail with less to say. Infinity becomes NaN."""
    if not (logits < math.inf).all():
        raise InputError(NO_PROBABILITIES)
    return logits


class HFEngine:
    """On a copy of the policy, prompt by prompt."""

    def __init__(self, model, decoding: Decoding):
        """model: the checkpoint as transformers loads it."""
        self.model, self.decoding, self.dtype = model, decoding, model.dtype
        sampling = (
            {"temperature": decoding.temperature, "top_k": 0} if decoding.temperature > 0 else {}
        )
        self.config = GenerationConfig(
            do_sample=decoding.temperature > 0,
            max_new_tokens=decoding.max_tokens,
            eos_token_id=decoding.stops,
            pad_token_id=decoding.stops[0],
            return_dict_in_generate=True,
            output_scores=True,
            **sampling,
        )

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], group: int, seeds: list[int]
    ) -> Iterator[tuple[int, list[Response]]]:
        """As rollout.VLLMEngine.generate."""
        device, stops = self.model.device, self.decoding.stops
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            ids = torch.tensor([prompt] * group, device=device)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                # generate fills up what a config leaves open from the checkpoint's own: Qwen2.5's has top_k = 20
                checkpoints, self.model.generation_config = (
                    self.model.generation_config,
                    self.config,
                )
                result = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), logits_processor=[finite]
                )
                self.model.generation_config = checkpoints
            sampled = result.sequences[:, len(prompt) :]
            # scores: T tensors (G, V), already at the temperature
            logp = torch.stack(
                [
                    s.float().log_softmax(-1).gather(-1, sampled[:, t : t + 1]).squeeze(-1)
                    for t, s in enumerate(result.scores)
                ],
                dim=-1,
            ).tolist()
            responses = []
            for tokens, values in zip(sampled.tolist(), logp, strict=True):
                end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
                finish = "stop" if tokens[end - 1] in stops else "length"
                responses.append(make_response(tokens[:end], values[:end], finish, self.decoding))
            yield i, responses

    def sleep(self) -> None:
        """Nothing to give up."""

    @torch.no_grad()
    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """As rollout.VLLMEngine.push."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            parameters[name].copy_(tensor)
