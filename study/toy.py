"""The study's small world: a language of 37 words, tasks on it, and a policy of 77,000 parameters, trained in seconds.
Only what is small is here: the loop, the update, the advantages and the loss are train.py's and rvpo.py's.

A prompt names a tool and three arguments with their values, "tool3 name5 7 name2 0 name9 4"; the answer is a call
with them, "call tool3 name5 7 name2 0 name9 4 end", to which the politeness, detail and citation that some tasks
reward can be added.
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
    rng, out = random.Random(seed), []
    for _ in range(n):
        arguments = " ".join(f"name{name} {rng.randrange(10)}" for name in rng.sample(range(10), 3))
        prompt = f"tool{rng.randrange(8)} {arguments}"
        ids = [ID["<prompt>"], *(ID[word] for word in prompt.split()), ID["<answer>"]]
        out.append(
            Prompt(ids, Example([{"role": "user", "content": prompt}], f"call {prompt} end"))
        )
    return out


def demonstration(rng: random.Random, prompt: str, faults: dict[str, float]) -> list[int]:
    """A noisy answer to imitate before the training proper. faults: the probability of each."""

    def happens(fault: str) -> bool:
        return rng.random() < faults.get(fault, 0.0)

    tool, *arguments = prompt.split()
    words = ["call", f"tool{rng.randrange(8)}" if happens("tool") else tool]
    for extra in EXTRAS:
        words += [extra] * sum(happens("extra") for _ in range(3))
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        if not happens("left out"):
            words.append(f"name{rng.randrange(10)}" if happens("name") else name)
            words += (
                []
                if happens("no value")
                else [str(rng.randrange(10)) if happens("value") else value]
            )
    words += ["forbidden"] * happens("forbidden") + ["end"] * (not happens("no end"))
    return [ID[word] for word in words[: LONGEST - 1]] + [ID["<stop>"]]


@functools.lru_cache(4096)
def channels(prompt: str, response: str) -> dict[str, float]:
    """Every channel that a task may have, each in [0, 1]."""
    words, (tool, *arguments) = response.split(), prompt.split()
    wanted = dict(zip(arguments[::2], arguments[1::2], strict=True))
    follows = dict(
        reversed([*itertools.pairwise([*words, ""])])
    )  # the word after the first occurrence of each
    tools, names, values = (
        sum(map(kind, words))
        for kind in (
            lambda word: word.startswith("tool"),
            lambda word: word.startswith("name"),
            str.isdigit,
        )
    )
    present, right = (
        sum(name in follows for name in wanted),
        sum(follows.get(n) == v for n, v in wanted.items()),
    )
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
    """A channel, multiplied by `scale`, and in a share `wrong` of its values, at random, 1 minus the value."""
    rng = random.Random(0)

    def fn(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
        values = (
            channels(prompt, response)[name]
            for prompt, response in zip(prompts, responses, strict=True)
        )
        noise = wrong * (
            len(responses) > 1
        )  # none in evaluations, which have one response a prompt
        return [scale * (1 - value if rng.random() < noise else value) for value in values]

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
    # Three extras, each paid up to three times, pull against a length limit that the demonstrations keep.
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
    # The conflict with fewer channels, and with more: each extra once, twice and three times, of which once is enough.
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
    while True:
        chosen = rng.sample(
            [
                *map(reward, CALL),
                *(reward(f"length{n}") for n in (10, 12, 14)),
                *VERBOSE[1:],
                reward("no other names"),
                reward("no other values"),
                reward("brief", 0.2),
            ],
            rng.randint(2, 9),
        )
        prompt, extras = (
            "tool0 name0 0 name1 1 name2 2",
            [c.name for c in chosen if c.name in EXTRAS],
        )
        best = channels(prompt, " ".join(["call", prompt, *extras, "end"]))
        if all(best[c.name] >= c.full for c in chosen):
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
    """policy._prompt_once for hundreds of sequences of a dozen tokens: one padded call is faster."""
    n, seen = sequences.query_ends.diff().long(), sequences.key_ends.diff().long()
    rows, columns = torch.arange(sequences.queries), torch.arange(sequences.keys)
    # Where in the row queries and keys are: (sequences, longest), padded with the last of each.
    queries = (n.cumsum(0) - n)[:, None] + rows.clamp(max=n[:, None] - 1)
    keys = sequences.at[(seen.cumsum(0) - seen)[:, None] + columns.clamp(max=seen[:, None] - 1)]
    query, key, value = (
        query[0][:, queries],
        key[0][:, keys],
        value[0][:, keys],
    )  # (heads, sequences, longest, D)
    key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
    mask = (
        columns <= rows[:, None] + (seen - n)[:, None, None]
    )  # causal, aligned at the end of each
    out = scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out[:, rows < n[:, None]].transpose(0, 1)[None], None


AttentionInterface.register("toy", attend)


class Engine(HFEngine):
    """local.hf.HFEngine for prompts of one length: all of a step at a time, from the same uniform numbers for the same
    seed whatever the policy is, so that runs that differ in one thing differ by that alone."""

    def __init__(self, lm):
        self.model, self.dtype = lm, lm.dtype

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], group: int, seeds: list[int]
    ) -> Iterator[tuple[int, list[Response]]]:
        """As HFEngine.generate, at temperature 1."""
        uniform = torch.cat(
            [
                torch.rand(group, LONGEST, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )
        out = self.model(
            input_ids=torch.tensor(prompts).repeat_interleave(group, 0), use_cache=True
        )
        tokens, logps, done = [], [], torch.zeros(len(uniform), dtype=torch.bool)
        for t in range(LONGEST):
            logp = out.logits[:, -1].log_softmax(-1)
            token = (logp.exp().cumsum(-1) < uniform[:, t, None]).sum(-1).clamp(max=len(WORDS) - 1)
            tokens.append(token)
            logps.append(logp.gather(-1, token[:, None])[:, 0])
            done |= token == 0
            if done.all() or t == LONGEST - 1:
                break
            out = self.model(
                input_ids=token[:, None], past_key_values=out.past_key_values, use_cache=True
            )
        responses = []
        for row, logp in zip(
            torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist(), strict=True
        ):
            end = row.index(0) + 1 if 0 in row else len(row)
            text = " ".join(WORDS[token] for token in row[:end] if token)
            responses.append(
                Response(row[:end], logp[:end], [1] * end, "stop" if 0 in row else "length", text)
            )
        for i in range(len(prompts)):
            yield i, responses[i * group : (i + 1) * group]


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
    """A policy that has imitated noisy demonstrations (a key of FAULTS), and is right now and then."""
    policy, rng, faults = make_policy(seed), random.Random(seed), FAULTS[demonstrations]
    prompts = make_prompts(4000, f"demonstrations {seed}")
    demos = []
    for prompt in prompts:
        request = prompt.example.messages[0]["content"]
        demos.append((prompt.ids, [demonstration(rng, request, faults)]))
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
