"""experiments/cost.py: sums by hand, what must hold of any sum, a file's own lengths, errors."""

import json

import pytest
from conftest import ROOT
from programs import launch, python, write_lines

from config import TrainConfig
from experiments import cost, fits, lengths, roofline
from experiments.roofline import Machine
from infra.pretrained import load_tokenizer
from local import models, shapes
from tasks import bfcl, gpqa, healthbench
from tasks.verdicts import judge_prompt
from tools import step


def plans(*names: str) -> dict:
    args = cost.options([])
    return {name: cost.plan(name, lengths.LENGTHS, args) for name in names}


@pytest.fixture(scope="module")
def tool_run() -> cost.Run:
    """tools 1.5B on 8 H100: 100 steps of 512 prompts of 760 tokens, 4 responses of 200 to each,
    4 updates, no recomputation."""
    of_model = plans("tools")["tools"]
    first, *_ = of_model["1.5B"]
    return first


# Of Qwen2.5-1.5B: parameters in matrices (its 2 key-value heads have 128), and in the head.
MATRICES = 28 * (2 * 1536 * (1536 + 256) + 3 * 1536 * 8960)
HEAD = 151_936 * 1536
FLOPS = 989e12  # of an H100 a second


def test_an_update_by_hand(tool_run):
    assert MATRICES == 1_310_195_712
    pairs = 760**2 / 2 + 4 * 199 * (760 + 199 / 2)  # of a query and a key that it sees
    attention = 28 * 2 * 1536 * pairs
    of_prompt = MATRICES * (760 + 4 * 199) + attention + HEAD * 4 * 200
    # Three of four updates need old log-probs, a forward: a third of an update.
    operations = 6 * 512 * of_prompt * (1 + 3 / 4 / 3)
    assert operations == pytest.approx(8.9e15, rel=0.01)
    expected = 100 * operations / 0.3 / FLOPS / 3600
    hours = tool_run.hours.update
    assert hours == pytest.approx(expected)
    assert hours == pytest.approx(0.83, rel=0.02)


def test_sampling_by_hand(tool_run):
    """256 responses a GPU, all at a time, 1,024 steps until the longest has ended."""
    weights = 2 * MATRICES + 4 * HEAD  # bytes a step
    cache = 4 * 28 * 2 * 128  # bytes a token

    def seconds(prompts: int, responses: int) -> float:
        read = 1024 * weights + responses * 200 * (760 + 100) * cache
        pauses = 1024 * 0.005
        prefill = 2 * MATRICES * prompts * 760 / (0.4 * FLOPS)
        return pauses + read / (0.75 * 3.35e12) + prefill

    sample = seconds(64, 256)
    held_out = seconds(16, 16)
    expected = 8 * (100 * sample + 6 * held_out) / 3600
    assert tool_run.hours.sampling == pytest.approx(expected)


def test_what_a_run_keeps_by_hand(tool_run):
    """Six policies and the last one again; and the state."""
    billions = 1.5437
    expected = (7 * 2 * billions, 12 * billions)
    assert tool_run.gigabytes == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "7B", "14B"])
def test_operations_are_those_of_bench_step(size):
    config = models.qwen(size)
    shape = {"prompt_tokens": 760, "response_tokens": 200, "group": 4, "prompts": 3}
    expected = step.needed_flops(config, **shape)
    needed = roofline.needed(size, *shape.values())
    assert sum(needed) == pytest.approx(expected, rel=1e-9)
    weights = models.skeleton(config).parameters()
    assert roofline.parameters(size).total == sum(x.numel() for x in weights)


def test_recomputing_is_that_of_the_table_of_memory():
    budget = TrainConfig.model_fields["tokens_per_microbatch"].default
    lines = (ROOT / "docs/gpu.md").read_text().splitlines()
    for size in ("0.5B", "1.5B", "3B", "7B", "14B"):
        of_size = [line for line in lines if line.startswith(f"| {size} |")]
        assert roofline.recomputes(size, budget) == ("gc" in of_size[0])


def test_what_fits_takes_as_long_as_its_cost(tool_run):
    (h100,) = [machine for machine in fits.MACHINES if machine.gpu == "H100"]
    eight = h100._replace(gpus=8)
    simulated = {"recomputes": 0, "collectives_gib": {"allgather_base": 80.0}}
    update, sending, sampling, whole = fits.seconds("1.5B", eight, 0, 8192, 0.4, simulated)
    assert update == pytest.approx(tool_run.update)
    assert sampling == pytest.approx(tool_run.sampling)
    # 4 updates of 16 prompts a GPU, 5 in a micro-batch: 16 micro-batches, and old log-probs for 12.
    gathered = 16 / 2 * 80 * 2**30 * (1 + 3 / 4 / 2)
    assert sending == pytest.approx(gathered * 7 / 8 / 300e9)
    assert whole == pytest.approx(1.1 * (update + sending + sampling))


def test_benchmarks_are_those_of_the_tasks():
    tasks = {
        "healthbench": healthbench.HealthBench,
        "gpqa": gpqa.GPQA,
        "bfcl": bfcl.BFCL,
    }
    for name, task in tasks.items():
        assert cost.BENCHMARKS[name][2] == task.max_tokens
    sizes = [len(bfcl.read(category)) for category in bfcl.NON_LIVE + bfcl.LIVE]
    items, *_ = cost.BENCHMARKS["bfcl"]
    assert items == sum(sizes)


def test_what_a_judge_is_asked():
    """Two responses of 120 tokens: 5 criteria, each with 160 tokens before the response, 40 behind
    it, 30 of its own, and 20 where another stands before it."""
    some = lengths.Lengths("", 100, 5, 160, 40, 30, 20)

    def asked(group: int, each: bool) -> cost.Asked:
        return cost.asked(some, 120, group, each, False, Machine())

    # each: 2 x 5 requests of 160 + 120 + 40 + 30 tokens. Four of a response find cached what stands
    # before the criterion, 320 tokens; the second response's first the 160 before the response.
    each = asked(2, True)
    cached = 8 * 320 + 160
    assert each[:4] == (10, 10 * 350, cached, 10 * cost.ANSWER)
    answers = 2 * (cost.ANSWER + 4 * cost.NEXT)
    assert asked(2, False)[:4] == (2, 2 * (350 + 4 * 20), 160, answers)
    assert asked(4, True).requests == 2 * each.requests


def test_shared_runs_are_counted_once():
    args = cost.options([])
    together = cost.tables(plans("medicine", "beta", "single"), args)
    assert "| medicine 7B | 15 of 15 |" in together
    assert "| beta 7B | 15 of 24 |" in together
    assert "| single 7B | 3 of 12 |" in together
    assert "| all | 63 |" in together
    alone = cost.tables(plans("beta"), args)
    assert "| beta 7B | 24 of 24 |" in alone


def test_published_times_are_within_a_quarter(monkeypatch):
    """NeMo-RL (NVIDIA-NeMo/RL#959), Llama-3.1-8B on 8 H100: sampling 55 to 58 s, update 27 to 40 s.

    2,048 responses of 795 tokens, at most 4,096, as in its performance summary; prompts of 250
    tokens are assumed, one a response there. Qwen2.5-72B on 2 H100
    (tenstorrent/tt-inference-server#143): 31 ms a token."""
    machine = Machine()
    monkeypatch.setitem(shapes.QWEN, "llama", (32, 4096, 32, 8, 14336, 128256, False))
    sampling = roofline.sample_seconds("llama", 64, 32, (250, 795, 4096), 0.6, machine)
    assert sampling == pytest.approx(56.5, rel=0.25)
    train = {
        "group": 1,
        "prompts": 2048,
        "updates": 1,
        "kl": 0,
        "gradient_checkpointing": "off",
        "tokens_per_microbatch": 8192,
    }
    update = roofline.update_seconds("llama", 250, 795, train, machine)
    assert update == pytest.approx(33.5, rel=0.25)
    weights = 2 * 72.7e9  # bytes, which two GPUs share
    token = machine.decode(1, weights / 2)
    assert token == pytest.approx(0.031, rel=0.25)


ESSENTIAL = {"description": "Essential Criteria: Names a remedy.", "weight": 5}
PITFALL = {"description": "Pitfall Criteria: Names a remedy.", "weight": -1}


@pytest.fixture
def two_rows(tmp_path):
    """A file in RaR's schema: one row with two criteria, one with one."""
    first = {"question": "Is coffee bad?", "rubric": [ESSENTIAL, PITFALL]}
    last = {"question": "Why?", "rubric": [ESSENTIAL]}
    return write_lines(tmp_path / "rar.jsonl", [first, last])


def test_lengths_of_a_file(two_rows, tiny):
    tokenizer = load_tokenizer(tiny)
    found = lengths.count("rar-medicine", str(two_rows), tokenizer)
    assert found.criteria == 1.5
    assert found.prompt > 5


def test_lengths_of_a_judge_s_prompt_add_up(tmp_path, tiny):
    row = {"question": "Why?", "rubric": [ESSENTIAL]}
    file = write_lines(tmp_path / "one.jsonl", [row])
    tokenizer = load_tokenizer(tiny)
    found = lengths.count("rar-medicine", str(file), tokenizer)
    chat = [{"role": "user", "content": "Why?"}]
    prompt = judge_prompt(chat, "", {"criterion_1": "Names a remedy."}, False)
    tokens = len(tokenizer(prompt).input_ids)
    parts = found.begin + found.middle + found.item
    assert parts == pytest.approx(tokens, abs=3)


def test_the_cost_of_a_file(two_rows, tiny, capsys):
    words = f"medicine --data {two_rows} --tokenizer {tiny} --response 100"
    cost.main(cost.options(words.split()))
    out = capsys.readouterr().out
    assert f"2 rows of {two_rows}" in out
    assert "responses of 100" in out


GPQA = """\
Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3
Why?,1,2,3,4
"""


def test_lengths_of_benchmarks(tmp_path, tiny):
    (tmp_path / "gpqa.csv").write_text(GPQA)
    row = {
        "prompt_id": "a",
        "prompt": [{"role": "user", "content": "Why?"}],
        "rubrics": [{"criterion": "Says why.", "points": 5, "tags": []}],
    }
    (tmp_path / "hb.jsonl").write_text(json.dumps(row))
    tokenizer = load_tokenizer(tiny)
    of_gpqa = lengths.count("gpqa", str(tmp_path / "gpqa.csv"), tokenizer)
    assert of_gpqa.prompt > 50
    assert of_gpqa.criteria == 0
    of_health = lengths.count("healthbench", str(tmp_path / "hb.jsonl"), tokenizer)
    assert of_health.criteria == 1
    assert of_health.item > of_health.prompt


WITHOUT_TORCH = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
from experiments import cost

cost.main(cost.options([]))
assert "torch" not in sys.modules
"""


def test_it_does_not_wait_for_torch(tmp_path):
    (tmp_path / "without_torch.py").write_text(WITHOUT_TORCH)
    result = python(tmp_path / "without_torch.py", cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_errors_are_a_sentence():
    for words, said in (
        ("nothing", "invalid choice"),
        ("--gpus 0", "--gpus"),
        ("--data x", "--tokenizer"),
        ("tools --data x", "--tokenizer"),
    ):
        result = launch(words, script="experiments/cost.py")
        assert result.returncode == 1
        assert said in result.stderr
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1
    with pytest.raises(lengths.InputError, match="--tokenizer /none: no tokenizer"):
        cost.main(cost.options(["tools", "--data", "x", "--tokenizer", "/none"]))
    with pytest.raises(lengths.InputError, match="package"):
        lengths.read_examples("bfcl", "x")
