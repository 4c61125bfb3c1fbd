"""Both engines against transformers' own log-probs: a real vLLM where it is installed."""

import itertools

import numpy as np
import pytest
import torch
from conftest import needs_vllm
from programs import run

import policy as policies
import rollout
import train
from infra import pretrained
from infra.prompts import Prompt
from infra.ranks import gather
from local import hf
from policy import pack
from rewards import Channel, Example, Task
from rollout import Decoding, Response, Sampler, make_response

STOPS = list(range(2, 30))  # many, so that random weights hit one
TEMPERATURE = 0.7
# Over and under vLLM's blocks of 32 and 128 tokens.
PROMPTS = [list(range(40, 40 + n)) for n in (300, 17, 200)]


def decoding(path) -> Decoding:
    return Decoding(pretrained.load_tokenizer(path), STOPS, TEMPERATURE, 24)


@pytest.fixture(scope="module")
def vllm(tiny):
    engine = rollout.VLLMEngine(tiny, decoding(tiny), max_len=800, gpu_memory=0.3)
    yield engine
    # Before join_ranks, of other tests in this process, ends its group:
    engine.llm.llm_engine.engine_core.shutdown()


@pytest.fixture
def policy(tiny):
    return policies.load(tiny, torch.device("cpu"))


@pytest.fixture
def transformers(tiny):
    return hf.HFEngine(hf.load(tiny, torch.device("cpu")), decoding(tiny))


def push(engine, policy):
    engine.sleep()
    engine.push(policies.full_weights(policy, engine.dtype))


def generate(engine, prompts, group, seeds) -> list[list[rollout.Response]]:
    """In the order of the prompts."""
    return [responses for _, responses in sorted(engine.generate(prompts, group, seeds))]


def check(responses: list[list[rollout.Response]], policy) -> float:
    """The structure of every response. Returns the largest |log-prob - the policy's|."""
    worst = 0.0
    for prompt, group in zip(PROMPTS, responses, strict=True):
        assert len(group) == 8
        for r in group:
            assert len(r.tokens) == len(r.logp) == len(r.mask) and set(r.mask) == {1}
            assert not set(r.tokens[:-1]) & set(STOPS)
            assert r.finish == ("stop" if r.tokens[-1] in STOPS else "length")
            assert r.finish == "stop" or len(r.tokens) == 24
        with torch.no_grad():
            row = pack([(prompt, [r.tokens for r in group])], torch.device("cpu"))
            exact = policy(row, TEMPERATURE)
        got = torch.tensor([x for r in group for x in r.logp])
        worst = max(worst, (got - exact).abs().max().item())
    finishes = [r.finish for group in responses for r in group]
    assert "stop" in finishes and "length" in finishes
    return worst


def check_before_and_after_an_update(engine, policy):
    """Without the push, or with what was cached under the old weights, the numbers are far off."""
    push(engine, policy)
    assert check(generate(engine, PROMPTS, 8, [1, 100, 200]), policy) < 1e-3
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    assert check(generate(engine, PROMPTS, 8, [1, 100, 200]), policy) > 0.1
    push(engine, policy)
    assert check(generate(engine, PROMPTS, 8, [1, 100, 200]), policy) < 1e-3


@needs_vllm
def test_vllm_log_probs_match_before_and_after_an_update(vllm, policy):
    """Tied embeddings, prompts over a block, temperature 0.7."""
    assert policy.lm.config.tie_word_embeddings
    check_before_and_after_an_update(vllm, policy)


@needs_vllm
def test_vllm_seeds(vllm, policy):
    push(vllm, policy)
    once = generate(vllm, PROMPTS, 8, [1, 100, 200])
    assert generate(vllm, PROMPTS, 8, [1, 100, 200]) == once
    alone = generate(vllm, PROMPTS[1:2], 8, [100])  # as another rank would
    assert [r.tokens for r in alone[0]] == [r.tokens for r in once[1]]
    assert generate(vllm, PROMPTS, 8, [2, 101, 201])[0][0].tokens != once[0][0].tokens
    assert len({tuple(r.tokens) for r in once[0]}) == 8
    assert generate(vllm, [], 8, []) == []


@needs_vllm
def test_training_with_vllm_is_the_same_when_activations_are_recomputed(
    vllm, monkeypatch, tmp_path, graded
):
    """With this process's engine, which takes over the policy at the start of a run."""
    monkeypatch.setattr(train, "VLLMEngine", lambda *args, **options: vllm)
    args = ["--engine", "vllm", "--temperature", TEMPERATURE, "--max-tokens", 24]
    (steps, _, samples, plain), (_, _, again, recomputed) = (
        run(monkeypatch, tmp_path, *args, "--gradient-checkpointing", mode, name=mode)
        for mode in ("off", "on")
    )
    assert all(line["sampler_gap"] < 1e-3 and line["grad_norm"] > 0.1 for line in steps)
    assert samples == again
    for key in plain:
        assert (plain[key] - recomputed[key]).abs().max() < 1e-6


def test_hf_log_probs_match_before_and_after_an_update(transformers, policy):
    check_before_and_after_an_update(transformers, policy)


def test_hf_seeds(transformers):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    once = generate(transformers, PROMPTS, 8, [1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)  # the trainer's random numbers are left alone
    assert generate(transformers, PROMPTS, 8, [1, 2, 3]) == once
    assert generate(transformers, PROMPTS[1:2], 8, [2])[0] == once[1]
    assert generate(transformers, PROMPTS, 8, [4, 5, 6])[0] != once[0]


def test_a_checkpoints_generation_config_does_not_shape_the_samples(transformers):
    """Qwen2.5's has top_k and a repetition penalty: the log-probs would be another policy's."""
    once = generate(transformers, PROMPTS[1:2], 8, [1])
    transformers.model.generation_config.update(
        do_sample=True, top_k=2, top_p=0.1, min_p=0.5, repetition_penalty=2.0, temperature=0.1
    )
    assert generate(transformers, PROMPTS[1:2], 8, [1]) == once


def test_text_shows_special_tokens_but_not_the_stop_token(tiny):
    tokenizer = pretrained.load_tokenizer(tiny)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    word, reads = tokenizer("hello").input_ids, Decoding(tokenizer, [end], 1.0, 8)
    assert make_response([start, *word, end], [], "stop", reads).text == "<|im_start|>hello"
    assert make_response([end], [], "stop", reads).text == ""
    assert make_response(word, [], "length", reads).text == "hello"


def test_scoring_starts_while_others_are_sampled():
    events = []

    class Engine:
        def generate(self, prompts, group, seeds):
            for i in (1, 0):  # in the order in which they finish
                events.append(f"sampled {prompts[i]}")
                yield i, [Response([], [], [], "stop", "text")] * group

    class Judged(Task):
        def start(self, example, texts):
            events.append(f"scoring {example.reference}")
            return lambda: np.array([[float(example.reference)]] * len(texts))

    prompts = [Prompt(["p"], Example([], "1")), Prompt(["q"], Example([], "2"))]
    sampler = Sampler(Engine(), Judged(None, [Channel("c")]), 0)
    sampled = sampler.sample(prompts, 2, 0)
    assert events == ["sampled ['q']", "scoring 2", "sampled ['p']", "scoring 1"]
    groups = sampler.score(prompts, sampled)
    assert [group.prompt for group in groups] == prompts
    assert [group.rewards.tolist() for group in groups] == [[[1], [1]], [[2], [2]]]


def test_each_prompt_is_sampled_once_with_its_own_seed(monkeypatch):
    """Six prompts on four ranks, gathered in their order: the same as on one."""

    class Engine:
        def generate(self, prompts, group, seeds):
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                yield i, [Response([], [], [], "stop", f"{prompt} {seed}")]

    class Echo(Task):
        def start(self, example, texts):
            return texts

    prompts, shares = [Prompt([f"p{slot}"], None) for slot in range(6)], []
    sampler = Sampler(Engine(), Echo(None, [Channel("c")]), 0)
    monkeypatch.setattr(Echo, "start", lambda self, example, texts: texts)
    alone = sampler.sample(prompts, 1, 7)
    monkeypatch.setattr(rollout, "WORLD", 4)
    monkeypatch.setattr("infra.ranks.WORLD", 4)
    for rank in range(4):
        monkeypatch.setattr(rollout, "RANK", rank)
        monkeypatch.setattr(rollout, "check_signals", lambda: None)
        shares.append(sampler.sample(prompts, 1, 7))

    def all_gather(lists, local):
        lists[:] = shares

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    assert gather([]) == alone
    for slot, (_, texts) in enumerate(alone):
        assert texts == [f"['p{slot}'] {rollout.request_seed(0, 7, slot)}"]


def test_request_seeds_never_meet():
    seeds = [
        rollout.request_seed(s, step, slot)
        for s in range(3)
        for step in [*range(50), "eval"]
        for slot in range(50)
    ]
    assert all(0 <= seed < 2**31 for seed in seeds)
    # At most three of 7,650 are so close that they meet: vLLM uses seed ... seed + G - 1.
    assert sum(b - a < 8 for a, b in itertools.pairwise(sorted(seeds))) <= 3
