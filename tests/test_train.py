"""The real command, its invariances, its files, and what it says to bad input."""

import importlib.metadata
import importlib.util
import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import updates
from conftest import (
    ROOT,
    constant,
    missing,
    needs_vllm,
    nothing_is_loaded,
    on_ranks,
    set_channels,
)
from programs import TINY, command, difference, launch, python, read, run, same_weights
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


def assert_same(a, b, tolerance: float = 0.0):
    """Two numbers, or two records key by key; tolerance is relative to max(1, |value|)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], tolerance)
    else:
        both_nan = a != a and b != b
        assert a == b or both_nan or abs(a - b) <= tolerance * max(1.0, abs(a)), (a, b)


# The update: one gradient for any split


@pytest.fixture(scope="module")
def checkpoints(tiny, llama, tmp_path_factory):
    """Policy, reference, another architecture."""
    reference = hf.load(tiny, updates.CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in reference.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(path)
    return tiny, path, llama


@pytest.fixture(scope="module")
def one(checkpoints):
    """Every case in this process, unsharded."""
    policy, reference, _ = checkpoints
    results = {}
    for case, changes in updates.CASES.items():
        results[case] = updates.run(policy, reference, **changes)
    return results


@pytest.fixture(
    scope="module",
    params=[(2, 2, [0, 1]), (4, 4, [0, 1, 2, 3]), (4, 2, [[0, 1], [2, 3]])],
    ids=["2 ranks", "4 ranks", "2 nodes of 2 ranks"],
)
def many(request, checkpoints, tmp_path_factory):
    """Every case on several ranks, sharded over the ranks of a node."""
    total, node, mesh = request.param
    out = tmp_path_factory.mktemp("ranks") / "out.pt"
    on_ranks(total, node, out, *checkpoints)
    results = torch.load(out, weights_only=False)
    assert results["mesh"] == mesh
    return {**results, "node": node, "checkpoint": out.with_suffix("")}


def assert_same_update(a, b, tolerance: float = 1e-5):
    """Relative to the gradient; every rank reports the same."""
    for x, y in zip(a["gradients"], b["gradients"], strict=True):
        assert (x - y).norm() <= tolerance * x.norm()
    for metrics in b["metrics"]:
        assert_same(a["metrics"][0], metrics, tolerance)


def test_micro_batches_and_checkpointing_change_no_gradient_and_no_number(one):
    whole = one["whole"]
    assert whole["gradients"][0].norm() > 1e-3
    assert whole["metrics"][0]["kl"] > 0
    assert len(whole["dealt"][0][0]) == 1
    assert len(one["split"]["dealt"][0][0]) > 10
    assert_same_update(whole, one["split"])
    assert_same_update(whole, one["checkpointing"])


def test_ranks_and_shards_change_no_gradient_and_no_number(one, many):
    """With and without a KL penalty, activations recomputed, idle ranks, several updates, and
    nothing to learn from in an update or in all of them."""
    for case in updates.CASES:
        assert_same_update(one[case], many[case])
        for of_ranks in zip(*many[case]["dealt"], strict=True):  # an update's micro-batches
            forwards = {len(micro_batches) for micro_batches in of_ranks}
            assert len(forwards) == 1  # as many on each rank
    assert any(0 in of_rank[0] for of_rank in many["few"]["dealt"])  # a rank was idle
    nothing = many["nothing"]
    assert nothing["dealt"] == [[[0]]] * len(nothing["dealt"])
    assert not nothing["gradients"][0].any()


def test_several_updates_a_batch_clip(one):
    """With five updates the later ones are off-policy: the ratio leaves 1."""
    assert one["several"]["metrics"][0]["clip_fraction"] > 0
    assert len(one["several"]["gradients"]) == 5


def test_each_rank_holds_its_shard_of_the_checkpoint(many):
    """And no more in memory; gathered, the shards are the checkpoint, tied names included."""
    for path, shards in many["shards"].items():
        lm = hf.load(path, updates.CPU)
        total = sum(p.numel() for p in lm.parameters())
        padding = sum(p[0].numel() for p in lm.parameters())  # at most a row of each
        for first in range(0, len(shards), many["node"]):
            of_node = shards[first : first + many["node"]]
            assert sum(numel for numel, _ in of_node) == total
        for numel, size in shards:
            assert numel * 4 <= size <= 4 * (total / many["node"] + padding)
        expected = dict(lm.named_parameters(remove_duplicate=False))
        assert same_weights(many["weights"][path], expected)


def test_a_checkpoint_saved_by_several_ranks_is_the_policy(many, tiny):
    lm = hf.load(many["checkpoint"], updates.CPU)
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        assert torch.equal(many["saved"][name], parameter)
    start = hf.load(tiny, updates.CPU)
    assert not torch.equal(lm.lm_head.weight, start.lm_head.weight)
    assert pretrained.load_tokenizer(many["checkpoint"]).chat_template


def test_prompts_without_signal_are_not_computed(tiny, monkeypatch):
    """And the gradient is what it would be had they been; with a KL penalty they have one."""
    policy = policies.load(tiny, updates.CPU)
    groups = updates.batch_of(5, 4, silent=(0, 3))
    computed, dealt = [], []
    real = update.deal

    def see(module, inputs, out):
        computed.append(inputs[0].tokens[0].tolist())

    def noting(*args):
        dealt.append(real(*args))
        return dealt[-1]

    policy.register_forward_hook(see)
    monkeypatch.setattr(update, "deal", noting)

    def step(kl: float) -> tuple[list[int], torch.Tensor]:
        """The tokens of its one forward, and its gradient."""
        optimizer = updates.Recorder(policy.parameters(), lr=0.0)
        learner = update.Learner(policy, None, optimizer, updates.CPU)
        computed.clear()
        update.update(learner, groups, 1, kl, 1.0, 100_000)
        (tokens,) = computed
        (gradient,) = optimizer.gradients
        return tokens, gradient

    # No reference either time: the penalty only decides which prompts are computed.
    tokens, gradient = step(kl=0.0)
    all_tokens, all_gradient = step(kl=1e-30)
    assert sorted(tokens) == sorted(tokens_of(groups, [1, 2, 4]))  # the groups' order is free
    assert sorted(all_tokens) == sorted(tokens_of(groups, range(5)))
    assert (gradient - all_gradient).norm() <= 1e-6 * all_gradient.norm()

    for group in groups:
        group.advantages = torch.zeros(4)
    tokens, gradient = step(kl=0.0)
    assert dealt[-1] == [[[]]] and tokens == [0]  # one token, for a gradient of 0
    assert (gradient == 0).all()


def tokens_of(groups, slots) -> list[int]:
    sequences = []
    for slot in slots:
        responses = [response.tokens for response in groups[slot].responses]
        sequences.append((groups[slot].prompt.ids, responses))
    return pack(sequences, updates.CPU).tokens[0].tolist()


# The command


def test_same_command_same_run_on_one_and_two_ranks(tmp_path):
    """Three prompts a step on two ranks: no divisibility needed. Rollouts, metrics and weights."""
    words = [*TINY, "--prompts 3 --kl 0.1 --eval-prompts 5"]
    command(*words, "--name one", cwd=tmp_path)
    command(*words, "--name again", cwd=tmp_path)
    command(*words, "--name two", cwd=tmp_path, ranks=2)
    one, again, two = (read(tmp_path / "runs" / name) for name in ("one", "again", "two"))
    assert one[:3] == again[:3]
    assert same_weights(one.weights, again.weights)
    assert one.samples == two.samples
    brief, brief_of_two = (r.evaluations[0]["eval"]["brief"] for r in (one, two))
    assert_same(brief[0], brief_of_two[0])
    for a, b in zip(one.steps, two.steps, strict=True):
        assert_same(a, b, 1e-4)


def test_files_of_a_run(monkeypatch, tmp_path, graded):
    words = "--steps 3 --eval-every 2 --kl 0.1"
    steps, evaluations, samples, weights = run(monkeypatch, tmp_path, words)
    config = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert config["beta"] == "0.5:2" and config["group"] == 4
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["beta"] for line in steps] == [0.5, 1.25, 2.0]
    assert set(evaluations[0]["eval"]) == {"vowels", "short", "joint"}
    statistics = "mean min max std missing constant binding weight credit"
    for line in steps:
        assert line["grad_norm"] > 0 and line["kl"] >= 0
        assert abs(line["sampler_gap"]) < 1e-3
        assert set(line["channels"]["vowels"]) == set(statistics.split())
    assert len(samples) == 3 * 2 * 4
    for sample in samples:
        assert set(sample["rewards"]) == {"vowels", "short"}
        assert sample["prompt"][-1]["role"] == "user"
        assert sample["rewards"]["short"] == 1 / (1 + len(sample["response"]))
    first = [sample["advantage"] for sample in samples if sample["step"] == 1]
    assert abs(sum(first)) < 1e-4
    assert abs(torch.tensor(first).std() - 1) < 1e-2
    start = start_weights()
    assert weights.keys() == start.keys()
    assert not any(torch.equal(weights[name], start[name]) for name in weights)


def start_weights() -> dict[str, torch.Tensor]:
    return load_file(models.tiny() / "model.safetensors")


def test_plot_of_two_runs(monkeypatch, tmp_path, graded):
    for name in ("a", "b"):
        run(monkeypatch, tmp_path, "--max-tokens 16", name=name)
    joints = {0: [0.1, 0.05], 4: [0.7, None], 8: [0.7, 0.2], 9: [0.5, 0.25]}
    with (tmp_path / "runs/a/metrics.jsonl").open("a") as out:
        for step, joint in joints.items():
            out.write(json.dumps({"step": step, "eval": {"joint": joint}}) + "\n")
    words = "runs/a runs/b --out both.png"
    head, *rows, last = command(words, cwd=tmp_path, script="tools/plot.py").splitlines()
    assert head.split() == ["start", "best", "(at", "step)", "final"] and last == "both.png"
    assert [row.split() for row in rows] == [
        ["runs/a", "joint", "0.000", "(0.000)", "0.700", "(0.000)", "4", "0.500", "(0.250)"],
        ["runs/b", "joint", "0.000", "(0.000)", "0.000", "(0.000)", "0", "0.000", "(0.000)"],
    ]
    height, width, _ = plt.imread(tmp_path / "both.png").shape
    assert height > 200 and 1000 < width < 1400  # vowels, short, joint, gradient norm side by side

    (tmp_path / "runs/b/plot.png").mkdir()
    (tmp_path / "runs/a/metrics.jsonl").write_text("")
    for name, message in (
        ("a", "runs/a/metrics.jsonl holds no step and no evaluation yet"),
        ("b", "runs/b/plot.png cannot be written (Is a directory): name another file with --out"),
        (
            "nothere",
            "runs/nothere: no run is there; "
            "name the directory of a run of train.py or eval.py, such as runs/NAME",
        ),
    ):
        result = launch(f"runs/{name}", cwd=tmp_path, script="tools/plot.py")
        assert result.returncode == 1 and result.stderr == f"error: {message}\n"


def test_kept_policies_are_those_of_their_steps(monkeypatch, tmp_path, graded):
    """The weights that an evaluation sampled from are those that it keeps; transformers loads
    them."""
    sampled = {}
    real = train.evaluate

    def remember(sampler, held_out, log, step):
        weights = sampler.engine.model.state_dict()
        sampled[step] = {name: weight.clone() for name, weight in weights.items()}
        real(sampler, held_out, log, step)

    monkeypatch.setattr(train, "evaluate", remember)
    words = "--steps 3 --eval-every 2 --max-tokens 16 --keep-policies"
    _, _, _, final = run(monkeypatch, tmp_path, words)
    kept = run_directory.by_step(tmp_path / "runs/a/policies")
    assert [path.name for path in kept] == ["step-0", "step-2", "step-3"]
    assert [*sampled] == [0, 2, 3]
    for path, expected in zip(kept, sampled.values(), strict=True):
        assert same_weights(hf.load(path, updates.CPU).state_dict(), expected), path
        assert pretrained.load_tokenizer(path).chat_template
    first, _, last = (load_file(path / "model.safetensors") for path in kept)
    assert same_weights(first, start_weights())
    assert same_weights(last, final)
    assert not torch.equal(sampled[2]["lm_head.weight"], sampled[3]["lm_head.weight"])


OPTIONS = (
    "--agg gdpo",
    "--beta 5",
    "--group 5",
    "--prompts 3",
    "--updates 2",
    "--weights vowels=3",
    "--weights short=0",
    "--kl 1",
    "--temperature 0.8",
    "--max-tokens 16",
    "--steps 1",
    "--lr 1e-4",
    "--warmup 3",
    "--lr-schedule linear",
    "--seed 1",
    "--agg grpo",
    "--agg explicit",
    "--agg hardmin",
)


def test_every_option_changes_the_policy(monkeypatch, tmp_path, graded):
    short = "--max-tokens 24"
    plain = run(monkeypatch, tmp_path, short, name="plain")
    for number, option in enumerate(OPTIONS):
        changed = run(monkeypatch, tmp_path, short, option, name=str(number))
        assert not same_weights(plain.weights, changed.weights), option


def test_the_learning_rate_rises_and_falls(monkeypatch, tmp_path, graded):
    words = "--steps 4 --warmup 1 --lr 1 --max-tokens 4"
    level = run(monkeypatch, tmp_path, words)
    falling = run(monkeypatch, tmp_path, words, "--lr-schedule linear", name="b")
    assert [line["lr"] for line in level.steps] == [0.5, 1, 1, 1]
    assert [line["lr"] for line in falling.steps] == [0.5, 0.75, 0.5, 0.25]


def test_recomputing_activations_changes_no_weight(monkeypatch, tmp_path, graded):
    words = "--kl 0.1 --max-tokens 24"
    plain = run(monkeypatch, tmp_path, words, name="off")
    recomputed = run(monkeypatch, tmp_path, words, "--gradient-checkpointing on", name="on")
    assert difference(plain.weights, recomputed.weights) < 1e-6


def test_rewards_that_are_missing_or_never_vary(monkeypatch, tmp_path):
    set_channels(monkeypatch, [Channel("gone", missing), Channel("same", constant)])
    (step,), _, samples, weights = run(monkeypatch, tmp_path, "--steps 1")
    assert step["no_signal"] == 1 and step["grad_norm"] == 0
    assert {sample["advantage"] for sample in samples} == {0.0}
    # Nothing was computed.
    assert step["skipped_prompts"] == 2
    assert step["loss"] == 0 and step["entropy"] is None
    # No gradient: the weights move by AdamW's decay of 0.01 times the learning rate of 1e-3.
    assert difference(weights, start_weights()) < 1e-4


FAULTY = """
from infra import ranks
from rewards import Channel, Task
from tasks import tools

calls = []

def mine(prompts, responses, references):
    calls.append(1)
    return [None if ranks.RANK == 1 and len(calls) > 6 else len(r) / 100 for r in responses]

def task(options):
    return Task(tools.prompts, [Channel("mine", mine)])
"""


def test_a_faulty_reward_on_one_rank_stops_all_and_the_state_is_saved(tmp_path):
    """In mid-run, and in one sentence."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    words = "--name a --steps 9 --max-tokens 16 --task faulty.py"
    result = launch(*TINY, words, cwd=tmp_path, ranks=2)
    assert result.returncode == 1
    assert "]: Traceback" not in result.stderr  # "[rank0]: Traceback"; torchrun has its own
    steps, _, samples, weights = read(tmp_path / "runs/a")
    message = (
        "error: reward 'mine' returned None for response 0: return a finite number, or NaN if it "
        "is missing; the policy as it was then is in runs/a/checkpoint; "
        f"to go on from step {len(steps)}: python train.py --resume runs/a\n"
    )
    assert result.stderr.count(message) == result.stderr.count("error: ") == 1
    assert 1 <= len(steps) < 9 and len(samples) == 8 * len(steps)
    assert not same_weights(weights, start_weights())


LOAD_IN_VLLM = """
import os
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import sys
from vllm import LLM, SamplingParams

llm = LLM(
    model=sys.argv[1],
    max_model_len=300,
    dtype="float32",
    enforce_eager=True,
    gpu_memory_utilization=0.3,
)
prompt = {"prompt_token_ids": list(range(40, 200))}
(answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8))
print("TOKENS", answer.outputs[0].token_ids)
"""


@needs_vllm
def test_vllm_on_two_ranks_and_its_checkpoint(tmp_path):
    """torchrun, one engine a rank: the same samples as on one rank. Then the checkpoint in a plain
    vLLM: the same greedy text as transformers."""
    words = [*TINY, "--engine vllm --prompts 3 --eval-prompts 2"]
    command(*words, "--name two", cwd=tmp_path, ranks=2)
    command(*words, "--name one", cwd=tmp_path)
    two, one = (read(tmp_path / "runs" / name) for name in ("two", "one"))
    assert len(two.samples) == 2 * 3 * 4
    assert all(line["sampler_gap"] < 1e-3 for line in two.steps + one.steps)
    assert two.samples[:12] == one.samples[:12]  # later, rounding has been through AdamW
    assert_same(two.steps[0], one.steps[0], 1e-4)

    checkpoint = tmp_path / "runs/two/checkpoint"
    (tmp_path / "load.py").write_text(LOAD_IN_VLLM)
    result = python(tmp_path / "load.py", checkpoint)
    assert "TOKENS" in result.stdout, result.stderr[-3000:]
    _, _, end = result.stdout.rpartition("TOKENS ")
    policy = hf.load(checkpoint, torch.device("cpu"))
    prompt = torch.tensor([[*range(40, 200)]])
    expected = policy.generate(prompt, do_sample=False, max_new_tokens=8)[0, 160:]
    assert json.loads(end.splitlines()[0]) == expected.tolist()


def test_an_epoch_is_shuffled_once(monkeypatch):
    """And not for each of its prompts, which took seconds a step where there are a million. The
    numbers are those of earlier runs."""
    real = np.random.default_rng
    expected = []
    for epoch in range(3):
        expected += real([7, epoch]).permutation(5).tolist()
    seeds = []

    def noting(seed):
        seeds.append(seed)
        return real(seed)

    monkeypatch.setattr(np.random, "default_rng", noting)
    train.shuffled.cache_clear()
    assert [train.prompt_at(position, 5, 7) for position in range(15)] == expected
    assert seeds == [[7, 0], [7, 1], [7, 2]]


@pytest.mark.parametrize(
    ("name", "engine"), [pytest.param("tiny", "vllm", marks=needs_vllm), ("smollm2", "hf")]
)
def test_nothing_but_what_is_ours_is_printed(monkeypatch, tiny, tmp_path, name, engine):
    """Which model is loaded, before the silence; no bars, hints and warnings of other packages."""
    model = tiny if name == "tiny" else name
    if name == "smollm2":  # it is converted again
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = f"--engine {engine} --task tools --limit 1 --max-tokens 1"
    result = launch("--model", model, words, cwd=tmp_path, script="eval.py")
    assert result.returncode == 0 and result.stderr == f"loading {model}\n"


# Bad input: one sentence, before the model is loaded


NO_WEIGHTS = "format=0,tool=0,arg_names=0,arg_values=0,no_invented=0,clean=0,brief=0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--track trackio", "--track trackio: it is not installed; pip install trackio"),
        ("--task x", "--task x: choose one of tools, reply"),
        ("--agg x", "--agg x: should be 'rvpo', 'gdpo'"),
        ("--engine x", "--engine x: should be 'auto', 'vllm' or 'hf'"),
        ("--beta x", "beta 'x' is neither"),
        ("--group 1", "--group 1: should be greater than or equal to 2"),
        ("--prompts 0", "--prompts 0: should be greater than or equal to 1"),
        ("--temperature 0", "--temperature 0: should be"),
        ("--lr nan", "--lr nan"),
        ("--max-tokens many", "--max-tokens many: should be a whole number"),
        ("--kl -1", "--kl -1: should be"),
        ("--updates 3", "--updates 3: at most --prompts"),
        ("--name there", "runs/there exists"),
        (
            "--name a/b",
            "--name a/b: should be letters, digits, '_', '.' and '-', at most 100, "
            "and not begin with '.' or '-'",
        ),
        ("--weights tool", "--weights tool: must be NAME=NUMBER"),
        (
            "--weights tool=1,x=2",
            "--weights x=2: must be NAME=NUMBER, the number at least 0 and the name one of format, "
            "tool",
        ),
        ("--weights tool=-1", "--weights tool=-1"),
        (f"--weights {NO_WEIGHTS}", "all channels have weight 0"),
        (
            "--task broken.py",
            "--task broken.py cannot be imported: NameError: name 'x' is not defined",
        ),
        ("--task empty.py", "must return a rewards.Task"),
        ("--data x.json", "the task tools does not use it"),
        ("--task rlla --data x.json", "x.json cannot be read"),
        ("--task rlla --data bad.json", "row 1 has no prompt"),
        ("--model ./x", "--model ./x: no such file"),
        ("--model nothing", "--model nothing: no such file"),
        ("--model ./empty", "needs a config.json and weights"),
        ("--max-tokens 4000", "has room for 96"),
        ("--max-tokens 5000", "no room for a prompt"),
        ("--gpu-memory 2", "less than or equal to 1"),
        ("--step 3", "unrecognized arguments: --step"),
        ("--steps 1e3", "--steps 1e3: should be a whole number"),
        ("--lr x", "--lr x: should be a number"),
        ("--keep-policies x", "--keep-policies x: should be true or false"),
        ("--agg explicit --beta inf", "finite beta"),
        ("--model ./json", "./json cannot be loaded"),
        ("--model ./cut", "./cut cannot be loaded"),
        ("--model ./wordless", "is its tokenizer.json missing?"),
        ("--task rlla --data odd.json", "chat template"),
        ("--task rlla --data good.json --eval-data none.json", "no rows to evaluate on"),
        ("--seed -1", "--seed -1"),
        ("--steps 0", "--steps 0: should be"),
        (
            "--gradient-checkpointing maybe",
            "--gradient-checkpointing maybe: should be 'auto', 'on' or 'off'",
        ),
        ("--model ./capped", "--model ./capped: training gemma2 models is not supported"),
        ("--model ./linear", "--model ./linear: training qwen3_next models is not supported"),
        (
            "--model ./stretched",
            "--model ./stretched: training with dynamic position embeddings is not supported",
        ),
        ("--agg gdpo --beta 2", "--beta 2: --agg gdpo has no beta; leave it out"),
        ("--agg grpo --beta 0.5:2", "--agg grpo has no beta"),
        ("--agg hardmin --beta 0", "--agg hardmin has no beta"),
        ("--task mising.py", "--task mising.py: there is no such file"),
        ("--task reads.py --data x.json", "x.json cannot be read"),
        (
            "--task reads.py --eval-data x.json",
            "--eval-data x.json: the task reads.py does not use it; leave it out, or, if its file "
            "reads it, say so there: OPTIONS = ('eval_data',)",
        ),
        (
            "--task empty.py --judge-model m",
            "--judge-model m: the task empty.py does not use it; leave it out, or",
        ),
        (
            "--task one.py",
            "--task one.py: training example 1 is a dict: it must be a rewards.Example",
        ),
    ],
)
def test_bad_input(monkeypatch, tmp_path, words, message):
    (tmp_path / "runs/there").mkdir(parents=True)
    write_faulty_tasks(tmp_path)
    write_faulty_data(tmp_path)
    write_faulty_models(tmp_path)
    nothing_is_loaded(monkeypatch)
    with pytest.raises(InputError) as error:
        run(monkeypatch, tmp_path, words)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs/a").exists()


READS = """
from tasks import rows
OPTIONS = 'data'
def task(config):
    rows.read_rows(config.data)
"""
NO_EXAMPLE = """
from rewards import Channel, Example, Task
EXAMPLES = [Example([{"role": "user", "content": "c"}]), {}]
def task(options):
    return Task(lambda n, m: (EXAMPLES, []), [Channel("a", len)])
"""


def write_faulty_tasks(folder):
    (folder / "broken.py").write_text("x")
    (folder / "empty.py").write_text("def task(options): pass")
    (folder / "reads.py").write_text(READS)
    (folder / "one.py").write_text(NO_EXAMPLE)


def write_faulty_data(folder):
    def row(content: str) -> dict:
        chat = [{"role": "user", "content": content}]
        return {"prompt": chat, "reward_model": {"ground_truth": "g"}}

    for name, rows in (
        ("bad", [row("u"), {}]),
        ("good", [row("u")] * 9),
        ("none", []),
        ("odd", [row("\ud800")] * 9),
    ):
        (folder / f"{name}.json").write_text(json.dumps(rows))


def write_faulty_models(folder):
    (folder / "empty").mkdir()
    for name in ("json", "cut", "wordless", "capped", "linear", "stretched"):
        shutil.copytree(models.tiny(), folder / name)
    (folder / "json/config.json").write_text("no json")
    weights = (folder / "cut/model.safetensors").read_bytes()
    (folder / "cut/model.safetensors").write_bytes(weights[:1000])
    (folder / "wordless/tokenizer.json").unlink()
    config = json.loads((folder / "stretched/config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "stretched/config.json").write_text(json.dumps(config))
    Gemma2Config().save_pretrained(folder / "capped")
    Qwen3NextConfig().save_pretrained(folder / "linear")


def test_a_checkpoint_without_some_weights(monkeypatch, tmp_path):
    """transformers would train with random ones in their place."""
    shutil.copytree(models.tiny(), tmp_path / "holes")
    file = tmp_path / "holes/model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in weights if "layers.3" not in name}, file)
    message = "lacks weights that its config.json asks for, model.layers.3"
    with pytest.raises(InputError, match=message):
        run(monkeypatch, tmp_path, "--model ./holes")
    with pytest.raises(InputError, match=message):
        hf.load(tmp_path / "holes", updates.CPU)  # what evaluation loads


def test_runs_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="runs/a"):
        run(monkeypatch, tmp_path)


def test_a_bad_reward_is_found_before_the_model_is_loaded(monkeypatch, tmp_path):
    def mine(prompts, responses, references):
        return [None] * len(responses)

    nothing_is_loaded(monkeypatch)
    set_channels(monkeypatch, [Channel("mine", mine)])
    with pytest.raises(InputError, match="reward 'mine' returned None"):
        run(monkeypatch, tmp_path)


def test_vllm_missing_when_asked_for(monkeypatch, tmp_path):
    real = importlib.util.find_spec

    def find_spec(name, *others):
        return None if name == "vllm" else real(name, *others)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    message = (
        "--engine vllm: vLLM is not installed; pip install -r requirements.txt, or --engine hf"
    )
    with pytest.raises(InputError, match=message):
        run(monkeypatch, tmp_path, "--engine vllm")
    resumed = parse(TrainConfig, "", ["--resume", "runs/a"])
    assert resumed.resume == "runs/a"  # which may have another engine


def test_aggregations_are_those_of_the_method():
    assert TrainConfig.model_fields["agg"].annotation.__args__ == (*rvpo.AGGREGATIONS,)


FILES = [*ROOT.glob("*.py"), *ROOT.glob("study/*.py"), *ROOT.glob("tools/*.py")]
SCRIPTS = [file for file in FILES if '__name__ == "__main__"' in file.read_text()]


@pytest.mark.parametrize("script", sorted(str(file.relative_to(ROOT)) for file in SCRIPTS))
def test_help(tmp_path, script):
    """A bare % in one option's text once ended in a traceback, because nobody had typed this."""
    assert command("--help", cwd=tmp_path, script=script).startswith("usage: ")


WITHOUT_TORCH = f"""
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end, file=sys.stderr)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_and_wrong_options_do_not_wait_for_torch(tmp_path, script):
    (tmp_path / "without_torch.py").write_text(WITHOUT_TORCH)
    for words, said in (
        ("--help", "usage: "),
        ("--task x", "error: --task x: choose one of tools, reply"),
    ):
        result = python(tmp_path / "without_torch.py", ROOT / script, words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (result.stdout + result.stderr).startswith(said), result.stderr


def test_an_error_is_one_line_and_no_traceback(tmp_path):
    result = launch("--task x", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == (
        "error: --task x: choose one of tools, reply, reply-25, reply-capped, rlla, rar-medicine, "
        "rar-science, rubric, healthbench, gpqa, bfcl, or name a file such as mine.py\n"
    )
