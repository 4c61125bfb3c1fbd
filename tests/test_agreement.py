"""Our scores against those that other tools gave to the same cases, as tools/agree.py has recorded them."""

import collections
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from test_eval import echo

from tasks import bfcl
from tools import agree

RECORDED = json.loads(
    (ROOT / "tests/agreement.json").read_text()
)  # {"what tool": [[case, the tool's scores], ...]}
DIFFERS = {  # what others do otherwise, see docs/experiments.md
    "gpqa simple_evals": {"answer: b"},
    "gpqa inspect_evals": {
        "Answer:\nB",
        "Answer: (B)",
        "Answer: **B**",
        "Answer: A\nAnswer: B",
        "Answer: A, B",
        "Answer: AB",
        "Answer: B, since x",
        "Answer: Because",
        "Answer: Both A and B",
        "Not so: Answer: A is wrong.\nAnswer: C",
    },
    "rlla toolrl": {"a call named 1"},
}
WAYS = {
    "healthbench inspect_evals": {"rows clipped", "missing is not met", "both"},
    "gpqa inspect_evals": {"one order for all repeats"},
    "rlla toolrl": {"tags in the reference's thought"},
}


@pytest.mark.parametrize("pair", RECORDED)
def test_scores_agree_with_the_other_tools(pair):
    what, tool = pair.split()
    found = agree.compare(what, tool, *zip(*RECORDED[pair], strict=True))
    differing = {
        kind if what == "rlla" else name
        for kind, verdict, name, *_ in found
        if verdict == "differs"
    }
    assert differing == DIFFERS.get(pair, set())
    assert {verdict for _, verdict, *_ in found} <= {"equal", "differs"} | WAYS.get(pair, set())
    assert sum(row[1] == "equal" for row in found) > 15


def test_every_tool_is_recorded():
    assert {*RECORDED} == {
        f"{what} {tool}" for what, tools in agree.TOOLS.items() for tool in tools
    }
    outcomes = collections.Counter(
        scores["correct"]
        for case, scores in RECORDED["bfcl bfcl_eval"]
        if case["kind"] != "averages"
    )
    assert (
        outcomes[0] >= 8 and outcomes[1] >= 5
    )  # agreement about what is right and about what is wrong
    assert {0.0, 1.0} == {scores["format"] for _, scores in RECORDED["rlla toolrl"]}


def test_ground_truths_that_bfcl_eval_itself_rejects():
    """All others pass, there and here."""
    failed = []
    for category in bfcl.NON_LIVE + bfcl.LIVE:
        for example in bfcl.read(category) if "relevance" not in category else ():
            _, functions, truth = json.loads(example.reference)
            failed += [example.id] * (
                not bfcl.correct([""], [echo(category, functions, truth)], [example.reference])[0]
            )
    assert failed == [
        "simple_200",
        "simple_363",
        "java_22",
        "java_36",
        "java_65",
        "javascript_41",
        "parallel_multiple_26",
        "live_simple_106-63-0",
        "live_simple_112-68-0",
        "live_multiple_144-56-0",
        "live_multiple_507-149-4",
        "live_multiple_834-178-9",
        "live_multiple_862-181-3",
        "live_multiple_964-207-0",
    ]


def script(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools/agree.py", *args], capture_output=True, text=True
    )


def test_the_script_runs_another_tool(tmp_path):
    """One that takes everything to be right."""
    (tmp_path / "rlla.py").write_text(
        "def customize_format_reward_func(text, answer, step, best, worst):\n    return [best]\n"
        "customize_correctness_reward_tool = customize_format_reward_func\n"
    )
    truth = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'
    row = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": truth}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    out = script(
        "rlla",
        "--python",
        sys.executable,
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--source",
        str(tmp_path / "rlla.py"),
        "--record",
        str(tmp_path / "r.json"),
    )
    assert out.returncode == 0, out.stderr
    counts = {
        tuple(line.split()[:-1]): int(line.split()[-1])
        for line in out.stdout.partition("\n\n")[0].splitlines()
    }
    assert counts["ground", "truth", "equal"] == 3 and counts["empty", "differs"] == 3
    assert "differs: empty, 'format': here 0.0, toolrl 1.0" in out.stdout
    recorded = json.loads((tmp_path / "r.json").read_text())["rlla toolrl"]
    assert [
        {"kind": "empty", "truth": truth, "response": ""},
        {"format": 1.0, "correctness": 3.0, "format in bfcl": 1.0},
    ] in recorded


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["healthbench", "--python", "p"], "error: healthbench needs --data"),
        (["rlla", "--python", "p", "--data", "x"], "error: rlla needs --source"),
        (
            ["healthbench", "--python", "p", "--data", "nothing.jsonl"],
            "error: nothing.jsonl cannot be read",
        ),
        (["gpqa", "--python", "./nothing"], "error: --python ./nothing cannot be run"),
        (
            ["gpqa", "--python", sys.executable, "--source", "nothing"],
            "error: simple_evals could not score the cases with --python",
        ),
        (["gpqa"], "the following arguments are required: --python"),
        (["math", "--python", "p"], "invalid choice: 'math'"),
    ],
)
def test_bad_input(args, message):
    out = script(*args)
    assert out.returncode and message in out.stderr and "Traceback" not in out.stderr


def test_help():
    assert "--record" in script("--help").stdout
