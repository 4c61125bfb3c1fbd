"""G samples a prompt, from vLLM inside the training process or from transformers' generate.

An engine has `generate` and `push`. Both engines sample at temperature T from the full distribution: top_p, top_k and
min_p would make the log-probs below those of another distribution, and bias the update.
"""

import hashlib
import importlib.util
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.rendezvous import rendezvous
from transformers import AutoConfig

import stop
from rewards import InputError

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Response(NamedTuple):
    tokens: list[int]  # the stop token included
    logp: list[float]  # of each token when it was sampled, at the sampling temperature
    mask: list[int]  # 1 = sampled, 0 = put there by an environment (not trained on)
    finish: str  # "stop", or "length" if the response was cut off
    text: str  # without the stop token; other special tokens stay visible to the rewards


def request_seed(seed: int, step: int | str, slot: int) -> int:
    """Seed of one prompt's G samples, from (run seed, step, the prompt's place in the step): the same command gives the
    same rollouts on any number of ranks. vLLM adds the sample's number, hence the hash: neighbours hardly meet."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{slot}".encode()).digest()[:4]) >> 1


def check_engine(name: str | None) -> str:
    """--engine or its default: vLLM wherever it is installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise InputError("--engine vllm: vLLM is not installed; pip install -r requirements.txt, or use --engine hf")
    return name or ("vllm" if installed else "hf")


def join_ranks() -> torch.device:
    """This rank's device, once all ranks have met. Whoever calls it first makes them meet."""
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if WORLD > 1:
        store, _, _ = next(rendezvous("env://"))
        if WORLD == LOCAL_WORLD:  # torchrun hands the store of ranks that are gone to those it starts in their place
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
    elif device.type == "cuda":  # a group of one, so that one GPU takes the path of many
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # At exit, after vLLM: it cleans up in a finalizer of its own, which still needs the group. The newest come first.
    weakref.finalize(join_ranks, lambda: dist.is_initialized() and dist.destroy_process_group())
    return device


def gather(local: list) -> list:
    """Every rank's items of a list that was dealt out in turn, in the order of that list. Some ranks may have none."""
    if WORLD == 1:
        return local
    lists = [None] * WORLD
    dist.all_gather_object(lists, local)
    return [items[i] for i in range(max(map(len, lists))) for items in lists if i < len(items)]


def on_rank_0(work: Callable) -> None:
    """work() there. All ranks wait for it, and raise OSError if it could not write."""
    failed = None
    if RANK == 0:
        try:
            work()
        except (OSError, SafetensorError) as error:
            failed = str(error)
    failed = gather([failed])[0]
    if failed is not None:
        raise OSError(failed)


def sample(engine, start: Callable, batch: list[tuple], group: int, seed: int, step: int | str) -> list[tuple]:
    """`group` responses to each prompt of this engine's share of the batch. batch: (token ids, Example) a prompt.

    start: (Example, texts) -> a function that returns their rewards. It is called as soon as a prompt is finished, so
    that a judge is at work while other prompts are being sampled. Returns (responses, that function) a prompt; of the
    ranks that share an engine only the first has any. Raises stop.Stop on all ranks.
    """
    share, leads = slice(RANK // engine.tp, None, WORLD // engine.tp), RANK % engine.tp == 0
    mine, seeds = batch[share], [request_seed(seed, step, slot) for slot in range(len(batch))[share]]
    out = [None] * len(mine)

    def work() -> None:
        for i, responses in engine.generate([ids for ids, _ in mine], group, seeds):
            if leads:
                out[i] = responses, start(mine[i][1], [response.text for response in responses])

    stop.interruptible(work, at_once=engine.tp == 1)  # ranks that share an engine take each of its steps together
    stop.check()
    return out if leads else []


def _response(tokens: list[int], logp: list[float], finish: str, stops: list[int], tokenizer) -> Response:
    kept = tokens[:-1] if tokens and tokens[-1] in stops else tokens
    return Response(tokens, logp, [1] * len(tokens), finish, tokenizer.decode(kept, skip_special_tokens=False))


def kv_elements(config) -> int:
    """Numbers that the KV cache holds for one token, over all layers. config: a transformers config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim


class VLLMEngine:
    """vLLM in this process, holding a copy of the policy that `push` renews, or the checkpoint as it is (fixed): one
    engine a rank, or each over `tp` neighbouring ranks, which then run the same requests in step. All ranks build
    theirs together: the size of the KV cache is agreed on between them."""

    def __init__(self, path: Path, tokenizer, stops: list[int], max_len: int, temperature: float, max_tokens: int,
                 seed: int, gpu_memory: float, tp: int = 1, fixed: bool = False, at_a_time: int = 32):
        """max_len: prompt and response. gpu_memory: vLLM's share of a GPU. at_a_time: on a CPU, the number of responses
        that the KV cache has room for."""
        cuda = torch.cuda.is_available()
        # Read when vLLM is imported. setdefault: whoever sets one by hand means it.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, not in a child
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all threads share one core
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # about its own imports
        from vllm import LLM

        self.tokenizer, self.stops, self.tp = tokenizer, stops, tp
        self.sampling = {"temperature": temperature, "max_tokens": max_tokens, "stop_token_ids": stops, "logprobs": 0,
                         "detokenize": False}
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.sleeps = cuda and not fixed
        # One sequence more, for blocks are not full. A CPU's KV cache is touched as a whole at the start.
        kv_cache = 4 * kv_elements(AutoConfig.from_pretrained(path)) * (at_a_time + 1) * (max_len + 32)
        options = {"gpu_memory_utilization": gpu_memory, "enable_sleep_mode": self.sleeps} if cuda else {
            "kv_cache_memory_bytes": kv_cache,
            # A seeded request whose prompt is cut into chunks crashes on a CPU ("CPU Generator does not use offset").
            "enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_len),
            "block_size": 32,  # the default of 128 leaves up to 127 prompt tokens to be computed again by each sample
            "enforce_eager": True,  # compiling takes longer than a short run gains from it
        }
        if "RANK" in os.environ:  # under torchrun: this rank's device, not device 0 for all
            options["distributed_executor_backend"] = "external_launcher"
        if not fixed:
            # The first push fills the weights. Untied, so that it fills the output head, too: a reload would leave a
            # head that is tied to the embeddings stale on a CPU.
            options |= {"load_format": "dummy", "hf_overrides": {"tie_word_embeddings": False}}
        self.llm = LLM(
            str(path), dtype=self.dtype, max_model_len=max_len, seed=seed, disable_log_stats=True,
            tensor_parallel_size=tp,
            logprobs_mode="processed_logprobs",  # at temperature T; the default reports them at 1
            **options,
        )

    def generate(self, prompts: list[list[int]], group: int, seeds: list[int]) -> Iterator[tuple[int, list[Response]]]:
        """Token ids of prompts -> (index of a prompt, its `group` responses), in the order in which they finish. A
        prompt is computed once for its group."""
        from vllm import SamplingParams
        from vllm.distributed import get_tp_group
        from vllm.sampling_params import RequestOutputKind

        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(n=group, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY, **self.sampling)
            self.llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while self.llm.llm_engine.has_unfinished_requests():
            if self.tp > 1:
                stop.check(get_tp_group().cpu_group)
            for output in self.llm.llm_engine.step():
                if output.finished:
                    yield int(output.request_id), [
                        _response(list(sample.token_ids), [next(iter(at.values())).logprob for at in sample.logprobs],
                                  sample.finish_reason, self.stops, self.tokenizer) for sample in output.outputs]

    def sleep(self) -> None:
        """Gives a GPU's memory up until the next `push`: weights and KV cache, which both are stale by then."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take the policy's weights over, (name, tensor) by (name, tensor), and drop what was cached under the old
        ones."""
        if self.sleeps:
            torch.cuda.empty_cache()  # vLLM needs back what the update had
            self.llm.wake_up(tags=["weights"])  # nothing to do when it is awake
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: the next samples would come from the old weights")


class HFEngine:
    """transformers' generate, prompt by prompt, on a copy of the policy. Slower; needs no vLLM."""

    tp = 1

    def __init__(self, model, tokenizer, stops: list[int], temperature: float, max_tokens: int):
        """model: the checkpoint as transformers loads it."""
        from transformers import GenerationConfig

        self.model, self.tokenizer, self.stops, self.dtype = model, tokenizer, stops, model.dtype
        self.config = GenerationConfig(
            do_sample=temperature > 0, max_new_tokens=max_tokens, eos_token_id=stops, pad_token_id=stops[0],
            return_dict_in_generate=True, output_scores=True,
            **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}))

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], group: int, seeds: list[int]) -> Iterator[tuple[int, list[Response]]]:
        """As VLLMEngine.generate."""
        device = self.model.device
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            ids = torch.tensor([prompt] * group, device=device)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                # generate fills up what a config leaves open from the checkpoint's own: Qwen2.5's has top_k = 20
                own, self.model.generation_config = self.model.generation_config, self.config
                result = self.model.generate(ids, attention_mask=torch.ones_like(ids))
                self.model.generation_config = own
            sampled = result.sequences[:, len(prompt):]
            # scores: T tensors (G, V), already at the temperature
            logp = torch.stack([s.float().log_softmax(-1).gather(-1, sampled[:, t:t + 1]).squeeze(-1)
                                for t, s in enumerate(result.scores)], dim=-1).tolist()
            responses = []
            for tokens, values in zip(sampled.tolist(), logp, strict=True):
                end = next((i + 1 for i, token in enumerate(tokens) if token in self.stops), len(tokens))
                finish = "stop" if tokens[end - 1] in self.stops else "length"
                responses.append(_response(tokens[:end], values[:end], finish, self.stops, self.tokenizer))
            yield i, responses

    def sleep(self) -> None:
        """Nothing to give up."""

    @torch.no_grad()
    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """As VLLMEngine.push."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            own[name].copy_(tensor)
