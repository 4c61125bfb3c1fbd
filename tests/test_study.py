"""The study: its world against the trainer's own code, its statistics by hand, its tables."""

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
from tools import stats

sys.path.insert(0, str(ROOT / "study"))  # where study.py finds the two others, too

import more
import others
import report
import toy

import study

PROMPT = "tool3 name5 7 name2 0 name9 4"


@pytest.mark.parametrize(
    "response, expected",
    [
        (
            f"call {PROMPT} end",
            {
                "format": 1,
                "tool": 1,
                "names": 1,
                "values": 1,
                "safe": 1,
                "length10": 1,
                "please": 0,
                "no other names": 1,
            },
        ),
        (
            f"call {PROMPT} please please detail end",
            {
                "format": 1,
                "length10": 0,
                "length14": 1,
                "please": 2 / 3,
                "please 2": 1,
                "please 3": 0,
                "cite": 0,
            },
        ),
        (
            "call tool3 name5 1 name5 7 name2 0 forbidden end",
            {
                "names": 2 / 3,
                "values": 1 / 3,
                "safe": 0,
                "no other names": 2 / 3,
                "no other values": 1 / 3,
            },
        ),
        (
            "call tool2 tool3 end",
            {
                "format": 1,
                "tool": 0,
                "names": 0,
                "values": 0,
                "no other values": 1,
                "brief": 10 / 14,
            },
        ),
        (f"call call {PROMPT} end", {"format": 0, "tool": 0}),
        ("", {"format": 0, "tool": 0, "names": 0, "safe": 1, "brief": 1}),
    ],
)
def test_channels_by_hand(response, expected):
    got = toy.channels(PROMPT, response)
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert all(0 <= value <= 1 for value in got.values())


def test_shortest_answer_satisfies_what_can_be_had_together():
    example = toy.make_prompts(1, "x")[0].example
    got = toy.channels(example.messages[0]["content"], example.reference)
    channels, _ = toy.SUITE["no conflict"]
    assert all(got[c.name] == c.full for c in channels)


def test_sampler_and_policy_agree():
    """On log-probs; so does toy.py's padded attention. The same seed gives the same responses."""
    policy = toy.make_policy(0)
    prompts = toy.make_prompts(3, "x")
    engine = toy.engine(policy)
    engine.push(policies.full_weights(policy, engine.dtype))
    ids, seeds = [prompt.ids for prompt in prompts], [5, 6, 5]
    sampled = dict(engine.generate(ids, 4, seeds))
    assert sampled == dict(engine.generate(ids, 4, seeds)) and len({r.text for r in sampled[0]}) > 1
    groups, sampled_logp = [], []
    for p in range(3):
        groups.append((ids[p], [response.tokens for response in sampled[p]]))
        for response in sampled[p]:
            sampled_logp += response.logp
    row = policies.pack(groups, toy.CPU)
    logp = policy(row, 1.0)
    torch.testing.assert_close(logp, torch.tensor(sampled_logp), atol=2e-5, rtol=0)
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


@pytest.mark.parametrize(
    "beta, channels, group, successes",
    [*itertools.product((0.0, 0.5, 5.0), (2, 9), (4, 16), (1, 3))],
)
def test_closed_credit_is_rvpo_advantage(beta, channels, group, successes):
    rewards = torch.ones(group, channels, dtype=torch.float64)
    rewards[successes:, 0] = 0
    scores = rvpo.soft_min(rvpo.zscore(rewards, eps=1e-14), beta)
    success, failure = report.closed_credit(beta, channels, group, successes)
    assert (scores[0].item(), scores[-1].item()) == pytest.approx((success, failure), abs=1e-12)
    if beta:
        assert success < math.log(channels / (channels - 1)) / beta


def test_statistics_by_hand():
    assert stats.sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert stats.sign_flip([1.0, -1.0]) == 1.0
    assert stats.sign_flip([0.1] * 8) == 2 / 256
    rewards = torch.tensor(
        [
            [[1.0, 0.5], [0, 0.5], [0, 0.5], [0, 0.5]],
            [[1, 0], [1, 0], [1, 0], [0, 0]],
            [[1, 0], [0, 0], [0, 1], [0, 0]],
        ]
    )
    advantages = torch.tensor([[3.0, -1, -1, -1], [0.5, 0.5, 0.5, -2], [9, 9, 9, 9]])
    assert study.credit(rewards, advantages) == [3, -2]  # in the third group two channels vary
    z = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for beta in (0.1, 2.0):
        size, error, largest, bound, share = study.taylor(z, beta)
        assert 0 < error < largest and error < bound and share <= 1 and size > 0
    assert study.taylor(z, 0.1)[1] < study.taylor(z, 2.0)[1]


def test_softmin_wants_one_scale():
    """Once to_unit() takes the channels' bounds away, softmin ignores them; grpo does not."""
    raw = torch.rand(3, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = raw * torch.tensor([1.0, 10.0])
    channels = [toy.reward("safe"), toy.reward("please")]
    larger = [toy.reward("safe"), toy.reward("please", scale=10.0)]
    same = rvpo.softmin_advantage(scoring.to_unit(channels, raw), 1.0)
    got = rvpo.softmin_advantage(scoring.to_unit(larger, scaled), 1.0)
    torch.testing.assert_close(got, same)
    assert (rvpo.grpo_advantage(scaled) - rvpo.grpo_advantage(raw)).abs().max() > 0.1
    minmax = study.forms(larger)["minmax"]
    torch.testing.assert_close(minmax(scaled, 0.0, None), rvpo.grpo_advantage(raw))


FOUR = [[[1.0, 1], [0, 0], [1, 0], [0, 0]]]  # z .866 -.866 .866 -.866 and 1.5 -.5 -.5 -.5
# The second channel varies in one of two groups: weights 1 and sqrt(2).
TWO = [[[1.0, 0], [0, 1]], [[1, 0.5], [0, 0.5]]]


@pytest.mark.parametrize(
    "name, beta, rewards, expected",
    [
        ("dara", 0.0, TWO, [[-0.293, 0.293], [0.707, -0.707]]),
        # 3/4 of the sum; the third is dropped: the others' mean.
        ("gd2po", 0.0, FOUR, [[1.774, -1.025, -0.092, -1.025]]),
        # Deviations 1.25 -.75 .25 -.75, stds .5 and .433.
        ("dvao", 0.0, FOUR, [[1.340, -0.804, 0.268, -0.804]]),
        # .229 .55 .687
        ("geometric", 0.0, [[[1.0, 0], [0.5, 0.5], [1, 0.4]]], [[-1.104, 0.260, 0.844]]),
        # .25 z + .75 * 2 (r - 1) = .375 and -1.625
        ("blend", 0.0, [[[1.0], [0], [0], [0]]], [[1.5, -0.5, -0.5, -0.5]]),
        # (0, .375) and (0, -1.625)
        ("blend", 2.0, [[[1.0, 1], [1, 1], [1, 1], [1, 0]]], [[0.363, 0.363, 0.363, -1.088]]),
    ],
)
def test_aggregations_of_others_by_hand(name, beta, rewards, expected):
    channels = [toy.reward("safe"), toy.reward("please")][: len(rewards[0][0])]
    got = others.forms(channels)[name](torch.tensor(rewards, dtype=torch.float64), beta, None)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=2e-3, rtol=0)


def test_a_heavy_constraint_by_hand():
    forms = others.forms([toy.reward("safe"), toy.reward("length14")])
    rewards = torch.tensor(FOUR, dtype=torch.float64)
    light = 0.866 * torch.tensor([1.0, -1, 1, -1])
    heavy = torch.tensor([1.5, -0.5, -0.5, -0.5])
    expected = ((light + 3 * heavy) / 4).double()
    (got,) = forms["gdpo x3"](rewards, 0.0, None)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    heavier, heavy = (forms[name](rewards, 2.0, None) for name in ("rvpo x10", "rvpo x3"))
    assert (heavier - heavy).abs().min() > 1e-3


def test_weights_of_channels_that_hardly_vary(monkeypatch):
    rewards = torch.zeros(30, 2, 3)
    rewards[:, 0, 0] = 1
    rewards[0, 0, 1] = 1
    assert others.density(rewards).tolist() == [1, 5, 1]
    forms = others.forms([toy.reward("safe"), toy.reward("cite")])
    monkeypatch.setattr(rvpo, "AGGREGATIONS", rvpo.AGGREGATIONS | forms)
    dropped = rvpo.advantages(torch.tensor(FOUR, dtype=torch.float64), "gd2po", 0.0)[0, 2]
    assert dropped.abs() < 1e-12


def test_what_is_beyond_full_is_not_paid(monkeypatch):
    """Nor does a group teach in which nothing else varies. Scale and bounds of a channel do not
    matter."""
    channels = [
        toy.reward("safe"),
        toy.reward("please", 1 / 3, scale=10.0),
        toy.reward("cite", 0.0),
    ]
    raw = torch.tensor(
        [[0.5, 0, 0], [1, 10 / 6, 0.5], [1, 10 / 3, 1], [0, 10, 0]], dtype=torch.float64
    )
    expected = torch.tensor([[0.5, 0, 1], [1, 0.5, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(others.satisfaction(channels, raw), expected)
    more_of_it = torch.tensor(
        [[1, 10 / 3, 0], [1, 10, 0.5], [1, 10 / 3, 1], [1, 10, 0]], dtype=torch.float64
    )
    batch, forms = torch.stack([raw, more_of_it]), others.forms(channels)
    monkeypatch.setattr(rvpo, "AGGREGATIONS", rvpo.AGGREGATIONS | forms)
    for name in "rvpo gdpo grpo hardmin softmin geometric dara dvao blend".split():
        first, second = rvpo.advantages(batch, f"{name} full", 2.0)
        assert first.abs().min() > 1e-3 and second.abs().max() < 1e-9, name
    for name, exact in (
        ("softmin", rvpo.AGGREGATIONS["softmin"](expected[None], 2.0, None)),
        ("rvpo", rvpo.AGGREGATIONS["rvpo"](expected[None], 2.0, None)),
        ("geometric", others.geometric(expected[None])),
    ):
        torch.testing.assert_close(forms[f"{name} full"](raw[None], 2.0, None), exact)


def test_a_run_that_is_in_the_file_is_not_run_again(tmp_path, monkeypatch):
    """Of real runs: a longer one begins as the shorter one, and stands for it."""
    monkeypatch.setattr(study, "STEPS", 2)
    monkeypatch.setattr(study, "EVERY", 1)
    monkeypatch.setattr(rvpo, "AGGREGATIONS", dict(rvpo.AGGREGATIONS))
    monkeypatch.setattr(study, "warm_start", lambda key: (key, toy.make_policy(3).state_dict()))
    monkeypatch.setattr(study, "get_context", lambda kind: multiprocessing.dummy)
    monkeypatch.setattr(study, "STARTS", {})
    file = tmp_path / "more.jsonl"
    long = study.Run("conflict", "rvpo full", 0, 1e-3, times=more.LONG)
    short, done = long._replace(times=1), {}
    study.execute([long, long], done, file, ("eval",))
    assert [*done] == [long]
    assert done[long]["eval"] == study.load(file)[long]["eval"]
    assert len(done[long]["eval"]["joint"]) == 7
    alone = study.result(short)
    assert study.rounded(alone["eval"]) == more.find(study.load(file), short)["eval"]
    assert study.rounded(1 / 3) == 0.3333
    done = study.load(file)
    assert done[long]["full"]["please"] < 1 / 3
    study.execute([short], done, file)
    assert study.load(file)[short].keys() == alone.keys()
    monkeypatch.setattr(study, "result", None)  # it is not called
    before = file.read_text()
    study.execute([short, long], study.load(file), file)
    assert file.read_text() == before
    monkeypatch.setattr(more, "stages", lambda done: iter([[short, long]]))
    more.main(file, False)
    assert file.read_text() == before


def test_what_more_has_run_decides_what_it_runs_next(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "get_context", lambda kind: multiprocessing.dummy)
    monkeypatch.setattr(study, "STARTS", {})
    monkeypatch.setattr(study, "warm_start", lambda key: (key, {}))
    full = dict.fromkeys(("safe", "please"), 1.0)

    def result(run):
        curves = {name: [run.lr * 100] * 7 for name in (*full, "joint")}
        return {"eval": curves, "full": full, "credit": [0]}

    def stages(done):
        while todo := more.rate_of(done, "conflict", "rvpo")[1]:
            yield todo

    monkeypatch.setattr(study, "result", result)
    monkeypatch.setattr(more, "stages", stages)
    more.main(tmp_path / "more.jsonl", False)
    done = study.load(tmp_path / "more.jsonl")
    assert more.rate_of(done, "conflict", "rvpo") == (3e-3, [])
    assert len(done) > 3 and "credit" not in next(iter(done.values()))


# Joint success by tuning seed and learning rate.
TUNED = {
    (1000, 3e-4): 0.5,
    (1000, 1e-3): 0.9,
    (1000, 3e-3): 0.75,
    (1001, 1e-3): 0.8,
    (1001, 3e-3): 0.9,
}


def outcome(value: float) -> dict:
    """Of a run that ends with this success in each channel and in all."""
    names = [channel.name for channel in toy.SUITE["conflict"][0]]
    curves = {name: [0.0] * 5 + [value, value] for name in [*names, "joint"]}
    return {"eval": curves, "full": dict.fromkeys(names, 1.0)}


def tune(done: dict) -> tuple[float, list]:
    """Runs what is asked for. Returns the chosen rate, and (seed, rate) of each request."""
    asked = []
    while True:
        rate, todo = more.rate_of(done, "conflict", "rvpo")
        if not todo:
            return rate, asked
        asked.append([(run.seed, run.lr) for run in todo])
        done |= {run: outcome(TUNED[run.seed, run.lr]) for run in todo}


def test_a_rate_that_could_not_win_is_not_run_on_the_second_seed():
    """.9 and .8 make .85; 3e-3 could reach (.75 + 1) / 2 = .875, 3e-4 at most .75."""
    first = [(1000, lr) for lr in more.RATES]
    assert tune({}) == (1e-3, [first, [(1001, 1e-3)], [(1001, 3e-3)]])


def test_tables_of_more(tmp_path):
    """p and Holm's p of eight seeds; the worst of all tasks."""
    done = {}
    tune(done)
    done |= {run._replace(method="rvpo full"): result for run, result in done.items()}
    for seed in range(8):
        done[study.Run("conflict", "rvpo", seed, 1e-3)] = outcome(0.8 + seed / 100)
        done[study.Run("conflict", "rvpo full", seed, 1e-3)] = outcome(0.9 + seed / 100)
    for run, result in done.items():
        study.append(tmp_path / "more.jsonl", run, result)
    lines = more.tables(study.load(tmp_path / "more.jsonl")).splitlines()
    row = next(line for line in lines if line.startswith("| rvpo full"))
    assert row.split(" | ")[1:4] == ["0.001", "8", "0.935 ± 0.024"]
    assert row.endswith("| 8 | -0.100 | 0.0078 | 0.008 |")

    settings = [(task, {}) for task in study.TASKS] + [*more.HARDER.values()]
    for method, value in (("rvpo", 0.8), ("rvpo full", 0.9)):
        for task, change in settings:
            for seed in range(8):
                run = study.Run(task, method, seed, 1e-3, **change)
                done[run] = outcome(value) | {"full": {"safe": 1.0}}
        for task in study.TASKS:
            for seed, lr in TUNED:
                done[study.Run(task, method, seed, lr)] = outcome(0.9 if lr == 1e-3 else 0.1)
    rows = more.overall(done).splitlines()[2:]
    assert rows == [
        "| rvpo | 0.800 | 0.800 | 0.800 | 0.800 | 0.800 | 0.100 |",
        "| rvpo full | 0.900 | 0.800 | 0.900 | 0.900 | 0.800 | 0.000 |",
    ]


def test_a_run_and_the_report(tmp_path, monkeypatch):
    """A real run of four steps, twice the same. Its result stands in for all others in tables."""
    monkeypatch.setattr(study, "STEPS", 4)
    monkeypatch.setattr(study, "EVERY", 2)
    monkeypatch.setattr(study, "TUNING", (1000,))
    monkeypatch.setattr(rvpo, "AGGREGATIONS", dict(rvpo.AGGREGATIONS))  # result() adds to it
    study.STARTS[0, "verbose"] = toy.make_policy(3).state_dict()
    run = study.Run("conflict", "rvpo", 0, 1e-3, channel="safe", wrong=0.5)
    out = study.result(run)
    assert json.dumps(out) == json.dumps(study.result(run)) and out["full"]["please"] < 1 / 3
    assert len(out["eval"]["joint"]) == 3
    assert len(out["grad_norm"]) == 2 and min(out["grad_norm"]) > 0
    assert study.result(run._replace(method="grpo"))["grad_norm"] != out["grad_norm"]
    assert study.result(run._replace(method="centred"))["full"] == out["full"]
    assert study.result(run._replace(wrong=0.0))["weight"]["safe"] != out["weight"]["safe"]

    def stand_in(runs, done, file):
        for one in {run for run in runs if run not in done}:
            channels = [c.name for c in toy.SUITE[one.task][0]]
            value = {"rvpo": 0.9, "gdpo": 0.1 + one.seed / 100}.get(one.method, 0.5) + one.lr
            done[one] = {
                **out,
                "eval": {name: [0.0, value, value] for name in [*channels, "joint"]},
                "full": dict.fromkeys(channels, 1.0),
                "binding": {c: [0.1, 0.2] for c in channels},
                "weight": {c: [0.1, 0.1] for c in channels},
            }
            study.append(file, one, done[one])

    monkeypatch.setattr(study, "execute", stand_in)
    study.main(tmp_path / "out", 40, False)
    text = (tmp_path / "out/study.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| gdpo |")).split(" | ")
    # Seeds 40 to 47: joint .5 to .57 at the best learning rate, 3e-3; rvpo is .366 better in each.
    assert row[1:3] == ["0.003", "0.538 ± 0.024"] and row[6] == "8 of 8"
    assert row[8:10] == ["+0.365", "0.0078"] and row[10] == "0.047 |"
    once = "| x 1 | 0.903 ± 0.000 | 0.538 ± 0.024 | 0.538 ± 0.024 |"
    assert f"{once}\n| x 3 | 0.503 ± 0.000 | 0.503 ± 0.000 |" in text
    seeds = "0.50 0.51 0.52 0.53 0.54 0.55 0.56 0.57"
    means = "0.538 ± 0.024 | 0.538 ± 0.024"
    assert f"| gdpo | {means} | {seeds} | 0.538 ± 0.024 | 0.000 |" in text
    results = (tmp_path / "out/study.jsonl").read_text()
    assert len(results.splitlines()) > 200
    assert (tmp_path / "out/study.png").read_bytes()[:4] == b"\x89PNG"
    study.main(tmp_path / "out", 40, False)  # from the file
    assert (tmp_path / "out/study.jsonl").read_text() == results
    assert (tmp_path / "out/study.md").read_text() == text
    with pytest.raises(SystemExit, match="tuning seed"):
        study.main(tmp_path / "out", 995, False)
