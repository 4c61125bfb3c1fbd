"""Benchmarks: scoring by hand, BFCL's own ground truth through its checker, the statistics, and the
command."""

import base64
import contextlib
import importlib.machinery
import io
import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, missing, needs_vllm, nothing_is_loaded
from judge_server import Server, names, prompt_of, yes
from programs import command, evaluate_here, launch, python, read_lines, run, write_lines

import eval as evaluation
import local.hf
import rollout
import tasks
import tools.compare as comparison
from config import EvalConfig, TrainConfig
from infra import prompts
from infra.ranks import InputError
from local import hf
from rewards import Channel, Example, Task
from tasks import bfcl, gpqa, healthbench, rows, tools
from tools import stats


def options(task: str, path: Path | None = None, **others) -> EvalConfig:
    return EvalConfig(task=task, eval_data=path and str(path), **others)


def records(task: Task, examples: list[Example], texts: list[str]) -> list[dict]:
    """The lines of samples.jsonl, with these responses to the examples."""
    groups = []
    for example, text in zip(examples, texts, strict=True):
        responses = [rollout.Response([], [], [], "stop", text)]
        rewards = torch.from_numpy(task.start(example, [text])())
        prompt = prompts.Prompt([], example)
        groups.append(rollout.Group(prompt, task.channels(example), responses, rewards))
    return evaluation.records(task, groups)


def marks(task: Task, example: Example, text: str) -> dict[str, float]:
    (record,) = records(task, [example], [text])
    return record["scores"]


def means_of(metrics: dict[str, dict]) -> dict[str, float]:
    return {name: metric["mean"] for name, metric in metrics.items()}


# HealthBench


def test_healthbench_score_by_hand():
    met = np.array([1, 0, 1, 1])
    assert healthbench.score([7, 5, 10, -6], met) == pytest.approx(11 / 22)
    assert healthbench.score([7, -6], np.array([0, 1])) == pytest.approx(-6 / 7)  # not clipped
    assert np.isnan(healthbench.score([-6, -1], np.array([0, 1])))  # no positive points: skipped
    # A missing verdict is not a 0.
    assert np.isnan(healthbench.score([7, 5], np.array([1, np.nan])))


def item(criterion: str, points: int, *tags: str) -> dict:
    return {"criterion": criterion, "points": points, "tags": [*tags]}


HEALTH = [
    {
        "prompt_id": "a",
        "prompt": [{"role": "user", "content": "ache"}],
        "example_tags": ["theme:hedging", "physician_agreed_category:x"],
        "rubrics": [
            item("c1", 7, "level:example", "axis:accuracy"),
            item("c2", 5, "axis:accuracy"),
            item("c3", 10, "axis:completeness"),
            item("c4", -6, "axis:communication_quality"),
        ],
    },
    {
        "prompt_id": "b",
        "prompt": [{"role": "user", "content": "cough"}],
        "example_tags": ["theme:communication"],
        "rubrics": [item("c5", 3, "axis:completeness"), item("bad", -9, "axis:accuracy")],
    },
]


def of_healthbench(folder: Path, server: Server) -> str:
    """Words that evaluate both rows of HEALTH."""
    write_lines(folder / "h.jsonl", HEALTH)
    return f"--task healthbench --eval-data h.jsonl --max-tokens 8 {server.options}"


def meets_some(body: dict, number: int) -> str:
    """Four criteria are met. Each is asked in a request of its own."""
    met = any(f' {criterion}"' in prompt_of(body) for criterion in ("c1", "c3", "c4", "bad"))
    return json.dumps({"explanation": "x", **dict.fromkeys(names(body), met)})


def test_healthbench(evaluate, tmp_path):
    server = Server(meets_some)
    results, (a, b) = evaluate(of_healthbench(tmp_path, server))
    # Its only item has no positive points: it is skipped.
    assert a["scores"].pop("axis:communication_quality") is None
    assert a["scores"] == pytest.approx(
        {
            "overall": 11 / 22,
            "theme:hedging": 11 / 22,
            "axis:accuracy": 7 / 12,
            "axis:completeness": 1.0,
        }
    )
    assert b["scores"]["overall"] == -3
    assert b["responses"][0]["met"] == [0, 1]
    metrics = results["metrics"]
    assert means_of(metrics) == pytest.approx(
        {
            "overall": 0.0,
            "theme:hedging": 0.5,
            "theme:communication": 0.0,
            "axis:accuracy": 7 / 12,
            "axis:completeness": 0.5,
        }
    )
    assert metrics["overall"]["n"] == 2 and metrics["axis:accuracy"]["n"] == 1
    assert results["judge"]["requests"] == 6
    assert results["settings"]["judge_model"] == "m"
    prompt = next(prompt for prompt in server.prompts() if " c4" in prompt)
    assert r'"\u005b-6] c4"' in prompt
    assert '"explanation"' in prompt
    assert '"user": "ache"' in prompt


def test_healthbench_clips_the_mean_and_bootstraps():
    values = [-3.0, 0.5, 0.7, 1.0]
    samples = []
    for i, value in enumerate(values):
        samples.append({"id": str(i), "category": "", "scores": {"overall": value}})
    clipped = evaluation.summarize(samples, {}, True, 0)["overall"]
    plain = evaluation.summarize(samples, {}, False, 0)["overall"]
    assert clipped["mean"] == 0 and plain["mean"] == pytest.approx(-0.2)
    draws = np.random.default_rng(1).choice(values, (20_000, 4)).mean(1)
    assert clipped["stderr"] == pytest.approx(draws.clip(0, 1).std(), rel=0.1)
    assert plain["stderr"] == pytest.approx(draws.std(), rel=0.1)


def test_healthbench_without_enough_verdicts_keeps_the_responses(evaluate, tmp_path):
    def answer(body: dict, number: int) -> str:
        if number == 1:  # asked before the run
            return '{"criterion_1": true}'
        return '{"explanation": "x", "criterion_1": "true"}'

    with pytest.raises(InputError, match="100% of the rows have a verdict missing"):
        evaluate(of_healthbench(tmp_path, Server(answer)))
    first, _ = read_lines(tmp_path / "runs/a/samples.jsonl")
    assert first["responses"][0]["met"] == [None] * 4
    assert first["scores"]["overall"] is None
    assert not (tmp_path / "runs/a/results.json").exists()


def test_one_missing_verdict_leaves_its_row_out(evaluate, tmp_path):
    def answer(body: dict, number: int):
        return (400, "too long") if " c2" in prompt_of(body) else yes(body, number)

    words = of_healthbench(tmp_path, Server(answer))
    results, (first, _) = evaluate(words, "--judge-max-missing 0.6")
    assert first["scores"]["overall"] is None
    assert first["scores"]["axis:completeness"] == 1
    assert results["metrics"]["overall"] == pytest.approx({"mean": 0, "stderr": 0, "n": 1})
    assert results["judge"]["missing"] == pytest.approx(1 / 6)
    assert results["judge"]["rows_missing"] == 0.5
    message = "50% of the rows have a verdict missing, more than --judge-max-missing 0.2"
    with pytest.raises(InputError, match=message):
        evaluate(words, name="b")


def test_rubrics_are_evaluated_like_any_task(evaluate, tmp_path):
    server = Server(yes)
    rubric = [
        {"description": "a", "weight": 5},
        {"description": "b", "weight": -1},
        {"description": "c", "weight": 4},
        {"description": "d"},
    ]
    rubrics = [{"question": question, "rubric": rubric} for question in "qr"]
    write_lines(tmp_path / "r.jsonl", rubrics)
    words = "--task rar-science --eval-data r.jsonl --limit 1 --max-tokens 4"
    results, (sample,) = evaluate(words, server.options)
    assert sample["scores"] == {"joint": 0, "essential": 1, "pitfall": 0, "important": 1}
    assert sample["responses"][0]["rewards"] == {"1 a": 1, "2 b": 0, "3 c": 1, "4 d": 1}
    assert results["judge"]["missing"] == 0 and results["judge"]["requests"] == 4
    assert results["settings"]["judge_model"] == "m"


# GPQA

GPQA = """\
Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Record ID
"Secret ""one"",
in two lines?",right1,w1,x1,y1,rec1
Secret two?,right2,w2,x2,y2,rec2
Secret three?,right3,w3,x3,y3,rec3
"""


def of_gpqa(
    folder: Path, text: str = GPQA, limit: int | None = None, **others
) -> tuple[Task, list[Example]]:
    """The task, and its examples: two of each row."""
    (folder / "g.csv").write_text(text)
    task = gpqa.task(options("gpqa", folder / "g.csv", repeats=2, **others))
    _, examples = task.prompts(0, limit)
    return task, examples


def test_gpqa_permutations_are_simple_evals(tmp_path):
    """Rows repeated, then one permutation each from Random(0), in order."""
    task, examples = of_gpqa(tmp_path)
    rng = random.Random(0)
    for repeat, i in itertools.product(range(2), range(3)):
        order = rng.sample(range(4), 4)
        text = examples[2 * i + repeat].messages[0]["content"]
        choices = [f"right{i + 1}", f"w{i + 1}", f"x{i + 1}", f"y{i + 1}"]
        shown = zip("ABCD", order, strict=True)
        assert text.splitlines()[-4:] == [f"{letter}) {choices[k]}" for letter, k in shown]
        letter = "ABCD"[order.index(0)]
        answers = ["Answer: E"] * 2
        answers[repeat] = f"so\nAnswer: {letter}"
        (record,) = records(task, examples[2 * i : 2 * i + 2], answers)
        assert record["scores"] == {"accuracy": 0.5, "answered": 0.5}
        response = record["responses"][repeat]
        assert response["correct"] == response["letter"] == letter


def test_gpqa_examples(tmp_path):
    _, examples = of_gpqa(tmp_path)
    assert 'Secret "one",\nin two lines?' in examples[0].messages[0]["content"]
    assert [example.id for example in examples] == "rec1 rec1 rec2 rec2 rec3 rec3".split()
    _, of_two_rows = of_gpqa(tmp_path, limit=2)
    assert len(of_two_rows) == 4
    _, of_another_seed = of_gpqa(tmp_path, seed=1)
    assert of_another_seed != examples


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("answer : $c$", "C"),
        ("Answer: A\nAnswer: B", "A"),
        ("The answer is B", None),
        ("Answer:\nB", None),
        ("**Answer: D**", "D"),
        ("", None),
        ("Answer: E", None),
        ("<think> Answer: B? No. </think>\n\nAnswer: C", "C"),
        ("I think Answer: B.</think>Answer: C", "C"),
        ("<think> The answer: B", None),
    ],
)
def test_gpqa_letter(response, letter):
    assert gpqa.letter(response) == letter


def test_gpqa_items_are_not_published(evaluate, monkeypatch, tmp_path):
    answer = "Secret two? is right2. Answer: A"

    def make_response(tokens, logp, finish, *others):
        return rollout.Response(tokens, logp, [], finish, answer)

    (tmp_path / "g.csv").write_text(GPQA)
    monkeypatch.setattr(local.hf, "make_response", make_response)
    results, samples = evaluate("--task gpqa --eval-data g.csv --max-tokens 4 --repeats 2")
    for file in (tmp_path / "runs/a").iterdir():
        text = file.read_text()
        assert not any(secret in text for secret in ("Secret", "right", "w1", "x2"))
    assert base64.b64decode(samples[1]["responses"][0]["base64"]).decode() == answer
    assert results["metrics"]["answered"]["mean"] == 1 and len(samples) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Question\nq\n", "row 0 lacks a column"),
        (GPQA + "q,,a,b,c,d\n", "row 3 lacks a column"),
        (GPQA + "q,a,b,c,d,rec1\n", "the same id"),
        ('"a\n', "cannot be read"),
    ],
)
def test_bad_gpqa_rows(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        of_gpqa(tmp_path, text)


# BFCL


def echo(category: str, functions: list[dict], truth: list[dict]) -> str:
    """A response that says the ground truth."""
    kinds = {function["name"]: function["parameters"]["properties"] for function in functions}
    lines = []
    for call in truth:
        ((name, accepted),) = call.items()
        parameters = first_accepted(accepted)
        if category in ("java", "javascript"):
            for key, value in parameters.items():
                kind = "String"
                if category == "java" and key in kinds.get(name, {}):
                    kind = kinds[name][key]["type"]
                parameters[key] = literal(value, kind)
        lines.append(json.dumps({"name": name, "parameters": parameters}))
    return "<think> t </think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


def first_accepted(accepted: dict[str, list]) -> dict:
    """Of each parameter the first value that the ground truth accepts; "" says that it may be left
    out."""
    parameters = {}
    for key, values in accepted.items():
        if values and values[0] != "":
            parameters[key] = plain(values[0])
    return parameters


def plain(value):
    """A value in which an object has lists of accepted values, too."""
    if isinstance(value, list):
        return [plain(x) if isinstance(x, dict) else x for x in value]
    if isinstance(value, dict):
        return {key: values[0] for key, values in value.items() if values and values[0] != ""}
    return value


def literal(value, kind: str) -> str:
    """The value as Java or JavaScript source, as the checker's converters read it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and kind == "ArrayList":
        items = ", ".join(literal(x, "json") for x in value)
        return f"new ArrayList<String>(Arrays.asList({items}))"
    if isinstance(value, list) and kind == "Array":
        # The converter keeps quotes as a part of the string.
        return f"new String[]{{{', '.join(map(str, value))}}}"
    if isinstance(value, dict) and kind == "HashMap":
        puts = " ".join(f'put("{key}", {literal(x, "json")});' for key, x in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    if kind in ("long", "float"):
        return f"{value}{kind[0].upper()}"
    return value if isinstance(value, str) and kind != "json" else json.dumps(value)


SIZES = {
    "simple": 400,
    "java": 100,
    "javascript": 50,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "irrelevance": 240,
    "live_simple": 258,
    "live_multiple": 1053,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
    "live_irrelevance": 882,
    "live_relevance": 18,
}


@pytest.fixture(scope="module")
def of_bfcl():
    return bfcl.task(options("bfcl"))


def test_bfcl_has_the_rows_of_v3(of_bfcl):
    _, examples = of_bfcl.prompts(0, None)
    categories = [example.category for example in examples]
    assert {category: categories.count(category) for category in SIZES} == SIZES
    assert len(examples) == len({example.id for example in examples}) == 3641
    _, three_each = of_bfcl.prompts(0, 3)
    assert len(three_each) == 3 * 13


def test_bfcl_ground_truth_passes_its_checker(of_bfcl):
    """The rest is the data's own: a few rows require a parameter that their answer leaves out."""
    passed = total = 0
    _, examples = of_bfcl.prompts(0, None)
    for example in examples:
        category, functions, truth = json.loads(example.reference)
        assert category == example.category
        if "relevance" in category:
            continue
        right = echo(category, functions, truth)
        scores = marks(of_bfcl, example, right)
        assert scores["format"] == 1
        passed += scores["correct"]
        total += 1
        wrong = right.replace('{"name": "', '{"name": "x')
        assert marks(of_bfcl, example, wrong)["correct"] == 0
    print(f"{passed:.0f} of {total}")
    assert total == 2501 and passed / total >= 0.99


def test_bfcl_relevance_and_format(of_bfcl):
    call = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>'
    refusal = "<think> t </think>\n<response> I have no tool for that. </response>"
    _, examples = of_bfcl.prompts(0, None)
    by_category = {example.category: example for example in examples}
    for category, response, correct, well_formed in (
        ("irrelevance", call, 0, 1),
        ("irrelevance", refusal, 1, 1),
        ("live_irrelevance", "text", 1, 0),
        ("live_relevance", call, 1, 1),
        ("live_relevance", refusal, 0, 1),
        ("live_relevance", call.replace("{}", "3"), 0, 1),
        ("simple", refusal, 0, 1),
        ("simple", call, 0, 1),
        ("parallel", "", 0, 0),
    ):
        scores = marks(of_bfcl, by_category[category], response)
        assert scores["correct"] == correct, (category, response)
        assert scores["format"] == well_formed, (category, response)


CALLS = """\
<tool_call>
{"name": "f", "parameters": {"x": 1}}
bad line
{"name": "g"}
[]
{"name": "h", "parameters": {}}
</tool_call>"""
LAST_CALL = '<tool_call>\n{"name": "last", "parameters": {}}\n</tool_call> text'


def test_bfcl_calls_are_read_as_toolrl_reads_them():
    assert bfcl.calls(CALLS) == [{"f": {"x": 1}}, {"h": {}}]
    assert bfcl.calls(CALLS + LAST_CALL) == [{"last": {}}]
    assert bfcl.calls('{"name": "f", "parameters": {}}') == []
    assert bfcl.calls("") == bfcl.calls("[" * 50_000) == []


def test_bfcl_prompt_is_toolrls(of_bfcl):
    _, examples = of_bfcl.prompts(0, 1)
    system, user = (message["content"] for message in examples[0].messages)
    assert "\n1. Name: calculate_triangle_area\nDescription: Calculate the area" in system
    assert '\nParameters: {"base": {"type": "integer"' in system
    assert (
        '{"name": "Tool name", "parameters": '
        '{"Parameter name": "Parameter content", "... ...": "... ..."}}'
    ) in system
    assert user == (
        "**Dialogue Records History**\n<user> Find the area of a triangle with a base of 10 units "
        "and height of 5 units. </user>"
    )
    java = next(example for example in examples if example.category == "java")
    system_of_java = java.messages[0]["content"]
    assert "Java 8 SDK syntax" in system_of_java
    assert "in string representation" in system_of_java


RIGHT = {  # the share of each category's answers that are right; of others none
    "simple": 0.9,
    "java": 0.6,
    "javascript": 0.3,
    "multiple": 0.8,
    "parallel": 0.4,
    "irrelevance": 0.5,
    "live_simple": 0.5,
    "live_irrelevance": 1.0,
}


def test_bfcl_averages_by_hand(of_bfcl):
    averages = of_bfcl.averages()
    for weights in averages.values():
        assert sum(weights.values()) == pytest.approx(1)
    samples = []
    for category, i in itertools.product(SIZES, range(10)):
        scores = {"correct": float(i < 10 * RIGHT.get(category, 0)), "format": 1.0}
        samples.append({"id": f"{category}{i}", "category": category, "scores": scores})
    means = means_of(evaluation.summarize(samples, averages, False, 0))
    assert means["non-live"] == pytest.approx((0.6 + 0.8 + 0.4 + 0 + 0.5) / 5)
    assert means["live"] == pytest.approx((0.5 * 258 + 882) / 2251)
    assert means["non-live AST"] == pytest.approx((0.6 + 0.8 + 0.4 + 0) / 4)
    assert means["live AST"] == pytest.approx(0.5 * 258 / 1351)
    both = (means["live"] + means["non-live"]) / 2
    assert means["v3 without multi-turn (live, non-live)"] == pytest.approx(both)
    assert means["java"] == pytest.approx(0.6) and means["format"] == 1


def test_bfcl_eval_missing_or_of_v4(monkeypatch, tmp_path):
    of_v4 = importlib.machinery.ModuleSpec("bfcl_eval", None, origin=str(tmp_path / "__init__.py"))
    for spec in (None, of_v4):
        monkeypatch.setattr(bfcl.importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(InputError, match="pip install --no-deps bfcl-eval"):
            bfcl.package.__wrapped__()


# Comparing


def result(folder: Path, name: str, scores: list, task: str = "gpqa", **settings) -> Path:
    """results.json as eval.py writes it, and beside it samples.jsonl with these scores."""
    run = folder / name
    run.mkdir()
    settings = {"items": "x", "model": name, **settings}
    content = {"task": task, "settings": settings, "averages": {}, "metrics": {}}
    (run / "results.json").write_text(json.dumps(content))
    samples = []
    for i, of_item in enumerate(scores):
        samples.append({"id": str(i), "category": "", "scores": of_item})
    write_lines(run / "samples.jsonl", samples)
    return run / "results.json"


def test_compare_against_exact_tests(tmp_path):
    """Eight pairs: all 256 sign flips enumerated, and the bootstrap interval from as many draws of
    our own."""
    rng = np.random.default_rng(0)
    x, y = rng.random(8), rng.random(8) + 0.25
    first = result(tmp_path, "a", [{"s": value} for value in x])
    second = result(tmp_path, "b", [{"s": value} for value in y])
    (row,) = comparison.compare(first, second)
    d = y - x
    signs = np.array([*itertools.product([-1, 1], repeat=8)])
    exact = np.mean(abs(signs @ d) >= abs(d.sum()) - 1e-12)
    assert row["difference"] == pytest.approx(d.mean())
    assert row["p"] == pytest.approx(exact, abs=0.015)
    assert row["n"] == 8
    draws = rng.choice(d, (100_000, 8)).mean(1)
    assert [row["low"], row["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_compare_is_paired_corrected_and_leaves_missing_pairs_out(tmp_path):
    rng = np.random.default_rng(1)
    base = rng.random(200)  # items differ far more than the two models do
    first = [{"overall": v, "axis:a": v, "axis:b": v} for v in base]
    second = []
    for v, (x, y) in zip(base, rng.standard_normal((200, 2)), strict=True):
        gain = 0.02 + 0.02 * x
        second.append({"overall": v + gain, "axis:a": v + 0.01 * y, "axis:b": v + 0.02})
    second[0]["axis:b"] = None
    overall, a, b = comparison.compare(result(tmp_path, "a", first), result(tmp_path, "b", second))
    assert overall["p"] < 0.001 and overall["low"] > 0.01
    assert "p_holm" not in overall
    assert a["p"] > 0.01
    assert a["p_holm"] == pytest.approx(max(a["p"], 2 * b["p"]))
    assert b["n"] == 199
    assert b["p_holm"] == pytest.approx(2 * b["p"])
    same = comparison.compare(tmp_path / "a/results.json", tmp_path / "a/results.json")
    assert all(row["difference"] == 0 and row["p"] == 1 for row in same)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


def test_compare_refuses_what_cannot_be_compared(tmp_path):
    good = result(tmp_path, "good", [{"s": 1.0}])
    for name, settings, message in (
        ("items", {"items": "y"}, "different items"),
        ("heat", {"temperature": 1}, "temperature is None in"),
        ("task", {"task": "bfcl"}, "task is gpqa"),
    ):
        other = result(tmp_path, name, [{"s": 1.0}], **settings)
        with pytest.raises(InputError, match=f"cannot be compared: .*{message}"):
            comparison.compare(good, other)
    more = result(tmp_path, "more", [{"s": 1.0}, {"s": 0.0}])
    with pytest.raises(InputError, match="different items"):
        comparison.compare(good, more)
    other = result(tmp_path, "other", [{"t": 1.0}])
    with pytest.raises(InputError, match="no metric in common"):
        comparison.compare(good, other)


def test_compare_refuses_what_eval_did_not_write(tmp_path):
    good = result(tmp_path, "good", [{"s": 1.0}])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/results.json").write_text("{}")
    twice = result(tmp_path, "twice", [{"s": 1.0}])
    write_lines(tmp_path / "twice/samples.jsonl", [{"id": "0", "category": "", "scores": {}}] * 2)
    bad = [tmp_path / "broken/results.json", tmp_path / "missing/results.json", twice]
    bad.append(result(tmp_path, "none", []))
    odd = ["text", None, [1], {"s": "0.5"}, {"s": [1]}, {"s": float("inf")}]
    for number, scores in enumerate(odd):
        bad.append(result(tmp_path, f"odd{number}", [scores]))
    for path in bad:
        with pytest.raises(InputError, match="cannot be read as eval.py writes them"):
            comparison.compare(good, path)


def test_compare_says_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    """Before it prints anything."""
    monkeypatch.chdir(tmp_path)
    result(tmp_path, "good", [{"s": 1.0}])
    for folder in ("kept/step-2", "kept/step-10", "trained", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "trained/metrics.jsonl").touch()
    for other, message in (
        ("kept", "kept holds evaluations of several policies: name one, such as kept/step-10"),
        (
            "trained",
            "trained is a run of train.py, which compare cannot read: evaluate it first, with "
            "python eval.py --model trained --task ..., and name the directory that this prints",
        ),
        ("empty", "empty: no results of eval.py are there; name its directory, such as runs/NAME"),
        ("nothing", "nothing: no results of eval.py are there"),
    ):
        with pytest.raises(InputError) as error:
            comparison.main(["good", other])
        assert str(error.value).startswith(message)
    message = "usage: python tools/compare.py runs/A runs/B, each a directory"
    with pytest.raises(InputError, match=message):
        comparison.main(["good"])
    assert capsys.readouterr().out == ""


# Any task


def test_scores_of_one_id_are_averaged_without_those_that_are_missing():
    def number(prompts, responses, references):
        return [float(response) for response in responses]

    task = Task(None, [Channel("a", number), Channel("b", missing)])
    question = [{"role": "user", "content": "q"}]
    examples = [
        Example(question, "r", id="x"),
        Example(question),
        Example(question, id="x"),
        Example(question, id="x", category="other"),
    ]
    first, second, third = records(task, examples, ["1", "0.5", "nan", "0"])
    assert first["id"] == "x" and first["category"] == ""
    assert second["id"] == "1" and third["category"] == "other"
    assert first["scores"]["a"] == 1 and math.isnan(first["scores"]["b"])
    assert second["scores"]["a"] == 0.5
    assert first["responses"] == [
        {"prompt": question, "response": "1", "reference": "r"},
        {"prompt": question, "response": "nan", "reference": ""},
    ]


def test_benchmarks_are_not_for_training():
    for name in ("bfcl", "gpqa", "healthbench"):
        with pytest.raises(InputError, match=f"--task {name}: a benchmark is not for training"):
            tasks.load_task(TrainConfig(task=name))


WITHOUT_ROWS = """
from rewards import Channel, Task
def task(options):
    return Task(lambda n, m: ([], []), [Channel("a")])
"""


def test_a_task_without_rows(evaluate, tmp_path):
    (tmp_path / "mine.py").write_text(WITHOUT_ROWS)
    with pytest.raises(InputError, match="mine.py: no rows to evaluate on"):
        evaluate("--task mine.py")


# The command


def test_a_training_task_is_evaluated_by_its_own_rewards(evaluate):
    results, samples = evaluate("--task tools --limit 3 --max-tokens 16")
    first, second, _ = tools.examples(3, "test")
    assert set(results["metrics"]) == {"joint", *tools.values("", first.reference)}
    sample = samples[1]
    (response,) = sample["responses"]
    (rewards,) = tools.task(options("tools")).start(second, [response["response"]])()
    assert [*sample["scores"].values()][1:] == rewards.tolist()
    assert response["reference"] == second.reference
    assert len(samples) == 3


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """A folder in which the command has evaluated twice: runs/b on one rank, runs/c on two; and
    what it printed for b."""
    folder = tmp_path_factory.mktemp("evaluated")
    _, example, _ = tools.examples(3, "test")
    _, _, answer = example.reference.rpartition("</think>\n")
    truth = {"ground_truth": f"<think> t </think>\n{answer}"}
    rows = [{"prompt": example.messages, "reward_model": truth}] * 2
    (folder / "rlla.json").write_text(json.dumps(rows))
    words = ["--model", tiny, "--engine hf --task rlla --eval-data rlla.json --max-tokens 8"]
    printed = command(*words, "--name b", cwd=folder, script="eval.py")
    command(*words, "--name c", cwd=folder, ranks=2, script="eval.py")
    return folder, printed


def test_the_command_prints_its_table(evaluated):
    _, printed = evaluated
    assert "correctness  -3.000 (0.000)  n=2" in printed


def test_two_ranks_write_the_samples_of_one(evaluated):
    """Sampling is greedy."""
    folder, _ = evaluated
    samples = (folder / "runs/b/samples.jsonl").read_text()
    assert samples == (folder / "runs/c/samples.jsonl").read_text()


def test_compare_prints_its_table(evaluated):
    folder, _ = evaluated
    printed = command("runs/b runs/c/results.json", cwd=folder, script="tools/compare.py")
    assert printed.count("1.0000") >= 3
    assert printed.startswith("A: runs/b\nB: runs/c/results.json\n")
    _, _, head, *_ = printed.splitlines()
    assert head.split()[:5] == ["A", "B", "B", "-", "A"]


# Every policy that a run has kept

LETTERS = """
from rewards import Channel, Example, Task

WORDS = "one two three four five six seven eight nine ten".split()
EXAMPLES = [Example([{"role": "user", "content": f"Say {word}"}], word) for word in WORDS]

def vowels(prompts, responses, references):
    return [sum(c in "aeiou" for c in r) / max(1, len(r)) for r in responses]

def lengths(prompts, responses, references):
    return [float(len(r)) for r in responses]

def task(options):
    channels = [Channel("vowels", vowels), Channel("tokens", lengths, weight=0)]
    return Task(lambda n, m: (EXAMPLES[:6], EXAMPLES[6:]), channels)
"""
OF_LETTERS = "--task letters.py --model runs/trained --max-tokens 12"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with runs/trained, which has kept its policies after 0, 2 and 3 steps; they answer
    differently."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "letters.py").write_text(LETTERS)
    words = "--task letters.py --steps 3 --eval-every 2 --max-tokens 16 --lr 1e-2 --keep-policies"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, folder, words, name="trained")
    (folder / "runs/trained/policies/step-9.part").mkdir()  # of a run that was killed
    return folder


@pytest.fixture(scope="module")
def all_kept(kept):
    """Evaluates every kept policy into runs/all. Returns what was loaded, and the printed lines."""
    loaded = []
    load = hf.load

    def noting(path, *others):
        loaded.append(path.name)
        return load(path, *others)

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.chdir(kept)
        monkeypatch.setattr(hf, "load", noting)
        evaluate_here(OF_LETTERS, "--engine hf --policies --name all")
    return loaded, printed.getvalue().splitlines()


def outcomes(folder: Path) -> dict[str, tuple[dict, list[dict]]]:
    """{step-N: (metrics, lines of samples.jsonl)}."""
    found = {}
    for path in folder.glob("step-*"):
        metrics = json.loads((path / "results.json").read_text())["metrics"]
        found[path.name] = metrics, read_lines(path / "samples.jsonl")
    return found


def test_every_kept_policy_is_evaluated_by_one_engine(kept, all_kept):
    loaded, (how, header, *table) = all_kept
    assert how.startswith("letters.py: ") and "one sample each at temperature 0" in how
    assert loaded == ["step-0"]
    assert header.split() == ["joint", "vowels", "tokens"]
    found = outcomes(kept / "runs/all")
    assert {*found} == {"step-0", "step-2", "step-3"}
    assert len({json.dumps(samples) for _, samples in found.values()}) == 3
    for line, step in zip(table, ("step-0", "step-2", "step-3"), strict=False):
        metrics, samples = found[step]
        assert len(samples) == 4
        assert line.split()[0] == step
        assert f"{metrics['vowels']['mean']:.3f} ({metrics['vowels']['stderr']:.3f})" in line


@pytest.mark.parametrize(
    ("source", "step"),
    [("runs/trained/policies/step-2", "step-2"), ("runs/trained", "step-3")],
    ids=["one of them", "the run's last"],
)
def test_a_kept_policy_is_evaluated_as_it_would_be_alone(kept, all_kept, monkeypatch, source, step):
    monkeypatch.chdir(kept)
    evaluate_here(OF_LETTERS, "--engine hf --model", source, "--name", f"alone-{step}")
    alone, among_others = kept / f"runs/alone-{step}", kept / "runs/all" / step
    samples = (alone / "samples.jsonl").read_text()
    assert samples == (among_others / "samples.jsonl").read_text()
    results = json.loads((alone / "results.json").read_text())
    expected = json.loads((among_others / "results.json").read_text())
    assert results["settings"].pop("model") == source
    assert expected["settings"].pop("model") == f"runs/trained/policies/{step}"
    assert results == expected
    compared = comparison.compare(among_others / "results.json", alone / "results.json")
    assert {row["difference"] for row in compared} == {0}


def test_two_ranks_evaluate_kept_policies_as_one_does(kept, all_kept):
    _, printed = all_kept
    words = [OF_LETTERS, "--engine hf --policies --name two"]
    out = command(*words, cwd=kept, ranks=2, script="eval.py")
    assert outcomes(kept / "runs/two") == outcomes(kept / "runs/all")
    assert out.splitlines()[:4] == printed[:4]


@needs_vllm
def test_vllm_evaluates_every_kept_policy(kept, all_kept):
    """The same greedy text as transformers: no weight and no cached prefix of the policy before is
    left."""
    words = [OF_LETTERS, "--engine vllm --policies --name of_vllm"]
    command(*words, cwd=kept, script="eval.py")
    assert outcomes(kept / "runs/of_vllm") == outcomes(kept / "runs/all")


@pytest.fixture
def part(kept, all_kept, monkeypatch, tmp_path):
    """runs/part in another folder, which nothing is missing of yet. Words that evaluate into it."""
    (tmp_path / "letters.py").write_text(LETTERS)
    shutil.copytree(kept / "runs/all", tmp_path / "runs/part")
    (tmp_path / "runs/trained").symlink_to(kept / "runs/trained")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/part", f"{OF_LETTERS} --engine hf --policies --name part"


def test_an_evaluation_of_policies_goes_on_where_it_broke_off(part):
    """What is missing is done, what is there stays as it is."""
    folder, words = part
    whole = outcomes(folder)
    (folder / "step-2/results.json").unlink()  # killed between its two files
    shutil.rmtree(folder / "step-3")
    written = (folder / "step-0/results.json").stat().st_mtime_ns
    evaluate_here(words)
    assert outcomes(folder) == whole
    assert (folder / "step-0/results.json").stat().st_mtime_ns == written


def test_an_evaluation_of_policies_that_is_finished_loads_nothing(part, monkeypatch):
    _, words = part
    nothing_is_loaded(monkeypatch)
    evaluate_here(words)


def test_an_evaluation_of_policies_does_not_go_on_with_another(part):
    folder, words = part
    message = (
        "step-0/results.json is of another evaluation: max_tokens is 12 there, and 13 now; "
        "choose another --name"
    )
    with pytest.raises(InputError, match=message):
        evaluate_here(words, "--max-tokens 13")
    (folder / "step-0/results.json").write_text("{")
    with pytest.raises(InputError, match="step-0/results.json cannot be read"):
        evaluate_here(words)
    with pytest.raises(InputError, match="holds something else than a run"):
        evaluate_here(words, "--name trained")


def write_policies(folder: Path, tables: dict[int, dict[str, tuple[float, float]]]) -> dict:
    """As eval.py --policies leaves it. Returns what print_policies is given."""
    out = {}
    for step, table in tables.items():
        metrics = {}
        for name, (mean, error) in table.items():
            metrics[name] = {"mean": mean, "stderr": error, "n": 9}
        path = folder / f"step-{step}"
        path.mkdir(parents=True)
        (path / "results.json").write_text(json.dumps({"metrics": metrics}))
        out[path] = metrics
    return out


OF_A = {  # mean and standard error, of each step
    0: {"overall": (0.1, 0.01), "other": (0.9, 0.02)},
    5: {"overall": (0.4, 0.03)},
    10: {"overall": (0.4, 0.05), "other": (0.2, 0.06)},
}
OF_B = {0: {"overall": (0.1, 0.01)}, 9: {"overall": (0.3, 0.02)}}


def test_best_and_final_policies_are_marked(tmp_path, capsys):
    """By the first metric; of equal ones the earliest; in steps' order, which is not that of their
    names."""
    evaluation.print_policies(write_policies(tmp_path / "runs/a", OF_A))
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:4]] == [
        ["overall", "other"],
        ["step-0", "0.100", "(0.010)", "0.900", "(0.020)"],
        ["step-5", "BEST", "0.400", "(0.030)", "-"],
        ["step-10", "FINAL", "0.400", "(0.050)", "0.200", "(0.060)"],
    ]
    evaluation.print_policies(write_policies(tmp_path / "runs/b", OF_B))
    _, _, last, *_ = capsys.readouterr().out.splitlines()
    assert last.split() == ["step-9", "BEST", "FINAL", "0.300", "(0.020)"]


def test_plot_of_evaluated_policies(tmp_path):
    write_policies(tmp_path / "runs/a", OF_A)
    write_policies(tmp_path / "runs/b", OF_B)
    words = "runs/a runs/b --out both.png"
    _, *rows = command(words, cwd=tmp_path, script="tools/plot.py").splitlines()
    assert [row.split() for row in rows] == [
        ["runs/a", "overall", "0.100", "(0.010)", "0.400", "(0.030)", "5", "0.400", "(0.050)"],
        ["runs/b", "overall", "0.100", "(0.010)", "0.300", "(0.020)", "9", "0.300", "(0.020)"],
        ["both.png"],
    ]
    assert (tmp_path / "both.png").stat().st_size > 5000
    (tmp_path / "runs/b/step-12").mkdir()  # an evaluation that was broken off
    result = launch("runs/b", cwd=tmp_path, script="tools/plot.py")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: runs/b/step-12/results.json cannot be read")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            None,
            "--policies: runs/there/policies has no step-N: name a run of train.py --keep-policies",
        ),
        ("step-x", "has no step-N"),
        ("step-3", "step-3 needs a config.json and weights"),
        ("step-3/model.safetensors", "step-3 cannot be loaded"),
        (
            "step-3/config.json",
            "step-3 is quantized (its config.json has a quantization_config) and cannot be trained",
        ),
    ],
)
def test_a_run_without_whole_policies(evaluate, monkeypatch, tiny, tmp_path, broken, message):
    nothing_is_loaded(monkeypatch)
    policies = tmp_path / "runs/there/policies"
    if broken is None:
        policies.parent.mkdir(parents=True)
    elif "/" not in broken:
        (policies / broken).mkdir(parents=True)
    else:
        shutil.copytree(tiny, policies / "step-0")
        shutil.copytree(tiny, policies / "step-3")
        (policies / broken).write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(InputError) as error:
        evaluate("--task tools --model runs/there --policies")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs/a").exists()


@needs_vllm
def test_vllm_and_transformers_answer_alike(evaluate, own_head, tmp_path):
    """Greedy, from the checkpoint as it is, which has a head of its own, though its config.json
    denies it."""
    words = ["--task tools --limit 4 --max-tokens 12 --model", own_head]
    _, samples = evaluate(*words)
    command(*words, "--engine vllm --name vllm", cwd=tmp_path, script="eval.py")
    of_vllm = read_lines(tmp_path / "runs/vllm/samples.jsonl")
    assert [sample["responses"] for sample in of_vllm] == [s["responses"] for s in samples]


def test_a_wrong_option_does_not_wait_for_torch():
    for words, code, message in (
        ("--tasks tools", 1, "error: unrecognized arguments: --tasks"),
        ("--task tools --limit 0", 1, "error: --limit 0"),
        ("--help", 0, ""),
    ):
        result = python("-X importtime", ROOT / "eval.py", words)
        assert result.returncode == code
        assert message in result.stderr and "Traceback" not in result.stderr
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert not {"torch", "transformers"} & imported


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"WORLD_SIZE": "4"},
            "error: the environment has WORLD_SIZE=4, but no usable RANK, LOCAL_RANK, "
            "LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with torchrun, which sets all of "
            "them, or unset WORLD_SIZE\n",
        ),
        ({"RANK": ""}, "error: the environment has RANK=, but no usable RANK, WORLD_SIZE, "),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "h",
                "MASTER_PORT": "1",
            },  # as some launchers do
            "error: the environment has RANK=0, WORLD_SIZE=2, but no usable LOCAL_WORLD_SIZE: "
            "start with torchrun",
        ),
        (
            {"MASTER_ADDR": "h", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "1"},
            "error: --task x: ",
        ),  # they say nothing of several processes
    ],
)
def test_part_of_what_torchrun_sets(monkeypatch, script, given, message):
    """As in a pod: each process would do the whole run by itself."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    result = launch("--task x --engine hf", script=script)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(message)


JUDGED = "--judge-url http://127.0.0.1:9/v1 --judge-model m"  # nobody answers there


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task x", "--task x"),
        ("--task healthbench", "needs a judge"),
        (
            "--task healthbench --judge-url x --judge-model m --subset easy",
            "--subset easy: choose one of full, hard, consensus",
        ),
        ("--task tools --eval-data x", "--eval-data x: the task tools does not use it"),
        ("--task bfcl --eval-data x", "does not use it"),
        ("--task gpqa --subset hard", "does not use it"),
        ("--task gpqa --eval-data x.csv", "x.csv cannot be read"),
        ("--task gpqa --repeats 0", "--repeats 0"),
        ("--task tools --temperature -2", "--temperature -2"),
        ("--task tools --max-tokens -5", "--max-tokens -5"),
        ("--task tools --max-tokens 4000", "has room for 96"),
        ("--task tools --limit -1", "--limit -1"),
        ("--task tools --model ./nothing", "no such file"),
        ("--tasks tools", "unrecognized arguments: --tasks"),
        (f"--task healthbench --eval-data h.jsonl {JUDGED}", "cannot be used: "),
    ],
)
def test_bad_input(evaluate, monkeypatch, tmp_path, words, message):
    write_lines(tmp_path / "h.jsonl", HEALTH)
    nothing_is_loaded(monkeypatch)
    with pytest.raises(InputError) as error:
        evaluate(words)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs/a").exists()


@pytest.mark.parametrize(
    "rubrics",
    [
        None,
        [],
        [{"criterion": "c"}],
        [{"points": 1}],
        ["c"],
        [{"criterion": "c", "points": -1}],
        [{"criterion": "c", "points": float("nan")}],
        [{"criterion": "c", "points": True}],
    ],
)
def test_a_bad_healthbench_row_is_named(tmp_path, rubrics):
    for row, message in (
        ({**HEALTH[0], "rubrics": rubrics}, "row 2 has no rubrics"),
        ({**HEALTH[0], "example_tags": "theme:x"}, "row 2 has tags that are no list"),
        ({**HEALTH[0], "example_tags": [1]}, "row 2 has tags"),
        ("text", "row 2 is no object"),
    ):
        file = write_lines(tmp_path / "h.jsonl", [*HEALTH, row])
        with pytest.raises(InputError, match=message):
            rows.read(str(file), healthbench.from_row)
