"""Both engines against transformers' own log-probs: a real vLLM where it is installed."""

import copy
import importlib.util
import itertools

import pytest
import torch

import model
import rollout

STOPS = list(range(2, 30))  # many, so that random weights hit one
TEMPERATURE = 0.7
PROMPTS = [list(range(40, 40 + n)) for n in (300, 17, 200)]  # over and under vLLM's blocks of 32 and 128 tokens
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def vllm(tiny):
    engine = rollout.VLLMEngine(tiny, model.load_tokenizer(tiny), STOPS, max_len=400, temperature=TEMPERATURE, max_tokens=24,
                                seed=0, gpu_memory=0.3)
    engine.push(model.load(tiny, torch.device("cpu")))
    return engine


@pytest.fixture
def policy(tiny):
    return model.load(tiny, torch.device("cpu"))


def hf_engine(policy, tiny):
    return rollout.HFEngine(policy, model.load_tokenizer(tiny), STOPS, TEMPERATURE, 24)


def generate(engine, prompts, group, seeds) -> list[list[rollout.Response]]:
    """In the order of the prompts."""
    return [responses for _, responses in sorted(engine.generate(prompts, group, seeds))]


def check(responses: list[list[rollout.Response]], policy) -> float:
    """The structure of every response. Returns the largest |log-prob - transformers'|."""
    worst = 0.0
    for prompt, group in zip(PROMPTS, responses, strict=True):
        assert len(group) == 8
        for r in group:
            assert len(r.tokens) == len(r.logp) == len(r.mask) and set(r.mask) == {1}
            assert not set(r.tokens[:-1]) & set(STOPS)
            assert r.finish == ("stop" if r.tokens[-1] in STOPS else "length")
            assert r.finish == "stop" or len(r.tokens) == 24
        with torch.no_grad():
            exact = model.response_logp(policy, prompt, [r.tokens for r in group], TEMPERATURE)
        got = torch.tensor([x for r in group for x in r.logp])
        worst = max(worst, (got - exact).abs().max().item())
    finishes = [r.finish for group in responses for r in group]
    assert "stop" in finishes and "length" in finishes
    return worst


@needs_vllm
def test_vllm_log_probs_match_before_and_after_an_update(vllm, policy):
    """Tied embeddings, prompts over a block, temperature 0.7. Without the push, or with the prefix cache kept, the
    numbers are far off: that is what the update must not leave behind."""
    vllm.push(policy)
    assert policy.config.tie_word_embeddings
    assert check(generate(vllm, PROMPTS, 8, [1, 100, 200]), policy) < 1e-3
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    assert check(generate(vllm, PROMPTS, 8, [1, 100, 200]), policy) > 0.1
    vllm.push(policy)
    assert check(generate(vllm, PROMPTS, 8, [1, 100, 200]), policy) < 1e-3


@needs_vllm
def test_vllm_seeds(vllm, policy):
    vllm.push(policy)
    once, again = generate(vllm, PROMPTS, 8, [1, 100, 200]), generate(vllm, PROMPTS, 8, [1, 100, 200])
    assert once == again
    alone = generate(vllm, PROMPTS[1:2], 8, [100])  # as another rank would
    assert [r.tokens for r in alone[0]] == [r.tokens for r in once[1]]
    assert generate(vllm, PROMPTS, 8, [2, 101, 201])[0][0].tokens != once[0][0].tokens
    assert len({tuple(r.tokens) for r in once[0]}) == 8
    assert generate(vllm, [], 8, []) == []


def test_hf_log_probs_and_seeds(policy, tiny):
    engine = hf_engine(policy, tiny)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    once = generate(engine, PROMPTS, 8, [1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)  # the trainer's own random numbers are left alone
    assert check(once, policy) < 1e-3
    assert generate(engine, PROMPTS, 8, [1, 2, 3]) == once
    assert generate(engine, PROMPTS[1:2], 8, [2])[0] == once[1]
    assert generate(engine, PROMPTS, 8, [4, 5, 6])[0] != once[0]


def test_a_checkpoints_generation_config_does_not_shape_the_samples(policy, tiny):
    """Qwen2.5's has top_k 20, top_p 0.8 and a repetition penalty: they would make the log-probs another policy's."""
    once = generate(hf_engine(policy, tiny), PROMPTS[1:2], 8, [1])
    other = copy.deepcopy(policy)
    other.generation_config.update(do_sample=True, top_k=2, top_p=0.1, min_p=0.5, repetition_penalty=2.0, temperature=0.1)
    assert generate(hf_engine(other, tiny), PROMPTS[1:2], 8, [1]) == once


def test_text_shows_special_tokens_but_not_the_stop_token(tiny):
    tokenizer = model.load_tokenizer(tiny)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    word = tokenizer("hello").input_ids
    assert rollout._response([start, *word, end], [], "stop", [end], tokenizer).text == "<|im_start|>hello"
    assert rollout._response([end], [], "stop", [end], tokenizer).text == ""
    assert rollout._response(word, [], "length", [end], tokenizer).text == "hello"


def test_scoring_starts_while_others_are_sampled():
    events = []

    class Engine:
        def generate(self, prompts, group, seeds):
            for i in (1, 0):  # in the order in which they finish
                events.append(f"sampled {prompts[i]}")
                yield i, [rollout.Response([], [], [], "stop", "text")] * group

    def start(example, texts):
        events.append(f"scoring {example}")
        return lambda: (example, texts)

    out = rollout.sample(Engine(), start, [(["p"], "a"), (["q"], "b")], 2, 0, 0)
    assert events == ["sampled ['q']", "scoring b", "sampled ['p']", "scoring a"]
    assert [rewards() for _, rewards in out] == [("a", ["text", "text"]), ("b", ["text", "text"])]


def test_request_seeds_never_meet():
    seeds = [rollout.request_seed(s, step, slot) for s in range(3) for step in [*range(50), "eval"] for slot in range(50)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    ordered = sorted(seeds)
    assert sum(b - a < 8 for a, b in itertools.pairwise(ordered)) <= 3  # of 7,650: vLLM uses seed ... seed + G - 1
