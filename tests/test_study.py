"""The study: its world against the trainer's own code, its statistics by hand, and its tables from one real run."""

import itertools
import json
import math
import multiprocessing.dummy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import policy as policies
import rewards as scoring
import rvpo

sys.path.insert(0, str(ROOT / "study"))  # where study.py finds the two others, too

import report
import toy

import study

PROMPT = "tool3 name5 7 name2 0 name9 4"


@pytest.mark.parametrize("response, expected", [
    (f"call {PROMPT} end", {"format": 1, "tool": 1, "names": 1, "values": 1, "safe": 1, "length10": 1, "please": 0, "no other names": 1}),
    (f"call {PROMPT} please please detail end", {"format": 1, "length10": 0, "length14": 1, "please": 2 / 3, "please 2": 1, "please 3": 0, "cite": 0}),
    ("call tool3 name5 1 name5 7 name2 0 forbidden end", {"names": 2 / 3, "values": 1 / 3, "safe": 0, "no other names": 2 / 3, "no other values": 1 / 3}),
    ("call tool2 tool3 end", {"format": 1, "tool": 0, "names": 0, "values": 0, "no other values": 1, "brief": 10 / 14}),
    (f"call call {PROMPT} end", {"format": 0, "tool": 0}),
    ("", {"format": 0, "tool": 0, "names": 0, "safe": 1, "brief": 1}),
])
def test_channels_by_hand(response, expected):
    got = toy.channels(PROMPT, response)
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert all(0 <= value <= 1 for value in got.values())


def test_shortest_answer_satisfies_what_can_be_had_together():
    _, example = toy.make_prompts(1, "x")[0]
    got = toy.channels(example.messages[0]["content"], example.reference)
    channels, _ = toy.SUITE["no conflict"]
    assert all(got[c.name] == c.full for c in channels)


def test_sampler_and_policy_agree():
    """On log-probs, the padded attention of toy.py with policy.py's, and the same seed gives the same responses."""
    policy = toy.make_policy(0)
    prompts = toy.make_prompts(3, "x")
    engine = toy.engine(policy)
    engine.push(policies.full_weights(policy, engine.dtype))
    ids, seeds = [ids for ids, _ in prompts], [5, 6, 5]
    sampled = dict(engine.generate(ids, 4, seeds))
    assert sampled == dict(engine.generate(ids, 4, seeds)) and len({r.text for r in sampled[0]}) > 1
    row = policies.pack([(ids[p], [response.tokens for response in sampled[p]]) for p in range(3)], toy.CPU)
    logp = policy(row, 1.0)
    torch.testing.assert_close(logp, torch.tensor([x for p in range(3) for response in sampled[p] for x in response.logp]), atol=2e-5, rtol=0)
    logp.mean().backward()
    padded = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    policy.lm.set_attn_implementation("prompt_once")
    policy(row, 1.0).mean().backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(padded[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_noise_and_scale():
    channel = toy.reward("safe", wrong=0.25, scale=10.0)
    texts = ["call end"] * 8000
    values = channel.fn([PROMPT] * 8000, texts, texts)
    assert {*values} == {0.0, 10.0} and np.mean(values) == pytest.approx(7.5, abs=0.2)
    assert channel.fn([PROMPT], ["call end"], [""]) == [10.0]  # an evaluation
    assert channel.full == 10.0 and channel.bounds == (0.0, 10.0)


@pytest.mark.parametrize("beta, channels, group, successes", [*itertools.product((0.0, 0.5, 5.0), (2, 9), (4, 16), (1, 3))])
def test_closed_credit_is_rvpo_advantage(beta, channels, group, successes):
    rewards = torch.ones(group, channels, dtype=torch.float64)
    rewards[successes:, 0] = 0
    scores = rvpo.soft_min(rvpo.zscore(rewards, eps=1e-14), beta)
    success, failure = report.closed_credit(beta, channels, group, successes)
    assert (scores[0].item(), scores[-1].item()) == pytest.approx((success, failure), abs=1e-12)
    if beta:
        assert success < math.log(channels / (channels - 1)) / beta


def test_statistics_by_hand():
    assert report.sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert report.sign_flip([1.0, -1.0]) == 1.0
    assert report.sign_flip([0.1] * 8) == 2 / 256
    rewards = torch.tensor([[[1.0, 0.5], [0, 0.5], [0, 0.5], [0, 0.5]], [[1, 0], [1, 0], [1, 0], [0, 0]], [[1, 0], [0, 0], [0, 1], [0, 0]]])
    advantages = torch.tensor([[3.0, -1, -1, -1], [0.5, 0.5, 0.5, -2], [9, 9, 9, 9]])
    assert study.credit(rewards, advantages) == [3, -2]  # in the third group two channels vary
    z = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for beta in (0.1, 2.0):
        size, error, largest, bound, share = study.taylor(z, beta)
        assert 0 < error < largest and error < bound and share <= 1 and size > 0
    assert study.taylor(z, 0.1)[1] < study.taylor(z, 2.0)[1]


def test_softmin_wants_one_scale():
    """unit() takes each channel's bounds away; then softmin does not depend on them, and grpo does."""
    raw = torch.rand(3, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = raw * torch.tensor([1.0, 10.0])
    channels = [toy.reward("safe"), toy.reward("please")]
    larger = [toy.reward("safe"), toy.reward("please", scale=10.0)]
    same, got = (rvpo.softmin_advantage(scoring.to_unit(c, r), 1.0) for c, r in ((channels, raw), (larger, scaled)))
    torch.testing.assert_close(got, same)
    assert (rvpo.grpo_advantage(scaled) - rvpo.grpo_advantage(raw)).abs().max() > 0.1
    minmax = study.forms(larger)["minmax"]
    torch.testing.assert_close(minmax(scaled, 0.0, None), rvpo.grpo_advantage(raw))


def test_a_run_and_the_report(tmp_path, monkeypatch):
    """One real run of four steps, twice the same; its result stands in for all the others in tables and figure."""
    monkeypatch.setattr(study, "STEPS", 4)
    monkeypatch.setattr(study, "EVERY", 2)
    monkeypatch.setattr(study, "TUNING", (1000,))
    monkeypatch.setattr(rvpo, "AGGREGATIONS", dict(rvpo.AGGREGATIONS))  # result() adds to it
    study.STARTS[0, "verbose"] = toy.make_policy(3).state_dict()
    run = study.Run("conflict", "rvpo", 0, 1e-3, channel="safe", wrong=0.5)
    out = study.result(run)
    assert json.dumps(out) == json.dumps(study.result(run)) and out["full"]["please"] < 1 / 3
    assert len(out["eval"]["joint"]) == 3 and len(out["grad_norm"]) == 2 and min(out["grad_norm"]) > 0
    assert study.result(run._replace(method="grpo"))["grad_norm"] != out["grad_norm"]
    assert study.result(run._replace(method="centred"))["full"] == out["full"]
    assert study.result(run._replace(wrong=0.0))["weight"]["safe"] != out["weight"]["safe"]

    def stand_in(runs, done):
        for one in runs:
            channels = [c.name for c in toy.SUITE[one.task][0]]
            value = {"rvpo": 0.9, "gdpo": 0.1 + one.seed / 100}.get(one.method, 0.5) + one.lr
            done[one] = {**out, "eval": {name: [0.0, value, value] for name in [*channels, "joint"]}, "full": dict.fromkeys(channels, 1.0),
                         "binding": {c: [0.1, 0.2] for c in channels}, "weight": {c: [0.1, 0.1] for c in channels}}

    monkeypatch.setattr(study, "execute", stand_in)
    monkeypatch.setattr(study, "warm_start", lambda key: (key, {}))
    monkeypatch.setattr(study, "get_context", lambda kind: multiprocessing.dummy)  # threads
    study.main(tmp_path / "out", 40, False)
    text = (tmp_path / "out/study.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| gdpo |")).split(" | ")
    # seeds 40 to 47: joint .5 to .57 and the best learning rate, 3e-3; rvpo is .366 better, in every seed
    assert row[1:3] == ["0.003", "0.538 ± 0.024"] and row[6] == "8 of 8"
    assert row[8:10] == ["+0.365", "0.0078"] and row[10] == "0.047 |"
    assert len(json.loads((tmp_path / "out/study.json").read_text())) > 200
    assert (tmp_path / "out/study.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="must not exist"):
        study.main(tmp_path / "out", 40, False)
