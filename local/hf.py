"""Sampling with transformers' generate, for machines without vLLM (--engine hf).

Slower than rollout.VLLMEngine, with the same interface.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from infra.ranks import InputError
from rollout import NO_PROBABILITIES, Decoding, Response, make_response


def load(path: Path, device: torch.device, dtype: torch.dtype = torch.float32):
    """A checkpoint as transformers loads it. Raises InputError if it lacks weights."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise InputError(
            f"{path} lacks weights that its config.json asks for, "
            f"{min(info['missing_keys'])} for one"
        )
    return model.to(device).eval()


def finite(_, logits: torch.Tensor) -> torch.Tensor:
    """A logits processor. Raises InputError before sampling would fail with less to say."""
    # An infinite logit would become NaN.
    if not (logits < math.inf).all():
        raise InputError(NO_PROBABILITIES)
    return logits


class HFEngine:
    """Samples from a copy of the policy, prompt by prompt."""

    def __init__(self, model, decoding: Decoding):
        """model: what `load` returns. `push` overwrites its weights."""
        self.model = model
        self.decoding = decoding
        self.dtype = model.dtype
        sampling = {}
        if decoding.temperature > 0:
            sampling = {"temperature": decoding.temperature, "top_k": 0}
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
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            ids = torch.tensor([prompt] * group)
            yield i, self._sample(ids, torch.ones_like(ids), seed)

    def _sample(self, ids: torch.Tensor, mask: torch.Tensor, seed: int) -> list[Response]:
        """A response to each row of token ids. mask: 0 where a row is padded, on its left."""
        # What a generation config leaves open, generate takes from the model's own: Qwen2.5's has
        # top_k = 20. So this one is made the model's own.
        models_own = self.model.generation_config
        self.model.generation_config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            result = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                logits_processor=[finite],
            )
        self.model.generation_config = models_own
        _, length = ids.shape
        sampled = result.sequences[:, length:]  # (rows, T)
        logp = []
        for t, scores in enumerate(result.scores):  # (rows, V), already at the temperature
            every_word = scores.float().log_softmax(-1)
            logp.append(every_word.gather(-1, sampled[:, t : t + 1]).squeeze(-1))
        pairs = zip(sampled.tolist(), torch.stack(logp, dim=-1).tolist(), strict=True)
        return [self._response(tokens, values) for tokens, values in pairs]

    def _response(self, tokens: list[int], logp: list[float]) -> Response:
        """Without what follows the first token that ends a response."""
        stops = self.decoding.stops
        for i, token in enumerate(tokens):
            if token in stops:
                return make_response(tokens[: i + 1], logp[: i + 1], "stop", self.decoding)
        return make_response(tokens, logp, "length", self.decoding)

    def sleep(self) -> None:
        """Does nothing: this engine gives no memory up."""

    @torch.no_grad()
    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """As rollout.VLLMEngine.push."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            parameters[name].copy_(tensor)
