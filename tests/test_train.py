"""The real command, its invariances, its files, and what it says to bad input."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import updates
from conftest import ROOT, on_ranks, set_channels
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Qwen3NextConfig

import policy as policies
import rvpo
import train
import update
from config import TrainConfig, parse
from infra import pretrained, run_directory
from infra.ranks import InputError
from local import hf, models
from policy import pack
from rewards import Channel

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
TIMES = {"seconds", "tokens_per_second"}
# a million parameters, and settings of its size
TINY = [
    "--model",
    str(models.tiny()),
    "--engine",
    "hf",
    "--prompts",
    "2",
    "--group",
    "4",
    "--steps",
    "2",
    "--max-tokens",
    "96",
    "--lr",
    "1e-3",
    "--warmup",
    "0",
    "--eval-prompts",
    "4",
]


def launch(*args, cwd, ranks: int = 1, script: str = "train.py") -> subprocess.CompletedProcess:
    """The command as a user types it, with one thread a rank."""
    launcher = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
    )
    return subprocess.run(
        [*launcher, str(ROOT / script), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


def command(*args, **options) -> str:
    """As launch, and nothing goes wrong."""
    result = launch(*args, **options)
    assert result.returncode == 0 and "Traceback" not in result.stderr, (
        result.stdout[-3000:] + result.stderr[-3000:]
    )
    return result.stdout


def run(monkeypatch, tmp_path, *args, name: str = "a"):
    """train.py in this process. Returns (metrics of the training steps, evaluations, samples, final weights)."""
    monkeypatch.chdir(tmp_path)
    train.main(parse(TrainConfig, "", [*TINY, "--name", name, *map(str, args)]))
    return read(tmp_path / "runs" / name)


def read(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in lines
        if "eval" not in line
    ]
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    return (
        steps,
        [line for line in lines if "eval" in line],
        samples,
        load_file(path / "checkpoint" / "model.safetensors"),
    )


def assert_same(a, b, tolerance: float = 0.0):
    """Two metrics records, key by key; tolerance is relative to max(1, |value|)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], tolerance)
    else:
        assert a == b or abs(a - b) <= tolerance * max(1.0, abs(a)) or (a != a and b != b), (a, b)


# The update: one gradient for any split


@pytest.fixture(scope="module")
def checkpoints(tiny, llama, tmp_path_factory):
    """Policy, reference, another architecture."""
    reference, generator = hf.load(tiny, updates.CPU), torch.Generator().manual_seed(0)
    for parameter in reference.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(path)
    return tiny, path, llama


@pytest.fixture(scope="module")
def one(checkpoints):
    """Every case in this process, unsharded."""
    return {
        case: updates.run(*checkpoints[:2], **changes) for case, changes in updates.CASES.items()
    }


@pytest.fixture(
    scope="module",
    params=[(2, 2), (4, 4), (4, 2)],
    ids=["2 ranks", "4 ranks", "2 nodes of 2 ranks"],
)
def many(request, checkpoints, tmp_path_factory):
    """Every case on several ranks, sharded over those of a node."""
    total, node = request.param
    out = tmp_path_factory.mktemp("ranks") / "out.pt"
    on_ranks(total, node, out, *checkpoints)
    results = torch.load(out, weights_only=False)
    assert (
        results["mesh"]
        == {(2, 2): [0, 1], (4, 4): [0, 1, 2, 3], (4, 2): [[0, 1], [2, 3]]}[request.param]
    )
    return {**results, "node": node, "checkpoint": out.with_suffix("")}


def assert_same_update(a, b, tolerance: float = 1e-5):
    """Relative to the gradient; every rank reports the same."""
    for x, y in zip(a["gradients"], b["gradients"], strict=True):
        assert (x - y).norm() <= tolerance * x.norm()
    for metrics in b["metrics"]:
        assert_same(a["metrics"][0], metrics, tolerance)


def test_micro_batches_and_checkpointing_change_no_gradient_and_no_number(one):
    assert one["whole"]["gradients"][0].norm() > 1e-3 and one["whole"]["metrics"][0]["kl"] > 0
    assert len(one["whole"]["dealt"][0][0]) == 1 and len(one["split"]["dealt"][0][0]) > 10
    assert_same_update(one["whole"], one["split"])
    assert_same_update(one["whole"], one["checkpointing"])


def test_ranks_and_shards_change_no_gradient_and_no_number(one, many):
    """With and without a KL penalty, activations recomputed, idle ranks, several updates, and nothing to learn from in
    an update or in all of them."""
    for case in updates.CASES:
        assert_same_update(one[case], many[case])
        dealt = many[case]["dealt"]
        assert all(
            len({len(rank[u]) for rank in dealt}) == 1 for u in range(len(dealt[0]))
        )  # as many forwards on each rank
    assert any(0 in rank[0] for rank in many["few"]["dealt"])  # a rank was idle
    assert (
        many["nothing"]["dealt"] == [[[0]]] * len(many["nothing"]["dealt"])
        and not many["nothing"]["gradients"][0].any()
    )


def test_several_updates_a_batch_clip(one):
    """With five updates the later ones are off-policy: the ratio leaves 1."""
    assert (
        one["several"]["metrics"][0]["clip_fraction"] > 0 and len(one["several"]["gradients"]) == 5
    )


def test_each_rank_holds_its_shard_of_the_checkpoint(many):
    """And no more in memory; gathered, the shards are the checkpoint, tied names included."""
    for path, shards in many["shards"].items():
        lm = hf.load(path, updates.CPU)
        total = sum(p.numel() for p in lm.parameters())
        padding = sum(p[0].numel() for p in lm.parameters())  # at most a row of each
        for node in range(0, len(shards), many["node"]):
            assert sum(numel for numel, _ in shards[node : node + many["node"]]) == total
        assert all(
            numel * 4 <= size <= 4 * (total / many["node"] + padding) for numel, size in shards
        )
        expected = dict(lm.named_parameters(remove_duplicate=False))
        assert many["weights"][path].keys() == expected.keys()
        assert all(torch.equal(many["weights"][path][name], expected[name]) for name in expected)


def test_a_checkpoint_saved_by_several_ranks_is_the_policy(many, tiny):
    lm, start = hf.load(many["checkpoint"], updates.CPU), hf.load(tiny, updates.CPU)
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        assert torch.equal(many["saved"][name], parameter)
    assert not torch.equal(lm.lm_head.weight, start.lm_head.weight)
    assert pretrained.load_tokenizer(many["checkpoint"]).chat_template


def test_prompts_without_signal_are_not_computed(tiny, monkeypatch):
    """And the gradient is what it would be had they been; with a KL penalty they have one."""
    policy, computed, gradients = policies.load(tiny, updates.CPU), [], []
    policy.register_forward_hook(
        lambda module, inputs, out: computed[-1].append(inputs[0].tokens[0].tolist())
    )
    groups, dealt, deal = updates.batch_of(5, 4, silent=(0, 3)), [], update.deal
    monkeypatch.setattr(update, "deal", lambda *args: dealt.append(deal(*args)) or dealt[-1])

    def step(kl: float) -> None:
        optimizer = updates.Recorder(policy.parameters(), lr=0.0)
        computed.append([])
        update.update(
            update.Learner(policy, None, optimizer, updates.CPU), groups, 1, kl, 1.0, 100_000
        )
        gradients.extend(optimizer.gradients)

    for kl in (0.0, 1e-30):  # no reference either time: only its choice of prompts
        step(kl)
    rows = [
        pack(
            [
                (groups[slot].prompt.ids, [r.tokens for r in groups[slot].responses])
                for slot in kept
            ],
            updates.CPU,
        )
        .tokens[0]
        .tolist()
        for kept in ((1, 2, 4), range(5))
    ]
    assert [sorted(row) for forwards in computed for row in forwards] == [
        sorted(row) for row in rows
    ]  # the groups' order is free
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[1].norm()
    for group in groups:
        group.advantages = torch.zeros(4)
    step(0.0)
    assert dealt[-1] == [[[]]] and computed[-1] == [[0]]  # one token, for a gradient of 0
    assert (gradients[-1] == 0).all()


# The command


def test_same_command_same_run_on_one_and_two_ranks(tmp_path):
    """Three prompts a step on two ranks: no divisibility needed. Rollouts, metrics and weights."""
    args = [*TINY, "--prompts", 3, "--kl", 0.1, "--eval-prompts", 5]
    command(*args, "--name", "one", cwd=tmp_path)
    command(*args, "--name", "again", cwd=tmp_path)
    command(*args, "--name", "two", cwd=tmp_path, ranks=2)
    one, again, two = (read(tmp_path / "runs" / name) for name in ("one", "again", "two"))
    assert one[:3] == again[:3]
    assert all(torch.equal(one[3][key], again[3][key]) for key in one[3])
    assert one[2] == two[2]
    assert_same({"": one[1][0]["eval"]["brief"][0]}, {"": two[1][0]["eval"]["brief"][0]})
    for a, b in zip(one[0], two[0], strict=True):
        assert_same(a, b, 1e-4)


def test_files_of_a_run(monkeypatch, tmp_path, graded):
    steps, evals, samples, weights = run(
        monkeypatch, tmp_path, "--steps", 3, "--eval-every", 2, "--kl", 0.1
    )
    config = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert (
        config["beta"] == "0.5:2"
        and config["versions"]["torch"] == importlib.metadata.version("torch")
        and config["group"] == 4
    )
    assert [line["step"] for line in evals] == [0, 2, 3] and [line["step"] for line in steps] == [
        1,
        2,
        3,
    ]
    assert [line["beta"] for line in steps] == [0.5, 1.25, 2.0]
    assert set(evals[0]["eval"]) == {"vowels", "short", "joint"}
    for line in steps:
        assert line["grad_norm"] > 0 and line["kl"] >= 0 and abs(line["sampler_gap"]) < 1e-3
        assert set(line["channels"]["vowels"]) == {
            "mean",
            "min",
            "max",
            "std",
            "missing",
            "constant",
            "binding",
            "weight",
            "credit",
        }
    assert len(samples) == 3 * 2 * 4
    for sample in samples:
        assert (
            set(sample["rewards"]) == {"vowels", "short"} and sample["prompt"][-1]["role"] == "user"
        )
        assert sample["rewards"]["short"] == 1 / (1 + len(sample["response"]))
    first = [sample["advantage"] for sample in samples if sample["step"] == 1]
    assert abs(sum(first)) < 1e-4 and abs(torch.tensor(first).std() - 1) < 1e-2
    start = load_file(models.tiny() / "model.safetensors")
    assert weights.keys() == start.keys() and all(
        not torch.equal(weights[key], start[key]) for key in weights
    )


def test_plot_of_two_runs(monkeypatch, tmp_path, graded):
    for name in ("a", "b"):
        run(monkeypatch, tmp_path, "--max-tokens", 16, name=name)
    lines = [
        {"step": step, "eval": {"joint": joint}}
        for step, joint in ((0, [0.1, 0.05]), (4, [0.7, None]), (8, [0.7, 0.2]), (9, [0.5, 0.25]))
    ]
    with (tmp_path / "runs/a/metrics.jsonl").open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    head, *rows, last = command(
        "runs/a", "runs/b", "--out", "both.png", cwd=tmp_path, script="tools/plot.py"
    ).splitlines()
    assert head.split() == ["start", "best", "(at", "step)", "final"] and last == "both.png"
    assert [row.split() for row in rows] == [
        ["runs/a", "joint", "0.000", "(0.000)", "0.700", "(0.000)", "4", "0.500", "(0.250)"],
        ["runs/b", "joint", "0.000", "(0.000)", "0.000", "(0.000)", "0", "0.000", "(0.000)"],
    ]
    height, width, _ = plt.imread(tmp_path / "both.png").shape
    assert height > 200 and 1000 < width < 1400  # vowels, short, joint, gradient norm side by side
    (tmp_path / "runs/b/plot.png").mkdir()
    (tmp_path / "runs/a/metrics.jsonl").write_text("")
    for name, message in [
        ("a", "runs/a/metrics.jsonl holds no step and no evaluation yet"),
        ("b", "runs/b/plot.png cannot be written (Is a directory): name another file with --out"),
        (
            "nothere",
            "runs/nothere: no run is there; name the directory of a run of train.py or eval.py, such as runs/NAME",
        ),
    ]:
        result = subprocess.run(
            [sys.executable, ROOT / "tools/plot.py", f"runs/{name}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1 and result.stderr == f"error: {message}\n"


def test_kept_policies_are_those_of_their_steps(monkeypatch, tmp_path, graded):
    """The weights that an evaluation sampled from are those that it keeps; transformers loads them."""
    sampled, evaluate = {}, train.evaluate

    def remember(sampler, held_out, log, step):
        sampled[step] = {
            name: weight.clone() for name, weight in sampler.engine.model.state_dict().items()
        }
        evaluate(sampler, held_out, log, step)

    monkeypatch.setattr(train, "evaluate", remember)
    run(
        monkeypatch,
        tmp_path,
        "--steps",
        3,
        "--eval-every",
        2,
        "--max-tokens",
        16,
        "--keep-policies",
    )
    kept = run_directory.by_step(tmp_path / "runs/a/policies")
    assert [path.name for path in kept] == ["step-0", "step-2", "step-3"] and [*sampled] == [
        0,
        2,
        3,
    ]
    for path, (step, expected) in zip(kept, sampled.items(), strict=True):
        weights = hf.load(path, updates.CPU).state_dict()
        assert weights.keys() == expected.keys() and all(
            torch.equal(weights[name], expected[name]) for name in expected
        ), step
        assert pretrained.load_tokenizer(path).chat_template
    start, last = (
        load_file(models.tiny() / "model.safetensors"),
        load_file(kept[-1] / "model.safetensors"),
    )
    final = load_file(tmp_path / "runs/a/checkpoint/model.safetensors")
    assert all(
        torch.equal(load_file(kept[0] / "model.safetensors")[name], start[name]) for name in start
    )
    assert last.keys() == final.keys() and all(
        torch.equal(last[name], final[name]) for name in final
    )
    assert not torch.equal(sampled[2]["lm_head.weight"], sampled[3]["lm_head.weight"])


OPTIONS = [
    ["--agg", "gdpo"],
    ["--beta", 5],
    ["--group", 5],
    ["--prompts", 3],
    ["--updates", 2],
    ["--weights", "vowels=3"],
    ["--weights", "short=0"],
    ["--kl", 1],
    ["--temperature", 0.8],
    ["--max-tokens", 16],
    ["--steps", 1],
    ["--lr", 1e-4],
    ["--warmup", 3],
    ["--lr-schedule", "linear"],
    ["--seed", 1],
]


def test_every_option_changes_the_policy(monkeypatch, tmp_path, graded):
    short = ["--max-tokens", 24]
    _, _, _, plain = run(monkeypatch, tmp_path, *short, name="plain")
    for number, option in enumerate(OPTIONS):
        *_, weights = run(monkeypatch, tmp_path, *short, *option, name=str(number))
        assert any(not torch.equal(plain[key], weights[key]) for key in plain), option
    for agg in ("grpo", "explicit", "hardmin"):
        *_, weights = run(monkeypatch, tmp_path, *short, "--agg", agg, name=agg)
        assert any(not torch.equal(plain[key], weights[key]) for key in plain), agg


def test_the_learning_rate_rises_and_falls(monkeypatch, tmp_path, graded):
    rates = [
        step["lr"]
        for step in run(
            monkeypatch, tmp_path, "--steps", 4, "--warmup", 1, "--lr", 1, "--max-tokens", 4
        )[0]
    ]
    assert rates == [0.5, 1, 1, 1]
    rates = [
        step["lr"]
        for step in run(
            monkeypatch,
            tmp_path,
            "--steps",
            4,
            "--warmup",
            1,
            "--lr",
            1,
            "--max-tokens",
            4,
            "--lr-schedule",
            "linear",
            name="b",
        )[0]
    ]
    assert rates == [0.5, 0.75, 0.5, 0.25]


def test_recomputing_activations_changes_no_weight(monkeypatch, tmp_path, graded):
    *_, plain = run(monkeypatch, tmp_path, "--kl", 0.1, "--max-tokens", 24, name="off")
    *_, recomputed = run(
        monkeypatch,
        tmp_path,
        "--kl",
        0.1,
        "--max-tokens",
        24,
        "--gradient-checkpointing",
        "on",
        name="on",
    )
    assert max((plain[key] - recomputed[key]).abs().max().item() for key in plain) < 1e-6


def test_rewards_that_are_missing_or_never_vary(monkeypatch, tmp_path):
    set_channels(
        monkeypatch,
        [
            Channel("gone", lambda p, responses, ref: [float("nan")] * len(responses)),
            Channel("same", lambda p, responses, ref: [0.5] * len(responses)),
        ],
    )
    start = load_file(models.tiny() / "model.safetensors")
    steps, _, samples, weights = run(monkeypatch, tmp_path, "--steps", 1)
    assert (
        steps[0]["no_signal"] == 1
        and steps[0]["grad_norm"] == 0
        and {s["advantage"] for s in samples} == {0.0}
    )
    assert (
        steps[0]["skipped_prompts"] == 2 and steps[0]["loss"] == 0 and steps[0]["entropy"] is None
    )  # nothing was computed
    # no gradient: what moves the weights is AdamW's decay of 0.01, times the learning rate of 1e-3
    assert max((weights[key] - start[key]).abs().max().item() for key in start) < 1e-4


def test_a_faulty_reward_on_one_rank_stops_all_and_the_state_is_saved(tmp_path):
    """In mid-run, and in one sentence."""
    (tmp_path / "faulty.py").write_text("""
from infra import ranks
from rewards import Channel, Task
from tasks import tools

calls = []

def mine(prompts, responses, references):
    calls.append(1)
    return [None if ranks.RANK == 1 and len(calls) > 6 else len(r) / 100 for r in responses]

def task(options):
    return Task(tools.prompts, [Channel("mine", mine)])
""")
    result = launch(
        *TINY,
        "--name",
        "a",
        "--steps",
        9,
        "--max-tokens",
        16,
        "--task",
        "faulty.py",
        cwd=tmp_path,
        ranks=2,
    )
    assert (
        result.returncode == 1 and "]: Traceback" not in result.stderr
    )  # "[rank0]: Traceback"; torchrun has its own
    steps, _, samples, weights = read(tmp_path / "runs/a")
    assert (
        result.stderr.count(
            "error: reward 'mine' returned None for response 0: return a finite number, or NaN if it is missing; the policy as it "
            f"was then is in runs/a/checkpoint; to go on from step {len(steps)}: python train.py --resume runs/a\n"
        )
        == result.stderr.count("error: ")
        == 1
    )
    start = load_file(models.tiny() / "model.safetensors")
    assert (
        1 <= len(steps) < 9
        and len(samples) == 8 * len(steps)
        and any(not torch.equal(weights[key], start[key]) for key in start)
    )


@needs_vllm
def test_vllm_on_two_ranks_and_its_checkpoint(tmp_path):
    """torchrun, one engine a rank: the same samples as on one rank. Then the checkpoint in a plain vLLM: the same greedy
    text as transformers."""
    args = [*TINY, "--engine", "vllm", "--prompts", 3, "--eval-prompts", 2]
    command(*args, "--name", "two", cwd=tmp_path, ranks=2)
    command(*args, "--name", "one", cwd=tmp_path)
    (steps, _, samples, _), (steps_of_one, _, of_one, _) = (
        read(tmp_path / "runs" / name) for name in ("two", "one")
    )
    assert len(samples) == 2 * 3 * 4 and all(
        line["sampler_gap"] < 1e-3 for line in steps + steps_of_one
    )
    assert samples[:12] == of_one[:12]  # later, rounding has been through AdamW
    assert_same(steps[0], steps_of_one[0], 1e-4)
    checkpoint = tmp_path / "runs/two/checkpoint"
    (tmp_path / "load.py").write_text(
        "import os; os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING='0', VLLM_CPU_KVCACHE_SPACE='1')\n"
        "from vllm import LLM, SamplingParams\n"
        f"llm = LLM(model='{checkpoint}', max_model_len=300, dtype='float32', enforce_eager=True, gpu_memory_utilization=0.3)\n"
        "prompt = {'prompt_token_ids': list(range(40, 200))}\n"
        "print('TOKENS', llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids)\n"
    )
    out = subprocess.run(
        [sys.executable, tmp_path / "load.py"], capture_output=True, text=True, timeout=300
    )
    assert "TOKENS" in out.stdout, out.stderr[-3000:]
    got = json.loads(out.stdout.rpartition("TOKENS ")[2].splitlines()[0])
    policy = hf.load(checkpoint, torch.device("cpu"))
    expected = policy.generate(
        torch.tensor([list(range(40, 200))]), do_sample=False, max_new_tokens=8
    )[0, 160:]
    assert got == expected.tolist()


def test_an_epoch_is_shuffled_once(monkeypatch):
    """And not for each of its prompts, which took seconds a step where there are a million. The numbers are those of earlier runs."""
    expected = [
        int(np.random.default_rng([7, position // 5]).permutation(5)[position % 5])
        for position in range(15)
    ]
    real, made = np.random.default_rng, []
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or real(seed))
    train.shuffled.cache_clear()
    assert [train.prompt_at(position, 5, 7) for position in range(15)] == expected and made == [
        [7, 0],
        [7, 1],
        [7, 2],
    ]


@pytest.mark.parametrize(("name", "engine"), [(str(models.tiny()), "vllm"), ("smollm2", "hf")])
def test_nothing_but_what_is_ours_is_printed(tmp_path, name, engine):
    """Which model is loaded, before the silence; no bars, hints and warnings of other packages."""
    if engine == "vllm":
        importlib.util.find_spec("vllm") or pytest.skip("vLLM is not installed")
    cache = {"XDG_CACHE_HOME": str(tmp_path)} if name == "smollm2" else {}  # it is converted again
    words = [
        "--model",
        name,
        "--engine",
        engine,
        "--task",
        "tools",
        "--limit",
        "1",
        "--max-tokens",
        "1",
    ]
    result = subprocess.run(
        [sys.executable, ROOT / "eval.py", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **cache},
    )
    assert result.returncode == 0 and result.stderr == f"loading {name}\n"


# Bad input: one sentence, before the model is loaded


def nothing_is_loaded(monkeypatch):
    for module in (hf, policies):
        monkeypatch.setattr(
            module, "load", lambda *args, **options: pytest.fail("the model was loaded")
        )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--track", "trackio"], "--track trackio: it is not installed; pip install trackio"),
        (["--task", "x"], "--task x: choose one of tools, reply"),
        (["--agg", "x"], "--agg x: should be 'rvpo', 'gdpo'"),
        (["--engine", "x"], "--engine x: should be 'auto', 'vllm' or 'hf'"),
        (["--beta", "x"], "beta 'x' is neither"),
        (["--group", 1], "--group 1: should be greater than or equal to 2"),
        (["--prompts", 0], "--prompts 0: should be greater than or equal to 1"),
        (["--temperature", 0], "--temperature 0: should be"),
        (["--lr", "nan"], "--lr nan"),
        (["--max-tokens", "many"], "--max-tokens many: should be a whole number"),
        (["--kl", -1], "--kl -1: should be"),
        (["--updates", 3], "--updates 3: at most --prompts"),
        (["--name", "there"], "runs/there exists"),
        (
            ["--name", "a/b"],
            "--name a/b: should be letters, digits, '_', '.' and '-', at most 100, and not begin with '.' or '-'",
        ),
        (["--weights", "tool"], "--weights tool: must be NAME=NUMBER"),
        (
            ["--weights", "tool=1,x=2"],
            "--weights x=2: must be NAME=NUMBER, the number at least 0 and the name one of format, tool",
        ),
        (["--weights", "tool=-1"], "--weights tool=-1"),
        (
            [
                "--weights",
                ",".join(
                    f"{name}=0"
                    for name in "format tool arg_names arg_values no_invented clean brief".split()
                ),
            ],
            "all channels have weight 0",
        ),
        (
            ["--task", "broken.py"],
            "--task broken.py cannot be imported: NameError: name 'x' is not defined",
        ),
        (["--task", "empty.py"], "must return a rewards.Task"),
        (["--data", "x.json"], "the task tools does not use it"),
        (["--task", "rlla", "--data", "x.json"], "x.json cannot be read"),
        (["--task", "rlla", "--data", "bad.json"], "row 1 has no prompt"),
        (["--model", "./x"], "--model ./x: no such file"),
        (["--model", "nothing"], "--model nothing: no such file"),
        (["--model", "./empty"], "needs a config.json and weights"),
        (["--max-tokens", 4000], "has room for 96"),
        (["--max-tokens", 5000], "no room for a prompt"),
        (["--gpu-memory", 2], "less than or equal to 1"),
        (["--step", 3], "unrecognized arguments: --step"),
        (["--steps", "1e3"], "--steps 1e3: should be a whole number"),
        (["--lr", "x"], "--lr x: should be a number"),
        (["--keep-policies", "x"], "--keep-policies x: should be true or false"),
        (["--agg", "explicit", "--beta", "inf"], "finite beta"),
        (["--model", "./json"], "./json cannot be loaded"),
        (["--model", "./cut"], "./cut cannot be loaded"),
        (["--model", "./wordless"], "is its tokenizer.json missing?"),
        (["--task", "rlla", "--data", "odd.json"], "chat template"),
        (
            ["--task", "rlla", "--data", "good.json", "--eval-data", "none.json"],
            "no rows to evaluate on",
        ),
        (["--seed", -1], "--seed -1"),
        (["--steps", 0], "--steps 0: should be"),
        (
            ["--gradient-checkpointing", "maybe"],
            "--gradient-checkpointing maybe: should be 'auto', 'on' or 'off'",
        ),
        (["--model", "./capped"], "--model ./capped: training gemma2 models is not supported"),
        (["--model", "./linear"], "--model ./linear: training qwen3_next models is not supported"),
        (
            ["--model", "./stretched"],
            "--model ./stretched: training with dynamic position embeddings is not supported",
        ),
        (["--agg", "gdpo", "--beta", 2], "--beta 2: --agg gdpo has no beta; leave it out"),
        (["--agg", "grpo", "--beta", "0.5:2"], "--agg grpo has no beta"),
        (["--agg", "hardmin", "--beta", 0], "--agg hardmin has no beta"),
        (["--task", "mising.py"], "--task mising.py: there is no such file"),
        (["--task", "reads.py", "--data", "x.json"], "x.json cannot be read"),
        (
            ["--task", "reads.py", "--eval-data", "x.json"],
            "--eval-data x.json: the task reads.py does not use it; leave it out, or, if its file reads it, say so there: OPTIONS = ('eval_data',)",
        ),
        (
            ["--task", "empty.py", "--judge-model", "m"],
            "--judge-model m: the task empty.py does not use it; leave it out, or",
        ),
        (
            ["--task", "one.py"],
            "--task one.py: training example 1 is a dict: it must be a rewards.Example",
        ),
    ],
)
def test_bad_input(monkeypatch, tmp_path, args, message):
    (tmp_path / "runs/there").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.py").write_text("x")
    (tmp_path / "empty.py").write_text("def task(options): pass")
    (tmp_path / "reads.py").write_text(
        "from tasks import rows\nOPTIONS = 'data'\ndef task(config): rows.read_rows(config.data)"
    )
    (tmp_path / "one.py").write_text(
        "from rewards import Channel, Example, Task\nEXAMPLES = [Example([{'role': 'user', 'content': 'c'}]), {}]\n"
        "def task(options): return Task(lambda n, m: (EXAMPLES, []), [Channel('a', len)])"
    )
    good = {"prompt": [{"role": "user", "content": "u"}], "reward_model": {"ground_truth": "g"}}
    (tmp_path / "bad.json").write_text(json.dumps([good, {}]))
    (tmp_path / "good.json").write_text(json.dumps([good] * 9))
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "odd.json").write_text(
        json.dumps([{**good, "prompt": [{"role": "user", "content": "\ud800"}]}] * 9)
    )
    for broken in ("json", "cut", "wordless", "capped", "linear", "stretched"):
        shutil.copytree(models.tiny(), tmp_path / broken)
    (tmp_path / "json" / "config.json").write_text("no json")
    (tmp_path / "cut" / "model.safetensors").write_bytes(
        (tmp_path / "json" / "model.safetensors").read_bytes()[:1000]
    )
    (tmp_path / "wordless" / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "stretched/config.json").read_text())
    (tmp_path / "stretched/config.json").write_text(
        json.dumps(
            {
                **config,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            }
        )
    )
    Gemma2Config().save_pretrained(tmp_path / "capped")
    Qwen3NextConfig().save_pretrained(tmp_path / "linear")
    nothing_is_loaded(monkeypatch)
    with pytest.raises(InputError) as error:
        run(monkeypatch, tmp_path, *args)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs/a").exists()


def test_a_checkpoint_without_some_weights(monkeypatch, tmp_path):
    """transformers would train with random ones in their place."""
    shutil.copytree(models.tiny(), tmp_path / "holes")
    weights = load_file(tmp_path / "holes/model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "layers.3" not in key},
        tmp_path / "holes/model.safetensors",
    )
    with pytest.raises(
        InputError, match="lacks weights that its config.json asks for, model.layers.3"
    ):
        run(monkeypatch, tmp_path, "--model", "./holes")
    with pytest.raises(
        InputError, match="lacks weights that its config.json asks for, model.layers.3"
    ):
        hf.load(tmp_path / "holes", updates.CPU)  # what evaluation loads


def test_runs_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="runs/a"):
        run(monkeypatch, tmp_path)


def test_a_bad_reward_is_found_before_the_model_is_loaded(monkeypatch, tmp_path):
    nothing_is_loaded(monkeypatch)
    set_channels(monkeypatch, [Channel("mine", lambda p, r, ref: [None] * len(r))])
    with pytest.raises(InputError, match="reward 'mine' returned None"):
        run(monkeypatch, tmp_path)


def test_vllm_missing_when_asked_for(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a)
    )
    with pytest.raises(
        InputError,
        match="--engine vllm: vLLM is not installed; pip install -r requirements.txt, or --engine hf",
    ):
        run(monkeypatch, tmp_path, "--engine", "vllm")
    assert (
        parse(TrainConfig, "", ["--resume", "runs/a"]).resume == "runs/a"
    )  # which may have another engine


def test_aggregations_are_those_of_the_method():
    assert TrainConfig.model_fields["agg"].annotation.__args__ == (*rvpo.AGGREGATIONS,)


SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "study", "tools")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(tmp_path, script):
    """A bare % in one option's text once ended in a traceback, because nobody had typed this."""
    assert command("--help", cwd=tmp_path, script=script).startswith("usage: ")


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_and_wrong_options_do_not_wait_for_torch(tmp_path, script):
    for args, said in (
        (["--help"], "usage: "),
        (["--task", "x"], "error: --task x: choose one of tools, reply"),
    ):
        code = (
            f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r})\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end: print(end, file=sys.stderr)\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, ROOT / script, *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0 and (result.stdout + result.stderr).startswith(said), (
            result.stderr
        )


def test_an_error_is_one_line_and_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", "--task", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and result.stderr == (
        "error: --task x: choose one of tools, reply, reply-25, reply-capped, rlla, rar-medicine, rar-science, rubric, healthbench, gpqa, bfcl, "
        "or name a file such as mine.py\n"
    )
