"""The path of a GPU, of which CPU tests see nothing, on one that is simulated: 8 on a node, and two nodes of 4."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from local import models

SHAPE = "--json --prompt 64 --response 65 --group 8"
CASES = {  # options, optimizer steps. Short rows, so that weights count, in two micro-batches; long ones, so that logits do
    "one node": (
        "--size tiny --gpus 8 --gradient-checkpointing on --tokens-per-microbatch 1152",
        1,
    ),
    "two nodes": (
        "--size tiny-untied --gpus 4 --nodes 2 --gradient-checkpointing off --kl 0.1 --updates 2 --prompts 128 "
        "--tokens-per-microbatch 4608",
        2,
    ),
}
# MiB of a GPU between steps, at the update's peak, more in a push. More than 5% above these is a fault, or has a reason: then they are to be recorded anew.
MEMORY = {
    "one node": {"held": 1.32, "peak": 13.68, "push": 1.00},
    "two nodes": {"held": 4.01, "peak": 133.97, "push": 1.00},
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """Each in a process of its own, for it changes torch."""
    runs = {
        name: subprocess.Popen(
            [sys.executable, ROOT / "tools/simulate.py", *SHAPE.split(), *case.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (case, _) in CASES.items()
    }
    said = {name: run.communicate() for name, run in runs.items()}
    for name, run in runs.items():  # such as: a tensor of the host in an operation of the GPU
        assert run.returncode == 0, (name, said[name][1][-3000:])
    return {name: json.loads(out) for name, (out, _) in said.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_pushed(results, case):
    """In its shape, tied ones under both names: 12 of each of 4 layers, embeddings, head, last norm."""
    assert results[case]["not_pushed"] == [] and results[case]["pushed"] == 4 * 12 + 3


@pytest.mark.parametrize("case", CASES)
def test_the_host_hardly_waits(results, case):
    """Norm and loss decide about an optimizer step, and sums go to the log at the end. Nothing is copied to the GPU once a
    forward is queued there: the copy, and the host, would wait for it."""
    assert sum(results[case]["reads"].values()) <= 2 * CASES[case][1] + 1, results[case]["reads"]
    assert sum(results[case]["copies_behind_a_forward"].values()) == 0, results[case][
        "copies_behind_a_forward"
    ]


@pytest.mark.parametrize("case", CASES)
def test_memory_does_not_grow(results, case):
    result = results[case]
    grown = {
        when: 1024 * result[f"{when}_gib"]
        for when, size in MEMORY[case].items()
        if 1024 * result[f"{when}_gib"] > 1.05 * size
    }
    assert grown == {}, (result["held_parts_gib"], result["peak_parts_gib"])


def test_what_is_computed(results):
    """In bfloat16, and little beside what is needed and one more forward; a layer at a time, whose gradients are reduced
    once a micro-batch."""
    result = results["one node"]
    assert {*result["tflop_in"]} == {"bfloat16"}
    assert 1 < sum(result["tflop"].values()) / result["tflop_needed"] < 1.35
    assert result["collectives"]["reduce_scatter_base"] == 2 * (4 + 1)


@pytest.mark.parametrize(
    ("size", "parameters"), [("1.5B", 1.54e9), ("3B", 3.09e9), ("7B", 7.62e9), ("14B", 14.77e9)]
)
def test_shapes_are_qwens(size, parameters):
    assert sum(x.numel() for x in models.skeleton(models.qwen(size)).parameters()) == pytest.approx(
        parameters, rel=0.01
    )
