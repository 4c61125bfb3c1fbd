"""experiments/cost.py: sums by hand, what must hold of any of them, a file's own lengths, errors."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from config import TrainConfig
from experiments import cost, lengths, roofline
from experiments.roofline import Machine
from local import models, shapes
from tasks import bfcl, gpqa, healthbench
from tools import step


def plans(*names: str, argv: tuple = ()) -> dict:
    args = cost.options([*argv])
    return {name: cost.plan(name, lengths.LENGTHS, args) for name in names}


def test_a_line_by_hand():
    """tools 1.5B: 100 steps of 512 prompts of 760 tokens, 4 responses of 200 to each, 4 updates, no recomputation, 8 H100."""
    run = plans("tools")["tools"]["1.5B"][0]
    layers = 28 * (
        2 * 1536 * (1536 + 256) + 3 * 1536 * 8960
    )  # parameters in matrices; 2 key-value heads of 128
    assert layers == 1_310_195_712
    pairs = 760**2 / 2 + 4 * 199 * (760 + 199 / 2)  # of a query and a key that it sees
    operations = (
        6 * 512 * (layers * (760 + 4 * 199) + 28 * 2 * 1536 * pairs + 151_936 * 1536 * 4 * 200)
    )
    operations *= 1 + 3 / 4 / 3  # three of four updates need old log-probs, a forward: a third
    assert operations == pytest.approx(8.9e15, rel=0.01)
    assert run.hours[0] == pytest.approx(100 * operations / 0.3 / 989e12 / 3600) and run.hours[
        0
    ] == pytest.approx(0.83, rel=0.02)
    # Sampling: 256 responses a GPU, all at a time, 1,024 steps until the longest has ended.
    weights, cache = (
        2 * layers + 4 * 151_936 * 1536,
        4 * 28 * 2 * 128,
    )  # bytes a step, bytes a token
    read = 1024 * weights + 256 * 200 * (760 + 100) * cache
    sample = 1024 * 0.005 + read / (0.75 * 3.35e12) + 2 * layers * 64 * 760 / (0.4 * 989e12)
    held_out = (
        1024 * 0.005
        + (1024 * weights + 16 * 200 * 860 * cache) / (0.75 * 3.35e12)
        + 2 * layers * 16 * 760 / (0.4 * 989e12)
    )
    assert run.hours[1] == pytest.approx(8 * (100 * sample + 6 * held_out) / 3600)
    assert run.gigabytes == pytest.approx(
        (7 * 2 * 1.5437, 12 * 1.5437), rel=1e-3
    )  # six policies and the last one again


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "7B", "14B"])
def test_operations_are_those_of_bench_step(size):
    shape = {"prompt_tokens": 760, "response_tokens": 200, "group": 4, "prompts": 3}
    assert sum(roofline.needed(size, *shape.values())) == pytest.approx(
        step.needed_flops(models.qwen(size), **shape), rel=1e-9
    )
    assert roofline.parameters(size)[2] == sum(
        x.numel() for x in models.skeleton(models.qwen(size)).parameters()
    )


def test_recomputing_is_that_of_the_table_of_memory():
    text = (ROOT / "docs/gpu.md").read_text()
    for size in ("0.5B", "1.5B", "3B", "7B", "14B"):
        line = next(line for line in text.splitlines() if line.startswith(f"| {size} |"))
        assert roofline.recomputes(
            size, TrainConfig.model_fields["tokens_per_microbatch"].default
        ) == ("gc" in line)


def test_what_fits_takes_as_long_as_its_cost():
    from experiments import fits

    (h100,) = [machine for machine in fits.MACHINES if machine.gpu == "H100"]
    simulated = {"recomputes": 0, "collectives_gib": {"allgather_base": 80.0}}
    update, sending, sampling, step = fits.seconds(
        "1.5B", h100._replace(gpus=8), 8192, 0.4, simulated
    )
    assert (update, sampling) == pytest.approx(plans("tools")["tools"]["1.5B"][0].per_step)
    # 4 updates of 16 prompts a GPU, 5 in a micro-batch: 16 micro-batches, and old log-probs for 12.
    gathered = 16 / 2 * 80 * 2**30 * (1 + 3 / 4 / 2)
    assert sending == pytest.approx(gathered * 7 / 8 / 300e9)
    assert step == pytest.approx(1.1 * (update + sending + sampling))


def test_benchmarks_are_those_of_the_tasks():
    assert [cost.BENCHMARKS[x][2] for x in ("healthbench", "gpqa", "bfcl")] == [
        x.max_tokens for x in (healthbench.HealthBench, gpqa.GPQA, bfcl.BFCL)
    ]
    assert cost.BENCHMARKS["bfcl"][0] == sum(
        len(bfcl.read(category)) for category in bfcl.NON_LIVE + bfcl.LIVE
    )


def test_what_a_judge_is_asked():
    x, machine = lengths.Lengths("", 100, 5, 160, 40, 30, 20), Machine()
    each, every = (cost.asked(x, 120, 2, mode, False, machine) for mode in (True, False))
    # each: 2 x 5 requests of 160 + 120 + 40 + 30 tokens, of which four a response find all before the criterion, 320 tokens,
    # and the second response's first the 160 before the response
    assert each[:4] == (10, 10 * 350, 8 * 320 + 160, 10 * cost.ANSWER)
    assert every[:4] == (2, 2 * (350 + 4 * 20), 160, 2 * (cost.ANSWER + 4 * cost.NEXT))
    assert cost.asked(x, 120, 4, True, False, machine).requests == 2 * each.requests


def test_shared_runs_are_counted_once():
    args = cost.options([])
    rows = {
        line.split(" | ")[0][2:]: line.split(" | ")
        for line in cost.tables(plans("medicine", "beta", "single"), args).splitlines()
    }
    assert [rows[x][1] for x in ("medicine 7B", "beta 7B", "single 7B", "all")] == [
        "15 of 15",
        "15 of 24",
        "3 of 12",
        "63",
    ]
    alone = cost.tables(plans("beta"), args)
    assert "| beta 7B | 24 of 24 |" in alone


def test_published_times_are_within_a_quarter(monkeypatch):
    """NeMo-RL (NVIDIA-NeMo/RL#959): Llama-3.1-8B, responses of 795 tokens on 8 H100, 55 to 58 s of sampling, 27 to 40 of
    update; 2,048 of them, of at most 4,096 tokens, as in its performance summary; prompts of 250 assumed, one a response there.
    Qwen2.5-72B on 2 H100 (tenstorrent/tt-inference-server#143): 31 ms a token."""
    monkeypatch.setitem(shapes.QWEN, "llama", (32, 4096, 32, 8, 14336, 128256, False))
    assert roofline.sample_seconds(
        "llama", 64, 32, (250, 795, 4096), 0.6, Machine()
    ) == pytest.approx(56.5, rel=0.25)
    train = {
        "group": 1,
        "prompts": 2048,
        "updates": 1,
        "kl": 0,
        "gradient_checkpointing": "off",
        "tokens_per_microbatch": 8192,
    }
    assert roofline.update_seconds("llama", 250, 795, train, Machine()) == pytest.approx(
        33.5, rel=0.25
    )
    assert Machine().decode(1, 2 * 72.7e9 / 2) == pytest.approx(0.031, rel=0.25)


def test_lengths_of_a_file(tmp_path, tiny, capsys):
    file = tmp_path / "rar.jsonl"
    rubric = [
        {"description": f"{kind} Criteria: Names a remedy.", "weight": weight}
        for kind, weight in (("Essential", 5), ("Pitfall", -1))
    ]
    file.write_text(
        "".join(
            json.dumps({"question": question, "rubric": rubric[:n]}) + "\n"
            for question, n in (("Is coffee bad?", 2), ("Why?", 1))
        )
    )
    from infra.pretrained import load_tokenizer
    from tasks.verdicts import judge_prompt

    tokenizer = load_tokenizer(tiny)
    found = lengths.count("rar-medicine", str(file), tokenizer)
    assert found.criteria == 1.5 and found.prompt > 5
    whole = judge_prompt(
        [{"role": "user", "content": "Why?"}], "", {"criterion_1": "Names a remedy."}, False
    )
    one = lengths.count("rar-medicine", str(_last(file, tmp_path)), tokenizer)
    assert one.begin + one.middle + one.item == pytest.approx(
        len(tokenizer(whole).input_ids), abs=3
    )
    cost.main(
        cost.options(
            ["medicine", "--data", str(file), "--tokenizer", str(tiny), "--response", "100"]
        )
    )
    out = capsys.readouterr().out
    assert f"2 rows of {file}" in out and "responses of 100" in out


def test_lengths_of_benchmarks(tmp_path, tiny):
    from infra.pretrained import load_tokenizer

    (tmp_path / "gpqa.csv").write_text(
        "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\nWhy?,1,2,3,4\n"
    )
    (tmp_path / "hb.jsonl").write_text(
        json.dumps(
            {
                "prompt_id": "a",
                "prompt": [{"role": "user", "content": "Why?"}],
                "rubrics": [{"criterion": "Says why.", "points": 5, "tags": []}],
            }
        )
    )
    found = [
        lengths.count(task, str(tmp_path / file), load_tokenizer(tiny))
        for task, file in (("gpqa", "gpqa.csv"), ("healthbench", "hb.jsonl"))
    ]
    assert (
        found[0].prompt > 50
        and found[0].criteria == 0
        and found[1].criteria == 1
        and found[1].item > found[1].prompt
    )


def _last(file, folder):
    out = folder / "one.jsonl"
    out.write_text(file.read_text().splitlines()[-1])
    return out


def _run(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "experiments/cost.py", *map(str, words)],
        capture_output=True,
        text=True,
    )


def test_errors_are_a_sentence_and_torch_is_not_needed():
    for words, said in (
        (("nothing",), "invalid choice"),
        (("--gpus", "0"), "--gpus"),
        (("--data", "x"), "--tokenizer"),
        (("tools", "--data", "x"), "--tokenizer"),
    ):
        out = _run(*words)
        assert (
            out.returncode == 1
            and said in out.stderr
            and out.stderr.startswith("error: ")
            and len(out.stderr.splitlines()) == 1
        )
    with pytest.raises(lengths.InputError, match="--tokenizer /none: no tokenizer"):
        cost.main(cost.options(["tools", "--data", "x", "--tokenizer", "/none"]))
    with pytest.raises(lengths.InputError, match="package"):
        lengths.read_examples("bfcl", "x")
    code = "import sys; from experiments import cost; cost.main(cost.options([])); assert 'torch' not in sys.modules"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    )
