"""The study's small world: a language of 37 words, tasks on it, and a policy of 77,000 parameters.

Only what is small is here. The loop, the update, the advantages and the loss are train.py's and
rvpo.py's. A prompt names a tool and three arguments with their values:

    tool3 name5 7 name2 0 name9 4

The answer is a call with them, "call tool3 name5 7 name2 0 name9 4 end". Words of politeness,
detail and citation, which some tasks reward, can be added to it.
"""

import copy
import functools
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config

import policy as policies
from infra.prompts import Prompt
from local.hf import HFEngine
from rewards import Channel, Example
from rollout import Response

EXTRAS = "please", "detail", "cite"
WORDS = [
    "<stop>",
    "<prompt>",
    "<answer>",
    "call",
    "end",
    *EXTRAS,
    "forbidden",
    *(f"tool{i}" for i in range(8)),
    *(f"name{i}" for i in range(10)),
    *(str(i) for i in range(10)),
]
ID = {word: i for i, word in enumerate(WORDS)}
LONGEST = 20  # words of an answer
CPU = torch.device("cpu")


def make_prompts(n: int, seed: str) -> list[Prompt]:
    """n prompts. The reference is the shortest right answer."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(n):
        arguments = " ".join(f"name{name} {rng.randrange(10)}" for name in rng.sample(range(10), 3))
        prompt = f"tool{rng.randrange(8)} {arguments}"
        ids = [ID["<prompt>"], *(ID[word] for word in prompt.split()), ID["<answer>"]]
        messages = [{"role": "user", "content": prompt}]
        prompts.append(Prompt(ids, Example(messages, f"call {prompt} end")))
    return prompts


def demonstration(rng: random.Random, prompt: str, faults: dict[str, float]) -> list[int]:
    """A noisy answer to imitate before the training proper. faults: the probability of each."""

    def happens(fault: str) -> bool:
        return rng.random() < faults.get(fault, 0.0)

    tool, *arguments = prompt.split()
    words = ["call", f"tool{rng.randrange(8)}" if happens("tool") else tool]
    for extra in EXTRAS:
        words += [extra for _ in range(3) if happens("extra")]
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        if happens("left out"):
            continue
        words.append(f"name{rng.randrange(10)}" if happens("name") else name)
        if not happens("no value"):
            words.append(str(rng.randrange(10)) if happens("value") else value)
    if happens("forbidden"):
        words.append("forbidden")
    if not happens("no end"):
        words.append("end")
    return [ID[word] for word in words[: LONGEST - 1]] + [ID["<stop>"]]


@functools.lru_cache(4096)
def channels(prompt: str, response: str) -> dict[str, float]:
    """Every channel that a task may have, each in [0, 1]."""
    words = response.split()
    tool, *arguments = prompt.split()
    wanted = dict(zip(arguments[::2], arguments[1::2], strict=True))
    follows = {}  # the word after the first occurrence of each
    for word, following in itertools.pairwise([*words, ""]):
        follows.setdefault(word, following)
    tools = sum(word.startswith("tool") for word in words)
    names = sum(word.startswith("name") for word in words)
    values = sum(word.isdigit() for word in words)
    present = sum(name in follows for name in wanted)
    right = sum(follows.get(name) == value for name, value in wanted.items())
    once = words.count("call") == words.count("end") == 1
    return {
        "format": float(
            once and words[0] == "call" and words[-1] == "end" and len(words) < LONGEST
        ),
        "tool": float(tools == 1 and words[1:2] == [tool]),
        "names": present / 3,
        "values": right / 3,
        "safe": float("forbidden" not in words),
        **{f"length{most}": float(len(words) <= most) for most in (10, 12, 14)},
        **{extra: min(3, words.count(extra)) / 3 for extra in EXTRAS},
        **{f"{extra} {n}": float(words.count(extra) >= n) for extra in EXTRAS for n in (1, 2, 3)},
        "no other names": max(0.0, 1 - (names - present) / 3),
        "no other values": max(0.0, 1 - (values - right) / 3),
        "brief": max(0.0, 1 - len(words) / 14),
    }


def reward(name: str, full: float = 1.0, scale: float = 1.0, wrong: float = 0.0) -> Channel:
    """A channel, multiplied by `scale`; in a share `wrong` of its values, at random, 1 - value."""
    rng = random.Random(0)

    def fn(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
        noise = wrong if len(responses) > 1 else 0.0  # an evaluation has one response a prompt
        values = []
        for prompt, response in zip(prompts, responses, strict=True):
            value = channels(prompt, response)[name]
            values.append(scale * (1 - value if rng.random() < noise else value))
        return values

    return Channel(name, fn, full * scale, (0.0, scale))


CALL = "format", "tool", "names", "values", "safe"
ONE = 1 / 3 - 1e-6  # an extra is satisfied when it is there once; its reward goes on to three
VERBOSE = reward("length14"), *(reward(extra, ONE) for extra in EXTRAS)
# How demonstrations go wrong: what is hard at the start.
FAULTS = {
    "verbose": {
        "value": 0.1,
        "left out": 0.07,
        "tool": 0.1,
        "name": 0.05,
        "extra": 0.33,
        "forbidden": 0.1,
        "no end": 0.05,
        "no value": 0.03,
    },
    "plain": {
        "value": 0.6,
        "left out": 0.15,
        "tool": 0.2,
        "name": 0.15,
        "extra": 0.05,
        "forbidden": 0.1,
        "no end": 0.1,
        "no value": 0.1,
    },
}
# {task: (channels, demonstrations)}
SUITE: dict[str, tuple[list[Channel], str]] = {
    # Three extras, each paid up to three times, pull against a length limit that is kept at first.
    "conflict": ([*map(reward, CALL), *VERBOSE], "verbose"),
    # Everything can be had together; right values are rare at the start.
    "no conflict": ([*map(reward, CALL), reward("length10")], "plain"),
    # Leaving arguments out satisfies three of the channels.
    "precision": (
        [
            *map(reward, CALL),
            reward("no other names"),
            reward("no other values"),
            reward("brief", 0.2),
        ],
        "plain",
    ),
    # The conflict with fewer channels, and with more: each extra once, twice and three times.
    # Once is enough.
    "K = 2": ([*VERBOSE[:2]], "verbose"),
    "K = 4": ([*VERBOSE], "verbose"),
    "K = 17": (
        [
            *map(reward, (*CALL, "length14", "no other names", "no other values")),
            *(reward(f"{extra} {n}", float(n == 1)) for extra in EXTRAS for n in (1, 2, 3)),
        ],
        "verbose",
    ),
}


def random_task(seed: str) -> tuple[list[Channel], str]:
    """2 to 9 channels of which an answer can satisfy all, and demonstrations."""
    rng = random.Random(seed)
    prompt = "tool0 name0 0 name1 1 name2 2"
    lengths = [reward(f"length{n}") for n in (10, 12, 14)]
    others = [reward("no other names"), reward("no other values"), reward("brief", 0.2)]
    pool = [*map(reward, CALL), *lengths, *VERBOSE[1:], *others]
    while True:
        chosen = rng.sample(pool, rng.randint(2, 9))
        extras = [channel.name for channel in chosen if channel.name in EXTRAS]
        best = channels(prompt, " ".join(["call", prompt, *extras, "end"]))
        if all(best[channel.name] >= channel.full for channel in chosen):
            return chosen, rng.choice([*FAULTS])


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling: float,
    sequences: policies.Sequences,
    **kwargs,
):
    """policy._prompt_once for hundreds of short sequences: one padded call is faster."""
    lengths = sequences.query_ends.diff().long()  # (sequences,)
    seen = sequences.key_ends.diff().long()  # (sequences,)
    rows, columns = torch.arange(sequences.max_queries), torch.arange(sequences.max_keys)
    # Where queries and keys are in the packed row: (sequences, longest), padded with the last one.
    queries = (lengths.cumsum(0) - lengths)[:, None] + rows.clamp(max=lengths[:, None] - 1)
    keys = (seen.cumsum(0) - seen)[:, None] + columns.clamp(max=seen[:, None] - 1)
    keys = sequences.keys_at[keys]
    query = query[0][:, queries]  # (heads, sequences, longest, D)
    copies = len(query) // key.shape[1]  # query heads that share a key
    key = key[0][:, keys].repeat_interleave(copies, 0)
    value = value[0][:, keys].repeat_interleave(copies, 0)
    # Causal, aligned at the end of each sequence.
    mask = columns <= rows[:, None] + (seen - lengths)[:, None, None]
    out = scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out[:, rows < lengths[:, None]].transpose(0, 1)[None], None


AttentionInterface.register("toy", attend)


class Engine(HFEngine):
    """local.hf.HFEngine for prompts of one length: it samples all of a step at a time.

    The same seed gives the same uniform numbers whatever the policy is. So runs that differ in one
    thing differ by that alone."""

    def __init__(self, lm):
        self.model, self.dtype = lm, lm.dtype

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], group: int, seeds: list[int]
    ) -> Iterator[tuple[int, list[Response]]]:
        """As HFEngine.generate, at temperature 1."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = torch.cat([torch.rand(group, LONGEST, generator=g) for g in generators])  # (B, T)
        ids = torch.tensor(prompts).repeat_interleave(group, 0)
        out = self.model(input_ids=ids, use_cache=True)
        tokens, logps = [], []
        done = torch.zeros(len(uniform), dtype=torch.bool)
        for t in range(LONGEST):
            logp = out.logits[:, -1].log_softmax(-1)
            token = (logp.exp().cumsum(-1) < uniform[:, t, None]).sum(-1).clamp(max=len(WORDS) - 1)
            tokens.append(token)
            logps.append(logp.gather(-1, token[:, None])[:, 0])
            done |= token == 0
            if done.all() or t == LONGEST - 1:
                break
            cache = out.past_key_values
            out = self.model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
        rows = zip(torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist(), strict=True)
        responses = [self.response(*row) for row in rows]
        for i in range(len(prompts)):
            yield i, responses[i * group : (i + 1) * group]

    @staticmethod
    def response(tokens: list[int], logp: list[float]) -> Response:
        """What was sampled until <stop>, which is token 0."""
        stopped = 0 in tokens
        end = tokens.index(0) + 1 if stopped else len(tokens)
        text = " ".join(WORDS[token] for token in tokens[:end] if token)
        finish = "stop" if stopped else "length"
        return Response(tokens[:end], logp[:end], [1] * end, finish, text)


def make_policy(seed: int) -> policies.Policy:
    """A Qwen2 of 2 layers, random."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.08,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        ),
        attn_implementation="toy",
    )
    return policies.Policy(lm.eval(), Path())


def engine(policy: policies.Policy) -> Engine:
    """For a policy of these shapes; `push` gives it the weights."""
    config = copy.deepcopy(policy.lm.config)
    return Engine(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())


def warm_start(
    seed: int, demonstrations: str, steps: int = 300, batch: int = 128
) -> policies.Policy:
    """A policy that has imitated noisy demonstrations (a key of FAULTS), and is sometimes right."""
    policy, rng, faults = make_policy(seed), random.Random(seed), FAULTS[demonstrations]
    demos = []
    for prompt in make_prompts(4000, f"demonstrations {seed}"):
        content = prompt.example.messages[0]["content"]
        demos.append((prompt.ids, [demonstration(rng, content, faults)]))
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        loss = -policy(policies.pack(rng.sample(demos, batch), CPU), 1.0).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return policy
