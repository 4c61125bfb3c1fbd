"""train.py --plan: what it says is what the run would have; it loads nothing and leaves nothing."""

import re
from types import SimpleNamespace

import pytest
import torch
from programs import TINY, command
from transformers import Qwen3Config

from config import TrainConfig, parse
from experiments import fits
from infra.ranks import InputError
from local.shapes import QWEN
from tools import plan


def lines(text: str) -> dict[str, str]:
    """{name: what the plan says}."""
    pairs = re.findall(
        r"^ *(machine|model|prompts|the first|rewards|a step|memory|time|disk)  (.*)", text, re.M
    )
    return dict(pairs)


def test_a_plan_of_another_machine(tmp_path, tiny):
    """The model's weights are damaged, which nobody notices: they are not read."""
    broken = tmp_path / "model"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as opened:
        opened.seek(8 + header)
        opened.write(b"\xff" * 1_000_000)  # NaN
    out = command(
        *TINY, "--model", broken, "--plan", "2xH100", "--name", "planned", "--keep-policies",
        "--eval-every", 1, cwd=tmp_path,
    )  # fmt: skip
    said = lines(out)
    assert said["machine"] == "2 x H100, 79 GiB each"
    assert "all are trained" in said["model"]
    assert re.match(r"4 to train on, 4 held out; \d+ to \d+ tokens, median \d+", said["prompts"])
    assert "<|im_start|>user" in said["the first"]
    assert "format 1.00" in said["rewards"]
    assert said["a step"].startswith("2 prompts x 4 responses, at most ")
    assert "GiB in an update (" in said["memory"] and "it fits" in said["memory"]
    assert "s a step" in said["time"]
    assert "GB of checkpoints" in said["disk"]
    assert "Memory, time and disk are computed. Nothing was loaded" in out
    assert not (tmp_path / "runs/planned").exists()


def test_this_machine(monkeypatch):
    monkeypatch.setattr(plan, "fastest", lambda work: 0.01)
    machine = plan.find_machine("here")
    assert plan.is_cpu(machine) and machine.gpus == 1 and machine.memory > 1
    assert machine.flops * 0.3 == pytest.approx(0.5 * 2 * 1024**3 / 0.01)
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert plan.find_machine("here") == fits.MACHINES[-1]._replace(
        gpu="NVIDIA H100 80GB HBM3", memory=79.0, gpus=1
    )
    properties.name, properties.total_memory = "NVIDIA B900", 40 * 2**30
    assert plan.find_machine("here").gpu == "NVIDIA B900 (rates of L40S)"


def test_a_machine_that_is_not_known():
    with pytest.raises(
        InputError, match=r"--plan 8xTPU: must be here, or a number and one of .*H100"
    ):
        plan.find_machine("8xTPU")


def test_disk_and_what_does_not_fit(monkeypatch):
    monkeypatch.setitem(QWEN, plan.MODEL, QWEN["7B"])
    known = SimpleNamespace(dtype=torch.bfloat16)
    config = TrainConfig(keep_policies=True, eval_every=50, steps=100)
    # Policies after 0, 50 and 100 steps, and checkpoint/: four times 15.2 GB.
    counts = plan.Counts(7_615_616_512, 7_615_616_512)
    said = plan.disk(config, known, counts)
    assert said == "60.9 GB of checkpoints, 91.4 GB of state until the end"
    said = plan.disk(TrainConfig(lora=16), known, counts._replace(trained=40_370_176))
    assert said == "15.2 GB of checkpoints, 0.5 GB of state until the end"
    config = TrainConfig()
    simulated = {"peak_parts_gib": {"weights": 30.0}, "peak_gib": 30.0, "held_gib": 28.0}
    machine = fits.MACHINES[0]
    assert "it DOES NOT FIT" in plan.memory(config, machine, simulated)


def test_the_simulation_fills_a_micro_batch_and_says_why_it_fails(monkeypatch, tmp_path):
    """Few prompts would need less memory than the run; more than the run has, more."""
    asked = []

    def run(command, **_):
        asked.append(dict(zip(command[3::2], command[4::2], strict=False)))
        return SimpleNamespace(returncode=1, stdout="", stderr="a line\nno memory")

    monkeypatch.setattr(plan.subprocess, "run", run)
    train = [SimpleNamespace(ids=[0] * 25)]
    for prompts, expected in ((128, "30"), (16, "16")):
        config = TrainConfig(max_tokens=64, prompts=prompts, plan="1xRTX4090")
        with pytest.raises(InputError, match="--plan 1xRTX4090: the simulation failed: no memory"):
            plan.simulate(config, tmp_path, fits.MACHINES[0], train)
        assert asked.pop()["--prompts"] == expected  # 2 x (8192 // (25 + 8 * 63))


def test_parameters_of_a_model_whose_heads_are_wider(tmp_path):
    """Qwen3-0.6B: 16 heads of 128 beside 1,024 hidden, 596 million parameters by its card."""
    Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)
    assert plan.count_parameters(TrainConfig(), tmp_path) == (596_049_920, 596_049_920)
    total, trained = plan.count_parameters(TrainConfig(lora=8), tmp_path)
    assert total == 596_049_920 and 4e6 < trained < 6e6
    _, hidden, heads, kv_heads, *_ = plan.shape(tmp_path)
    assert hidden // heads * kv_heads == 8 * 128  # what keys and values take


@pytest.mark.parametrize("text", ["0xH100", "1000xH100", "x", "٣xH100", "8"])
def test_a_plan_that_is_none(text):
    with pytest.raises(InputError, match="--plan .*: should be here, or a number and a GPU"):
        parse(TrainConfig, "", ["--plan", text])


def test_a_resumed_run_is_not_planned():
    with pytest.raises(InputError, match="leave --resume out"):
        parse(TrainConfig, "", ["--plan", "here", "--resume", "runs/a"])
