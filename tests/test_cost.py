"""experiments/cost.py: sums by hand, what must hold of any sum, a file's own lengths, errors."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from config import TrainConfig
from experiments import cost, lengths, roofline
from experiments.roofline import Machine
from infra.pretrained import load_tokenizer
from local import models, shapes
from tasks import bfcl, gpqa, healthbench
from tasks.verdicts import judge_prompt
from tools import step


def plans(*names: str, argv: tuple = ()) -> dict:
    args = cost.options([*argv])
    return {name: cost.plan(name, lengths.LENGTHS, args) for name in names}


def test_a_line_by_hand():
    """tools 1.5B on 8 H100: 100 steps of 512 prompts of 760 tokens, 4 responses of 200 to each,
    4 updates, no recomputation."""
    run = plans("tools")["tools"]["1.5B"][0]
    update_hours, sampling_hours, *_ = run.hours

    # Parameters in matrices; 2 key-value heads of 128.
    layers = 28 * (2 * 1536 * (1536 + 256) + 3 * 1536 * 8960)
    assert layers == 1_310_195_712
    head = 151_936 * 1536
    pairs = 760**2 / 2 + 4 * 199 * (760 + 199 / 2)  # of a query and a key that it sees
    of_prompt = layers * (760 + 4 * 199) + 28 * 2 * 1536 * pairs + head * 4 * 200
    # Three of four updates need old log-probs, a forward: a third of an update.
    operations = 6 * 512 * of_prompt * (1 + 3 / 4 / 3)
    assert operations == pytest.approx(8.9e15, rel=0.01)
    assert update_hours == pytest.approx(100 * operations / 0.3 / 989e12 / 3600)
    assert update_hours == pytest.approx(0.83, rel=0.02)

    # Sampling: 256 responses a GPU, all at a time, 1,024 steps until the longest has ended.
    weights = 2 * layers + 4 * head  # bytes a step
    cache = 4 * 28 * 2 * 128  # bytes a token

    def seconds(prompts: int, responses: int) -> float:
        read = 1024 * weights + responses * 200 * (760 + 100) * cache
        return 1024 * 0.005 + read / (0.75 * 3.35e12) + 2 * layers * prompts * 760 / (0.4 * 989e12)

    sample, held_out = seconds(64, 256), seconds(16, 16)
    assert sampling_hours == pytest.approx(8 * (100 * sample + 6 * held_out) / 3600)
    # Six policies and the last one again.
    assert run.gigabytes == pytest.approx((7 * 2 * 1.5437, 12 * 1.5437), rel=1e-3)


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "7B", "14B"])
def test_operations_are_those_of_bench_step(size):
    shape = {"prompt_tokens": 760, "response_tokens": 200, "group": 4, "prompts": 3}
    needed = step.needed_flops(models.qwen(size), **shape)
    assert sum(roofline.needed(size, *shape.values())) == pytest.approx(needed, rel=1e-9)
    *_, parameters = roofline.parameters(size)
    skeleton = models.skeleton(models.qwen(size))
    assert parameters == sum(x.numel() for x in skeleton.parameters())


def test_recomputing_is_that_of_the_table_of_memory():
    budget = TrainConfig.model_fields["tokens_per_microbatch"].default
    text = (ROOT / "docs/gpu.md").read_text()
    for size in ("0.5B", "1.5B", "3B", "7B", "14B"):
        line = next(line for line in text.splitlines() if line.startswith(f"| {size} |"))
        assert roofline.recomputes(size, budget) == ("gc" in line)


def test_what_fits_takes_as_long_as_its_cost():
    from experiments import fits

    (h100,) = [machine for machine in fits.MACHINES if machine.gpu == "H100"]
    simulated = {"recomputes": 0, "collectives_gib": {"allgather_base": 80.0}}
    update, sending, sampling, step = fits.seconds(
        "1.5B", h100._replace(gpus=8), 8192, 0.4, simulated
    )
    run = plans("tools")["tools"]["1.5B"][0]
    assert (update, sampling) == pytest.approx((run.update, run.sampling))
    # 4 updates of 16 prompts a GPU, 5 in a micro-batch: 16 micro-batches, and old log-probs for 12.
    gathered = 16 / 2 * 80 * 2**30 * (1 + 3 / 4 / 2)
    assert sending == pytest.approx(gathered * 7 / 8 / 300e9)
    assert step == pytest.approx(1.1 * (update + sending + sampling))


def test_benchmarks_are_those_of_the_tasks():
    tasks = {
        "healthbench": healthbench.HealthBench,
        "gpqa": gpqa.GPQA,
        "bfcl": bfcl.BFCL,
    }
    for name, task in tasks.items():
        assert cost.BENCHMARKS[name][2] == task.max_tokens
    sizes = [len(bfcl.read(category)) for category in bfcl.NON_LIVE + bfcl.LIVE]
    assert cost.BENCHMARKS["bfcl"][0] == sum(sizes)


def test_what_a_judge_is_asked():
    x, machine = lengths.Lengths("", 100, 5, 160, 40, 30, 20), Machine()
    each, every = (cost.asked(x, 120, 2, mode, False, machine) for mode in (True, False))
    # each: 2 x 5 requests of 160 + 120 + 40 + 30 tokens. Four of a response find cached what stands
    # before the criterion, 320 tokens; the second response's first the 160 before the response.
    assert each[:4] == (10, 10 * 350, 8 * 320 + 160, 10 * cost.ANSWER)
    assert every[:4] == (2, 2 * (350 + 4 * 20), 160, 2 * (cost.ANSWER + 4 * cost.NEXT))
    assert cost.asked(x, 120, 4, True, False, machine).requests == 2 * each.requests


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
    monkeypatch.setitem(shapes.QWEN, "llama", (32, 4096, 32, 8, 14336, 128256, False))
    sampling = roofline.sample_seconds("llama", 64, 32, (250, 795, 4096), 0.6, Machine())
    assert sampling == pytest.approx(56.5, rel=0.25)
    train = {
        "group": 1,
        "prompts": 2048,
        "updates": 1,
        "kl": 0,
        "gradient_checkpointing": "off",
        "tokens_per_microbatch": 8192,
    }
    update = roofline.update_seconds("llama", 250, 795, train, Machine())
    assert update == pytest.approx(33.5, rel=0.25)
    assert Machine().decode(1, 2 * 72.7e9 / 2) == pytest.approx(0.031, rel=0.25)


def test_lengths_of_a_file(tmp_path, tiny, capsys):
    essential = {"description": "Essential Criteria: Names a remedy.", "weight": 5}
    pitfall = {"description": "Pitfall Criteria: Names a remedy.", "weight": -1}
    first = json.dumps({"question": "Is coffee bad?", "rubric": [essential, pitfall]})
    last = json.dumps({"question": "Why?", "rubric": [essential]})
    file, of_last = tmp_path / "rar.jsonl", tmp_path / "last.jsonl"
    file.write_text(f"{first}\n{last}\n")
    of_last.write_text(last)

    tokenizer = load_tokenizer(tiny)
    found = lengths.count("rar-medicine", str(file), tokenizer)
    assert found.criteria == 1.5 and found.prompt > 5
    messages = [{"role": "user", "content": "Why?"}]
    whole = judge_prompt(messages, "", {"criterion_1": "Names a remedy."}, False)
    one = lengths.count("rar-medicine", str(of_last), tokenizer)
    tokens = len(tokenizer(whole).input_ids)
    assert one.begin + one.middle + one.item == pytest.approx(tokens, abs=3)
    words = f"medicine --data {file} --tokenizer {tiny} --response 100"
    cost.main(cost.options(words.split()))
    out = capsys.readouterr().out
    assert f"2 rows of {file}" in out and "responses of 100" in out


def test_lengths_of_benchmarks(tmp_path, tiny):
    header = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3"
    (tmp_path / "gpqa.csv").write_text(f"{header}\nWhy?,1,2,3,4\n")
    row = {
        "prompt_id": "a",
        "prompt": [{"role": "user", "content": "Why?"}],
        "rubrics": [{"criterion": "Says why.", "points": 5, "tags": []}],
    }
    (tmp_path / "hb.jsonl").write_text(json.dumps(row))
    tokenizer = load_tokenizer(tiny)
    of_gpqa = lengths.count("gpqa", str(tmp_path / "gpqa.csv"), tokenizer)
    assert of_gpqa.prompt > 50 and of_gpqa.criteria == 0
    of_health = lengths.count("healthbench", str(tmp_path / "hb.jsonl"), tokenizer)
    assert of_health.criteria == 1 and of_health.item > of_health.prompt


def test_errors_are_a_sentence_and_torch_is_not_needed():
    for words, said in (
        ("nothing", "invalid choice"),
        ("--gpus 0", "--gpus"),
        ("--data x", "--tokenizer"),
        ("tools --data x", "--tokenizer"),
    ):
        command = [sys.executable, ROOT / "experiments/cost.py", *words.split()]
        out = subprocess.run(command, capture_output=True, text=True)
        assert out.returncode == 1 and said in out.stderr
        assert out.stderr.startswith("error: ") and len(out.stderr.splitlines()) == 1
    with pytest.raises(lengths.InputError, match="--tokenizer /none: no tokenizer"):
        cost.main(cost.options(["tools", "--data", "x", "--tokenizer", "/none"]))
    with pytest.raises(lengths.InputError, match="package"):
        lengths.read_examples("bfcl", "x")
    code = """
import sys
from experiments import cost
cost.main(cost.options([]))
assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
