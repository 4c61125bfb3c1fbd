"""Our scores against the scores that other tools gave to the same cases.

agreement.json holds {"what tool": [[case, the tool's scores], ...]}. docs/evaluate.md says which
versions they are of, and why some of their scores differ. No other tool is run here.
"""

import collections
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from test_eval import echo

import eval as evaluation
from config import EvalConfig
from rewards import Example
from tasks import bfcl, gpqa, healthbench, rlla

RECORDED = json.loads((ROOT / "tests/agreement.json").read_text())
DIFFERS = {  # the scores that no known way explains; of rlla, the kinds of case
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
AXES = (
    "axis:accuracy",
    "axis:completeness",
    "axis:communication_quality",
    "axis:context_awareness",
    "axis:instruction_following",
)


# Our scores of a case: {name: value}


def score_healthbench(case: dict, clip=False, missing=math.nan) -> dict[str, float]:
    """clip: limit every row's axes and themes to [0, 1]; we limit only their means.
    missing: what a missing verdict counts as; by default its row has no score."""
    samples = []
    for row in case["rows"]:
        verdicts = zip(row["points"], row["axes"], strict=True)
        items = tuple(healthbench.Item("", points, (AXES[axis],)) for points, axis in verdicts)
        example = Example([], json.dumps(row["themes"]), items)
        met = np.array([missing if verdict is None else verdict for verdict in row["met"]], float)
        scores, _ = healthbench.HealthBench.result(None, example, "", met)
        for name in scores:
            if clip and ":" in name:
                scores[name] = float(np.clip(scores[name], 0, 1))
        samples.append({"category": "", "scores": scores})
    table = evaluation.summarize(samples, {}, True, 0)
    return {f"{name} {stat}": table[name][stat] for name in table for stat in table[name]}


def score_gpqa(case: dict, tmp_path) -> dict[str, str | None]:
    """The letter of each response, or which of the four choices a prompt calls A, B, C and D."""
    if case["kind"] == "answers":
        return {text: gpqa.letter(text) for text in case["responses"]}
    file, repeats = tmp_path / "rows.csv", case["repeats"]
    header = ",".join(("Question", *gpqa.CHOICES))
    file.write_text("\n".join([header] + ["q,0,1,2,3"] * case["rows"]))
    task = gpqa.task(EvalConfig(task="gpqa", eval_data=str(file), repeats=repeats))
    _, examples = task.prompts(0, None)
    orders = {}
    for i, example in enumerate(examples):
        choices = example.messages[0]["content"].splitlines()[-4:]
        orders[f"{i // repeats}/{i % repeats}"] = "".join(line[-1] for line in choices)
    return orders


def score_bfcl(case: dict) -> dict[str, float]:
    if case["kind"] != "averages":
        (correct,) = bfcl.correct([""], [case["response"]], [case["reference"]])
        return {"correct": correct}
    rows = {category: [None] * n for category, n in case["sizes"].items()}
    averages = bfcl.BFCL.averages(SimpleNamespace(rows=rows))
    scores = {}
    for name, weights in averages.items():
        if "all rows" not in name:
            scores[name] = sum(w * case["accuracy"][category] for category, w in weights.items())
    return scores


def score_rlla(case: dict, whole=False) -> dict[str, float | str]:
    """whole: leave the thought in the reference, which our reader of rows takes out."""
    prompt = [{"role": "user", "content": ""}]
    row = {"prompt": prompt, "reward_model": {"ground_truth": case["truth"]}}
    reference = case["truth"] if whole else rlla.from_row(row, "").reference
    args = [""], [case["response"]], [reference]
    try:
        (correctness,) = rlla.correctness(*args)
    except ValueError:
        correctness = "raises"
    (form,), (bfcl_form,) = rlla.format_reward(*args), bfcl.right_format(*args)
    return {"format": form, "correctness": correctness, "format in bfcl": bfcl_form}


def score_in_their_way(pair: str, case: dict) -> dict[str, dict]:
    """{how the other tool differs: our scores, computed so}"""
    if pair == "healthbench inspect_evals":
        return {
            "rows clipped": score_healthbench(case, clip=True),
            "missing is not met": score_healthbench(case, missing=0.0),
            "both": score_healthbench(case, clip=True, missing=0.0),
        }
    if pair == "rlla toolrl":
        return {"tags in the reference's thought": score_rlla(case, whole=True)}
    if pair == "gpqa inspect_evals" and "rows" in case:
        rng, orders = random.Random(42), {}
        for i in range(case["rows"]):
            choices = [*"0123"]
            rng.shuffle(choices)
            for repeat in range(case["repeats"]):
                orders[f"{i}/{repeat}"] = "".join(choices)
        return {"one order for all repeats": orders}
    return {}


# How ours compare with theirs


def same(name: str, ours, theirs) -> bool:
    """Standard errors are bootstrapped: they are the same within 15% or 0.005."""
    if not (isinstance(ours, float) and isinstance(theirs, float)):
        return ours == theirs
    if name.endswith("stderr"):
        return math.isclose(ours, theirs, rel_tol=0.15, abs_tol=0.005)
    return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-9)


def compare(pair: str, case: dict, ours: dict, theirs: dict) -> dict[str, str]:
    """{name: "equal", how the other tool differs, or "differs"} for every score that both have."""
    verdicts = {}
    for name in ours.keys() & theirs.keys():
        verdicts[name] = "equal" if same(name, ours[name], theirs[name]) else "differs"
    if "differs" not in verdicts.values():
        return verdicts
    for way, scores in score_in_their_way(pair, case).items():
        for name, verdict in verdicts.items():
            if verdict == "differs" and name in scores and same(name, scores[name], theirs[name]):
                verdicts[name] = way
    return verdicts


@pytest.mark.parametrize("pair", RECORDED)
def test_scores_agree_with_the_other_tools(pair, tmp_path):
    what, _ = pair.split()
    counts, differing = collections.Counter(), set()
    for case, theirs in RECORDED[pair]:
        args = (case, tmp_path) if what == "gpqa" else (case,)
        ours = globals()[f"score_{what}"](*args)
        for name, verdict in compare(pair, case, ours, theirs).items():
            counts[verdict] += 1
            if verdict == "differs":
                differing.add(case["kind"] if what == "rlla" else name)
    assert differing == DIFFERS.get(pair, set())
    assert counts["equal"] > 15


def test_every_tool_is_recorded():
    """Of BFCL and of formats, with cases that are right and cases that are wrong."""
    assert {*RECORDED} == {
        "healthbench inspect_evals",
        "healthbench simple_evals",
        "gpqa inspect_evals",
        "gpqa simple_evals",
        "bfcl bfcl_eval",
        "rlla toolrl",
    }
    outcomes = collections.Counter(
        scores["correct"]
        for case, scores in RECORDED["bfcl bfcl_eval"]
        if case["kind"] != "averages"
    )
    assert outcomes[0] >= 8 and outcomes[1] >= 5
    assert {0.0, 1.0} == {scores["format"] for _, scores in RECORDED["rlla toolrl"]}


def test_ground_truths_that_bfcl_eval_itself_rejects():
    """All others pass, there and here."""
    failed = []
    for category in bfcl.NON_LIVE + bfcl.LIVE:
        for example in bfcl.read(category) if "relevance" not in category else ():
            _, functions, truth = json.loads(example.reference)
            response = echo(category, functions, truth)
            if bfcl.correct([""], [response], [example.reference]) == [0]:
                failed.append(example.id)
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
