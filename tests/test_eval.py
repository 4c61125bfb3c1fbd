"""Benchmarks: scoring by hand, BFCL's own ground truth through its checker, the statistics, and the command."""

import base64
import importlib.machinery
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from judge_server import Server, names
from test_train import command
from test_train import run as train

import eval as evaluation
import local.hf
import rollout
import tasks
import tools.compare as comparison
from config import EvalConfig, TrainConfig, parse
from infra import prompts
from infra.ranks import InputError
from local import hf
from rewards import Channel, Example, Task
from tasks import bfcl, gpqa, healthbench, rows, tools
from tools import stats

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.fixture
def evaluate(monkeypatch, tmp_path, tiny):
    """eval.py in this process. Returns (results.json, samples.jsonl)."""

    def run(*args, name: str = "a"):
        monkeypatch.chdir(tmp_path)
        evaluation.main(
            parse(
                evaluation.EvalConfig,
                "",
                ["--model", str(tiny), "--engine", "hf", "--name", name, *map(str, args)],
            )
        )
        folder = tmp_path / "runs" / name
        return json.loads((folder / "results.json").read_text()), [
            json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()
        ]

    return run


def options(task: str, path=None, **others) -> EvalConfig:
    return EvalConfig(task=task, eval_data=path and str(path), **others)


def records(task: Task, examples: list[Example], texts: list[str]) -> list[dict]:
    """The lines of samples.jsonl, with these responses to the examples."""
    groups = [
        rollout.Group(
            prompts.Prompt([], example),
            task.channels(example),
            [rollout.Response([], [], [], "stop", text)],
            torch.from_numpy(task.start(example, [text])()),
        )
        for example, text in zip(examples, texts, strict=True)
    ]
    return evaluation.records(task, groups)


def marks(task: Task, example: Example, text: str) -> dict[str, float]:
    return records(task, [example], [text])[0]["scores"]


# HealthBench


def test_healthbench_score_by_hand():
    met = np.array([1, 0, 1, 1])
    assert healthbench.score([7, 5, 10, -6], met) == pytest.approx(11 / 22)
    assert healthbench.score([7, -6], np.array([0, 1])) == pytest.approx(-6 / 7)  # not clipped
    assert np.isnan(healthbench.score([-6, -1], np.array([0, 1])))  # no positive points: skipped
    assert np.isnan(
        healthbench.score([7, 5], np.array([1, np.nan]))
    )  # a missing verdict is not a 0


HEALTH = [
    {
        "prompt_id": "a",
        "prompt": [{"role": "user", "content": "ache"}],
        "example_tags": ["theme:hedging", "physician_agreed_category:x"],
        "rubrics": [
            {"criterion": "c1", "points": 7, "tags": ["level:example", "axis:accuracy"]},
            {"criterion": "c2", "points": 5, "tags": ["axis:accuracy"]},
            {"criterion": "c3", "points": 10, "tags": ["axis:completeness"]},
            {"criterion": "c4", "points": -6, "tags": ["axis:communication_quality"]},
        ],
    },
    {
        "prompt_id": "b",
        "prompt": [{"role": "user", "content": "cough"}],
        "example_tags": ["theme:communication"],
        "rubrics": [
            {"criterion": "c5", "points": 3, "tags": ["axis:completeness"]},
            {"criterion": "bad", "points": -9, "tags": ["axis:accuracy"]},
        ],
    },
]


def of_healthbench(tmp_path, server) -> list:
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, HEALTH)))
    return [
        "--task",
        "healthbench",
        "--eval-data",
        "h.jsonl",
        "--max-tokens",
        8,
        "--judge-url",
        server.url,
        "--judge-model",
        "m",
    ]


def test_healthbench(evaluate, tmp_path):
    server = Server(
        lambda body, n: json.dumps(
            {
                "explanation": "x",
                **{
                    name: any(
                        f' {c}"' in body["messages"][0]["content"]
                        for c in ("c1", "c3", "c4", "bad")
                    )
                    for name in names(body)
                },
            }
        )
    )
    results, samples = evaluate(*of_healthbench(tmp_path, server))
    assert (
        samples[0]["scores"].pop("axis:communication_quality") is None
    )  # no positive points: skipped
    assert samples[0]["scores"] == pytest.approx(
        {
            "overall": 11 / 22,
            "theme:hedging": 11 / 22,
            "axis:accuracy": 7 / 12,
            "axis:completeness": 1.0,
        }
    )
    assert samples[1]["scores"]["overall"] == -3 and samples[1]["responses"][0]["met"] == [0, 1]
    means = {name: metric["mean"] for name, metric in results["metrics"].items()}
    assert means == pytest.approx(
        {
            "overall": 0.0,
            "theme:hedging": 0.5,
            "theme:communication": 0.0,
            "axis:accuracy": 7 / 12,
            "axis:completeness": 0.5,
        }
    )
    assert results["metrics"]["overall"]["n"] == 2 and results["metrics"]["axis:accuracy"]["n"] == 1
    prompt = next(
        request["body"]["messages"][0]["content"]
        for request in server.requests
        if " c4" in request["body"]["messages"][0]["content"]
    )
    assert r'"\u005b-6] c4"' in prompt and '"explanation"' in prompt and '"user": "ache"' in prompt
    assert results["judge"]["requests"] == 6 and results["settings"]["judge_model"] == "m"


def test_healthbench_clips_the_mean_and_bootstraps():
    samples = [
        {"id": str(i), "category": "", "scores": {"overall": x}}
        for i, x in enumerate([-3.0, 0.5, 0.7, 1.0])
    ]
    clipped, plain = (
        evaluation.summarize(samples, {}, clip, 0)["overall"] for clip in (True, False)
    )
    assert clipped["mean"] == 0 and plain["mean"] == pytest.approx(-0.2)
    draws = np.random.default_rng(1).choice([-3.0, 0.5, 0.7, 1.0], (20_000, 4)).mean(1)
    assert clipped["stderr"] == pytest.approx(draws.clip(0, 1).std(), rel=0.1) and plain[
        "stderr"
    ] == pytest.approx(draws.std(), rel=0.1)


def test_healthbench_without_enough_verdicts_keeps_the_responses(evaluate, tmp_path):
    server = Server(
        lambda body, n: (
            '{"explanation": "x", "criterion_1": "true"}' if n > 1 else '{"criterion_1": true}'
        )
    )
    with pytest.raises(InputError, match="100% of the rows have a verdict missing"):
        evaluate(*of_healthbench(tmp_path, server))
    lines = (tmp_path / "runs/a/samples.jsonl").read_text().splitlines()
    assert (
        len(lines) == 2
        and json.loads(lines[0])["responses"][0]["met"] == [None] * 4
        and json.loads(lines[0])["scores"]["overall"] is None
    )
    assert not (tmp_path / "runs/a/results.json").exists()


def test_one_missing_verdict_leaves_its_row_out(evaluate, tmp_path):
    server = Server(
        lambda body, n: (
            (400, "too long")
            if " c2" in body["messages"][0]["content"]
            else json.dumps(dict.fromkeys(names(body), True))
        )
    )
    results, samples = evaluate(*of_healthbench(tmp_path, server), "--judge-max-missing", 0.6)
    assert (
        samples[0]["scores"]["overall"] is None and samples[0]["scores"]["axis:completeness"] == 1
    )
    assert results["metrics"]["overall"] == pytest.approx(
        {"mean": 0, "stderr": 0, "n": 1}
    ) and results["judge"]["missing"] == pytest.approx(1 / 6)
    assert results["judge"]["rows_missing"] == 0.5
    with pytest.raises(
        InputError,
        match="50% of the rows have a verdict missing, more than --judge-max-missing 0.2",
    ):
        evaluate(*of_healthbench(tmp_path, server), name="b")


def test_rubrics_are_evaluated_like_any_task(evaluate, tmp_path):
    server = Server(lambda body, n: json.dumps(dict.fromkeys(names(body), True)))
    rubric = [
        {"description": "a", "weight": 5},
        {"description": "b", "weight": -1},
        {"description": "c", "weight": 4},
        {"description": "d"},
    ]
    (tmp_path / "r.jsonl").write_text(
        "\n".join(json.dumps({"question": question, "rubric": rubric}) for question in "qr")
    )
    results, samples = evaluate(
        "--task",
        "rar-science",
        "--eval-data",
        "r.jsonl",
        "--limit",
        1,
        "--max-tokens",
        4,
        "--judge-url",
        server.url,
        "--judge-model",
        "m",
    )
    assert [sample["scores"] for sample in samples] == [
        {"joint": 0, "essential": 1, "pitfall": 0, "important": 1}
    ]
    assert samples[0]["responses"][0]["rewards"] == {"1 a": 1, "2 b": 0, "3 c": 1, "4 d": 1}
    assert (
        results["judge"]["missing"] == 0
        and results["judge"]["requests"] == 4
        and results["settings"]["judge_model"] == "m"
    )


# GPQA

GPQA = (
    "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Record ID\n"
    '"Secret ""one"",\nin two lines?",right1,w1,x1,y1,rec1\nSecret two?,right2,w2,x2,y2,rec2\nSecret three?,right3,w3,x3,y3,rec3\n'
)


def of_gpqa(
    tmp_path, text: str = GPQA, n: int | None = None, **others
) -> tuple[Task, list[Example]]:
    (tmp_path / "g.csv").write_text(text)
    task = gpqa.task(options("gpqa", tmp_path / "g.csv", **{"repeats": 2, **others}))
    return task, task.prompts(0, n)[1]


def test_gpqa_permutations_are_simple_evals(tmp_path):
    """Rows repeated, then one permutation each from Random(0), in order."""
    rng, (task, examples) = random.Random(0), of_gpqa(tmp_path)
    for repeat, i in itertools.product(range(2), range(3)):
        order = rng.sample(range(4), 4)
        text = examples[2 * i + repeat].messages[0]["content"]
        choices = [f"{['right', 'w', 'x', 'y'][k]}{i + 1}" for k in order]
        assert text.splitlines()[-4:] == [
            f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True)
        ]
        letter = "ABCD"[order.index(0)]
        right = ["Answer: E"] * 2
        right[repeat] = f"so\nAnswer: {letter}"
        (item,) = records(task, examples[2 * i : 2 * i + 2], right)
        assert (
            item["scores"] == {"accuracy": 0.5, "answered": 0.5}
            and item["responses"][repeat]["correct"]
            == letter
            == item["responses"][repeat]["letter"]
        )
    assert 'Secret "one",\nin two lines?' in examples[0].messages[0]["content"]
    assert [example.id for example in examples] == [
        "rec1",
        "rec1",
        "rec2",
        "rec2",
        "rec3",
        "rec3",
    ] and len(of_gpqa(tmp_path, n=2)[1]) == 4
    assert of_gpqa(tmp_path, seed=1)[1] != examples


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
    (tmp_path / "g.csv").write_text(GPQA)
    answer = "Secret two? is right2. Answer: A"
    monkeypatch.setattr(
        local.hf,
        "make_response",
        lambda tokens, logp, finish, *rest: rollout.Response(tokens, logp, [], finish, answer),
    )
    results, samples = evaluate(
        "--task", "gpqa", "--eval-data", "g.csv", "--max-tokens", 4, "--repeats", 2
    )
    for file in (tmp_path / "runs/a").iterdir():
        assert not any(secret in file.read_text() for secret in ("Secret", "right", "w1", "x2"))
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


def literal(value, kind: str) -> str:
    """The value as Java or JavaScript source, as the checker's converters read it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and kind == "ArrayList":
        return (
            f"new ArrayList<String>(Arrays.asList({', '.join(literal(x, 'json') for x in value)}))"
        )
    if isinstance(value, list) and kind == "Array":
        return f"new String[]{{{', '.join(map(str, value))}}}"  # the converter keeps quotes as a part of the string
    if isinstance(value, dict) and kind == "HashMap":
        return (
            "new HashMap<String, Object>() {{ "
            + " ".join(f'put("{k}", {literal(v, "json")});' for k, v in value.items())
            + " }}"
        )
    if kind in ("long", "float"):
        return f"{value}{kind[0].upper()}"
    return value if isinstance(value, str) and kind != "json" else json.dumps(value)


def plain(value):
    """Of an object, or of the objects in a list, the first accepted value of every key."""
    if isinstance(value, list):
        return [plain(x) if isinstance(x, dict) else x for x in value]
    return (
        {k: v[0] for k, v in value.items() if v and v[0] != ""}
        if isinstance(value, dict)
        else value
    )


def echo(category: str, functions: list[dict], truth: list[dict]) -> str:
    """A response that says the ground truth."""
    lines, properties = [], {f["name"]: f["parameters"]["properties"] for f in functions}
    for call in truth:
        ((name, accepted),) = call.items()
        parameters = {
            k: plain(values[0]) for k, values in accepted.items() if values and values[0] != ""
        }
        if category in ("java", "javascript"):
            kinds = {
                k: kind["type"] if category == "java" else "String"
                for k, kind in properties.get(name, {}).items()
            }
            parameters = {k: literal(v, kinds.get(k, "String")) for k, v in parameters.items()}
        lines.append(json.dumps({"name": name, "parameters": parameters}))
    return "<think> t </think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


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
    examples = of_bfcl.prompts(0, None)[1]
    assert {
        category: sum(example.category == category for example in examples) for category in SIZES
    } == SIZES
    assert (
        len(examples) == len({example.id for example in examples}) == 3641
        and len(of_bfcl.prompts(0, 3)[1]) == 3 * 13
    )


def test_bfcl_ground_truth_passes_its_checker(of_bfcl):
    """The rest is the data's own: a few rows require a parameter that their answer leaves out."""
    passed, total = 0, 0
    for example in of_bfcl.prompts(0, None)[1]:
        category, functions, truth = json.loads(example.reference)
        assert category == example.category
        if "relevance" in category:
            continue
        right = echo(category, functions, truth)
        scores = marks(of_bfcl, example, right)
        assert scores["format"] == 1
        passed, total = passed + scores["correct"], total + 1
        assert marks(of_bfcl, example, right.replace('{"name": "', '{"name": "x'))["correct"] == 0
    print(f"{passed:.0f} of {total}")
    assert total == 2501 and passed / total >= 0.99


def test_bfcl_relevance_and_format(of_bfcl):
    call = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>'
    refusal = "<think> t </think>\n<response> I have no tool for that. </response>"
    by_group = {example.category: example for example in of_bfcl.prompts(0, None)[1]}
    for group, response, scores in [
        ("irrelevance", call, (0, 1)),
        ("irrelevance", refusal, (1, 1)),
        ("live_irrelevance", "text", (1, 0)),
        ("live_relevance", call, (1, 1)),
        ("live_relevance", refusal, (0, 1)),
        ("live_relevance", call.replace("{}", "3"), (0, 1)),
        ("simple", refusal, (0, 1)),
        ("simple", call, (0, 1)),
        ("parallel", "", (0, 0)),
    ]:
        got = marks(of_bfcl, by_group[group], response)
        assert (got["correct"], got["format"]) == scores, (group, response)


def test_bfcl_calls_are_read_as_toolrl_reads_them():
    block = '<tool_call>\n{"name": "f", "parameters": {"x": 1}}\nbad line\n{"name": "g"}\n[]\n{"name": "h", "parameters": {}}\n</tool_call>'
    assert bfcl.calls(block) == [{"f": {"x": 1}}, {"h": {}}]
    assert bfcl.calls(
        block + '<tool_call>\n{"name": "last", "parameters": {}}\n</tool_call> text'
    ) == [{"last": {}}]
    assert (
        bfcl.calls('{"name": "f", "parameters": {}}')
        == bfcl.calls("")
        == bfcl.calls("[" * 50_000)
        == []
    )


def test_bfcl_prompt_is_toolrls(of_bfcl):
    examples = of_bfcl.prompts(0, 1)[1]
    system, user = examples[0].messages
    assert (
        "\n1. Name: calculate_triangle_area\nDescription: Calculate the area" in system["content"]
        and '\nParameters: {"base": {"type": "integer"' in system["content"]
    )
    assert (
        '{"name": "Tool name", "parameters": {"Parameter name": "Parameter content", "... ...": "... ..."}}'
        in system["content"]
    )
    assert (
        user["content"]
        == "**Dialogue Records History**\n<user> Find the area of a triangle with a base of 10 units and height of 5 units. </user>"
    )
    java = next(example for example in examples if example.category == "java")
    assert (
        "Java 8 SDK syntax" in java.messages[0]["content"]
        and "in string representation" in java.messages[0]["content"]
    )


def test_bfcl_averages_by_hand(of_bfcl):
    averages = of_bfcl.averages()
    assert all(sum(weights.values()) == pytest.approx(1) for weights in averages.values())
    right = {
        "simple": 0.9,
        "java": 0.6,
        "javascript": 0.3,
        "multiple": 0.8,
        "parallel": 0.4,
        "irrelevance": 0.5,
        "live_simple": 0.5,
        "live_irrelevance": 1.0,
    }
    samples = [
        {
            "id": f"{c}{i}",
            "category": c,
            "scores": {"correct": float(i < 10 * right.get(c, 0)), "format": 1.0},
        }
        for c in SIZES
        for i in range(10)
    ]
    means = {
        name: metric["mean"]
        for name, metric in evaluation.summarize(samples, averages, False, 0).items()
    }
    assert means["non-live"] == pytest.approx((0.6 + 0.8 + 0.4 + 0 + 0.5) / 5)
    assert means["live"] == pytest.approx((0.5 * 258 + 882) / 2251)
    assert means["non-live AST"] == pytest.approx((0.6 + 0.8 + 0.4 + 0) / 4)
    assert means["live AST"] == pytest.approx(0.5 * 258 / 1351)
    assert means["v3 without multi-turn (live, non-live)"] == pytest.approx(
        (means["live"] + means["non-live"]) / 2
    )
    assert means["java"] == pytest.approx(0.6) and means["format"] == 1


def test_bfcl_eval_missing_or_of_v4(monkeypatch, tmp_path):
    for spec in (
        None,
        importlib.machinery.ModuleSpec("bfcl_eval", None, origin=str(tmp_path / "__init__.py")),
    ):
        monkeypatch.setattr(bfcl.importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(InputError, match="pip install --no-deps bfcl-eval"):
            bfcl.package.__wrapped__()


# Comparing


def result(tmp_path, name, values, task="gpqa", **settings):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "results.json").write_text(
        json.dumps(
            {
                "task": task,
                "settings": {"items": "x", "model": name, **settings},
                "averages": {},
                "metrics": {},
            }
        )
    )
    (folder / "samples.jsonl").write_text(
        "\n".join(
            json.dumps({"id": str(i), "category": "", "scores": scores})
            for i, scores in enumerate(values)
        )
    )
    return folder / "results.json"


def test_compare_against_exact_tests(tmp_path):
    """Eight pairs: all 256 sign flips enumerated, and the bootstrap interval from as many draws of our own."""
    rng = np.random.default_rng(0)
    x, y = rng.random(8), rng.random(8) + 0.25
    (row,) = comparison.compare(
        result(tmp_path, "a", [{"s": v} for v in x]), result(tmp_path, "b", [{"s": v} for v in y])
    )
    d = y - x
    exact = np.mean(
        [
            abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12
            for signs in itertools.product([-1, 1], repeat=8)
        ]
    )
    assert (
        row["difference"] == pytest.approx(d.mean())
        and row["p"] == pytest.approx(exact, abs=0.015)
        and row["n"] == 8
    )
    draws = rng.choice(d, (100_000, 8)).mean(1)
    assert [row["low"], row["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_compare_is_paired_corrected_and_leaves_missing_pairs_out(tmp_path):
    rng = np.random.default_rng(1)
    base = rng.random(200)  # items differ far more than the two models do
    first = [{"overall": v, "axis:a": v, "axis:b": v} for v in base]
    second = [
        {
            "overall": v + 0.02 + 0.02 * rng.standard_normal(),
            "axis:a": v + 0.01 * rng.standard_normal(),
            "axis:b": v + 0.02,
        }
        for v in base
    ]
    second[0]["axis:b"] = None
    overall, a, b = comparison.compare(result(tmp_path, "a", first), result(tmp_path, "b", second))
    assert overall["p"] < 0.001 and overall["low"] > 0.01 and "p_holm" not in overall
    assert (
        a["p"] > 0.01
        and b["n"] == 199
        and b["p_holm"] == pytest.approx(2 * b["p"])
        and a["p_holm"] == pytest.approx(max(a["p"], 2 * b["p"]))
    )
    same = comparison.compare(tmp_path / "a/results.json", tmp_path / "a/results.json")
    assert all(row["difference"] == 0 and row["p"] == 1 for row in same)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


def test_compare_refuses(tmp_path):
    good = result(tmp_path, "good", [{"s": 1.0}])
    for name, options, message in [
        ("items", {"items": "y"}, "different items"),
        ("heat", {"temperature": 1}, "temperature is None in"),
        ("task", {"task": "bfcl"}, "task is gpqa"),
    ]:
        with pytest.raises(InputError, match=f"cannot be compared: .*{message}"):
            comparison.compare(good, result(tmp_path, name, [{"s": 1.0}], **options))
    with pytest.raises(InputError, match="different items"):
        comparison.compare(good, result(tmp_path, "more", [{"s": 1.0}, {"s": 0.0}]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/results.json").write_text("{}")
    broken = [
        tmp_path / "broken/results.json",
        tmp_path / "missing/results.json",
        result(tmp_path, "none", []),
    ]
    for number, scores in enumerate(
        ["text", None, [1], {"s": "0.5"}, {"s": [1]}, {"s": float("inf")}]
    ):
        broken.append(result(tmp_path, f"odd{number}", [scores]))
    twice = result(tmp_path, "twice", [{"s": 1.0}])
    (tmp_path / "twice/samples.jsonl").write_text('{"id": "0", "category": "", "scores": {}}\n' * 2)
    with pytest.raises(InputError, match="no metric in common"):
        comparison.compare(good, result(tmp_path, "other", [{"t": 1.0}]))
    for path in [*broken, twice]:
        with pytest.raises(InputError, match="cannot be read as eval.py writes them"):
            comparison.compare(good, path)


def test_compare_says_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    """Before it prints anything."""
    monkeypatch.chdir(tmp_path)
    result(tmp_path, "good", [{"s": 1.0}])
    for folder in ("kept/step-2", "kept/step-10", "trained", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "trained/metrics.jsonl").touch()
    for other, message in [
        ("kept", "kept holds evaluations of several policies: name one, such as kept/step-10"),
        (
            "trained",
            "trained is a run of train.py, which compare cannot read: evaluate it first, with python eval.py --model trained --task ..., "
            "and name the directory that this prints",
        ),
        ("empty", "empty: no results of eval.py are there; name its directory, such as runs/NAME"),
        ("nothing", "nothing: no results of eval.py are there"),
    ]:
        with pytest.raises(InputError) as error:
            comparison.main(["good", other])
        assert str(error.value).startswith(message)
    with pytest.raises(
        InputError, match="usage: python tools/compare.py runs/A runs/B, each a directory"
    ):
        comparison.main(["good"])
    assert capsys.readouterr().out == ""


# Any task


def test_scores_of_one_id_are_averaged_without_those_that_are_missing():
    task = Task(
        None,
        [
            Channel("a", lambda prompts, responses, references: [float(r) for r in responses]),
            Channel("b", lambda p, r, ref: [math.nan]),
        ],
    )
    question = [{"role": "user", "content": "q"}]
    examples = [
        Example(question, "r", id="x"),
        Example(question),
        Example(question, id="x"),
        Example(question, id="x", category="other"),
    ]
    first, second, third = records(task, examples, ["1", "0.5", "nan", "0"])
    assert (first["id"], first["category"], second["id"], third["category"]) == (
        "x",
        "",
        "1",
        "other",
    )
    assert (
        first["scores"]["a"] == 1
        and second["scores"]["a"] == 0.5
        and math.isnan(first["scores"]["b"])
    )
    assert first["responses"] == [
        {"response": "1", "reference": "r"},
        {"response": "nan", "reference": ""},
    ]


def test_benchmarks_are_not_for_training():
    for name in ("bfcl", "gpqa", "healthbench"):
        with pytest.raises(InputError, match=f"--task {name}: a benchmark is not for training"):
            tasks.load_task(TrainConfig(task=name))


def test_a_task_without_rows(evaluate, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rewards import Channel, Task\ndef task(options):\n    return Task(lambda n, m: ([], []), [Channel('a')])\n"
    )
    with pytest.raises(InputError, match="mine.py: no rows to evaluate on"):
        evaluate("--task", "mine.py")


# The command


def test_trained_tasks_and_the_command(evaluate, tiny, tmp_path):
    results, samples = evaluate("--task", "tools", "--limit", 3, "--max-tokens", 16)
    assert len(samples) == 3 and set(results["metrics"]) == {
        "joint",
        *tools.values("", tools.examples(1, "test")[0].reference),
    }
    example, task = tools.examples(3, "test")[1], tools.task(options("tools"))
    answer = task.start(example, [samples[1]["responses"][0]["response"]])()[0]
    assert (
        list(samples[1]["scores"].values())[1:] == answer.tolist()
        and samples[1]["responses"][0]["reference"] == example.reference
    )
    row = {
        "prompt": example.messages,
        "reward_model": {
            "ground_truth": "<think> t </think>\n" + example.reference.rpartition("</think>\n")[2]
        },
    }
    (tmp_path / "rlla.json").write_text(json.dumps([row] * 2))
    command = [
        sys.executable,
        ROOT / "eval.py",
        "--model",
        tiny,
        "--engine",
        "hf",
        "--task",
        "rlla",
        "--eval-data",
        "rlla.json",
        "--max-tokens",
        "8",
    ]
    out = subprocess.run([*command, "--name", "b"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and "correctness  -3.000 (0.000)  n=2" in out.stdout, out.stderr[
        -2000:
    ]
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            *command[1:],
            "--name",
            "c",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert (tmp_path / "runs/b/samples.jsonl").read_text() == (
        tmp_path / "runs/c/samples.jsonl"
    ).read_text()  # greedy: the same on two ranks
    out = subprocess.run(
        [sys.executable, ROOT / "tools/compare.py", "runs/b", "runs/c/results.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and out.stdout.count("1.0000") >= 3
    assert out.stdout.startswith("A: runs/b\nB: runs/c/results.json\n") and out.stdout.splitlines()[
        2
    ].split()[:5] == ["A", "B", "B", "-", "A"]


# Every policy that a run has kept

LETTERS = """
from rewards import Channel, Example, Task

def vowels(prompts, responses, references):
    return [sum(c in "aeiou" for c in r) / max(1, len(r)) for r in responses]

def task(options):
    prompts = [Example([{"role": "user", "content": f"Say {word}"}], word) for word in "one two three four five six seven eight nine ten".split()]
    return Task(lambda n, m: (prompts[:6], prompts[6:]), [Channel("vowels", vowels), Channel("tokens", lambda p, rs, ref: [float(len(r)) for r in rs], weight=0)])
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with runs/trained, which has kept its policies after 0, 2 and 3 steps; they answer differently."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "letters.py").write_text(LETTERS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(
            monkeypatch,
            folder,
            "--task",
            "letters.py",
            "--steps",
            3,
            "--eval-every",
            2,
            "--max-tokens",
            16,
            "--lr",
            1e-2,
            "--keep-policies",
            name="trained",
        )
    (folder / "runs/trained/policies/step-9.part").mkdir()  # of a run that was killed
    return folder


def of_letters(engine: str = "hf") -> list[str]:
    return [
        "--task",
        "letters.py",
        "--model",
        "runs/trained",
        "--max-tokens",
        "12",
        "--engine",
        engine,
    ]


def outcomes(folder) -> dict[str, tuple[dict, list[dict]]]:
    """{step-N: (metrics, lines of samples.jsonl)}."""
    return {
        path.name: (
            json.loads((path / "results.json").read_text())["metrics"],
            [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()],
        )
        for path in folder.glob("step-*")
    }


def test_every_kept_policy_is_evaluated_as_it_would_be_alone(kept, monkeypatch, capsys):
    """By one engine, and on two ranks: each like a checkpoint of its own, the last like the run."""
    monkeypatch.chdir(kept)
    loaded, load = [], hf.load
    monkeypatch.setattr(hf, "load", lambda path, *rest: loaded.append(path) or load(path, *rest))
    evaluation.main(
        parse(evaluation.EvalConfig, "", [*of_letters(), "--policies", "--name", "all"])
    )
    assert [path.name for path in loaded] == ["step-0"]
    found, (header, *rows) = outcomes(kept / "runs/all"), capsys.readouterr().out.splitlines()
    assert {*found} == {"step-0", "step-2", "step-3"} and header.split() == [
        "joint",
        "vowels",
        "tokens",
    ]
    assert len({json.dumps(samples) for _, samples in found.values()}) == 3
    for row, step in zip(rows, (0, 2, 3), strict=False):
        metrics, samples = found[f"step-{step}"]
        assert len(samples) == 4 and row.split()[0] == f"step-{step}"
        assert f"{metrics['vowels']['mean']:.3f} ({metrics['vowels']['stderr']:.3f})" in row
    for name, source in (("alone", "runs/trained/policies/step-2"), ("last", "runs/trained")):
        evaluation.main(
            parse(evaluation.EvalConfig, "", [*of_letters(), "--model", source, "--name", name])
        )
        results = json.loads((kept / "runs" / name / "results.json").read_text())
        step = "step-2" if name == "alone" else "step-3"
        both = json.loads((kept / "runs/all" / step / "results.json").read_text())
        assert (
            both["settings"].pop("model") == f"runs/trained/policies/{step}"
            and results["settings"].pop("model") == source
        )
        assert (
            both == results
            and (kept / "runs" / name / "samples.jsonl").read_text()
            == (kept / "runs/all" / step / "samples.jsonl").read_text()
        )
    assert {
        row["difference"]
        for row in comparison.compare(
            kept / "runs/all/step-3/results.json", kept / "runs/last/results.json"
        )
    } == {0}
    out = command(*of_letters(), "--policies", "--name", "two", cwd=kept, ranks=2, script="eval.py")
    assert outcomes(kept / "runs/two") == found and [header, *rows[:3]] == out.splitlines()[:4]


def test_an_evaluation_of_policies_goes_on_where_it_broke_off(kept, monkeypatch, tmp_path):
    """What is missing is done, what is there stays as it is, other settings are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters.py").write_text(LETTERS)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/trained").symlink_to(kept / "runs/trained")
    words = [*of_letters(), "--policies", "--name", "part"]
    evaluation.main(parse(evaluation.EvalConfig, "", words))
    whole, run = outcomes(tmp_path / "runs/part"), tmp_path / "runs/part"
    (run / "step-2/results.json").unlink()  # killed between its two files
    shutil.rmtree(run / "step-3")
    written = (run / "step-0/results.json").stat().st_mtime_ns
    evaluation.main(parse(evaluation.EvalConfig, "", words))
    assert outcomes(run) == whole and (run / "step-0/results.json").stat().st_mtime_ns == written
    loaded = []
    monkeypatch.setattr(hf, "load", lambda *_: loaded.append(1))
    evaluation.main(parse(evaluation.EvalConfig, "", words))
    assert not loaded
    with pytest.raises(
        InputError,
        match=r"step-0/results.json is of another evaluation: max_tokens is 12 there, and 13 now; choose another --name",
    ):
        evaluation.main(parse(evaluation.EvalConfig, "", [*words, "--max-tokens", "13"]))
    (run / "step-0/results.json").write_text("{")
    with pytest.raises(InputError, match=r"step-0/results.json cannot be read"):
        evaluation.main(parse(evaluation.EvalConfig, "", words))
    with pytest.raises(InputError, match="holds something else than a run"):
        evaluation.main(
            parse(evaluation.EvalConfig, "", [*of_letters(), "--policies", "--name", "trained"])
        )


@needs_vllm
def test_vllm_evaluates_every_kept_policy(kept, monkeypatch):
    """The same greedy text as transformers: no weight and no cached prefix of the policy before is left."""
    monkeypatch.chdir(kept)
    evaluation.main(
        parse(evaluation.EvalConfig, "", [*of_letters(), "--policies", "--name", "of_hf"])
    )
    command(*of_letters("vllm"), "--policies", "--name", "of_vllm", cwd=kept, script="eval.py")
    assert outcomes(kept / "runs/of_vllm") == outcomes(kept / "runs/of_hf")


def write_policies(run, tables: dict[int, dict[str, tuple[float, float]]]) -> dict:
    """As eval.py --policies leaves it. Returns what print_policies is given."""
    out = {}
    for step, table in tables.items():
        out[run / f"step-{step}"] = {
            name: {"mean": mean, "stderr": error, "n": 9} for name, (mean, error) in table.items()
        }
        (run / f"step-{step}").mkdir(parents=True)
        (run / f"step-{step}/results.json").write_text(
            json.dumps({"metrics": out[run / f"step-{step}"]})
        )
    return out


def test_best_and_final_policies_are_marked(tmp_path, capsys):
    """By the first metric; of equal ones the earliest; in steps' order, which is not that of their names."""
    a = {
        0: {"overall": (0.1, 0.01), "other": (0.9, 0.02)},
        5: {"overall": (0.4, 0.03)},
        10: {"overall": (0.4, 0.05), "other": (0.2, 0.06)},
    }
    evaluation.print_policies(write_policies(tmp_path / "runs/a", a))
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:4]] == [
        ["overall", "other"],
        ["step-0", "0.100", "(0.010)", "0.900", "(0.020)"],
        ["step-5", "BEST", "0.400", "(0.030)", "-"],
        ["step-10", "FINAL", "0.400", "(0.050)", "0.200", "(0.060)"],
    ]
    evaluation.print_policies(
        write_policies(
            tmp_path / "runs/b", {0: {"overall": (0.1, 0.01)}, 9: {"overall": (0.3, 0.02)}}
        )
    )
    assert capsys.readouterr().out.splitlines()[2].split() == [
        "step-9",
        "BEST",
        "FINAL",
        "0.300",
        "(0.020)",
    ]
    rows = command(
        "runs/a", "runs/b", "--out", "both.png", cwd=tmp_path, script="tools/plot.py"
    ).splitlines()
    assert [row.split() for row in rows[1:]] == [
        ["runs/a", "overall", "0.100", "(0.010)", "0.400", "(0.030)", "5", "0.400", "(0.050)"],
        ["runs/b", "overall", "0.100", "(0.010)", "0.300", "(0.020)", "9", "0.300", "(0.020)"],
        ["both.png"],
    ]
    assert (tmp_path / "both.png").stat().st_size > 5000
    (tmp_path / "runs/b/step-12").mkdir()  # an evaluation that was broken off
    out = subprocess.run(
        [sys.executable, ROOT / "tools/plot.py", "runs/b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        out.returncode == 1
        and out.stderr.startswith("error: runs/b/step-12/results.json cannot be read")
        and out.stderr.count("\n") == 1
    )


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
    monkeypatch.setattr(hf, "load", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "runs/there").mkdir(parents=True)
    if broken:
        (tmp_path / "runs/there/policies" / broken.partition("/")[0]).mkdir(parents=True)
    if broken and "/" in broken:
        shutil.copytree(tiny, tmp_path / "runs/there/policies/step-0")
        shutil.copytree(tiny, tmp_path / "runs/there/policies/step-3", dirs_exist_ok=True)
        (tmp_path / "runs/there/policies" / broken).write_text(
            '{"quantization_config": {"quant_method": "fp8"}}'
        )
    with pytest.raises(InputError) as error:
        evaluate("--task", "tools", "--model", "runs/there", "--policies")
    assert (
        message in str(error.value)
        and "\n" not in str(error.value)
        and not (tmp_path / "runs/a").exists()
    )


@needs_vllm
def test_vllm_and_transformers_answer_alike(evaluate, own_head, tmp_path):
    """Greedy, from the checkpoint as it is, which has a head of its own, though its config.json denies it."""
    args = ["--task", "tools", "--limit", "4", "--max-tokens", "12"]
    _, samples = evaluate(*args, "--model", own_head)
    out = subprocess.run(
        [
            sys.executable,
            ROOT / "eval.py",
            "--model",
            own_head,
            "--engine",
            "vllm",
            *args,
            "--name",
            "vllm",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    of_vllm = [
        json.loads(line)["responses"]
        for line in (tmp_path / "runs/vllm/samples.jsonl").read_text().splitlines()
    ]
    assert of_vllm == [sample["responses"] for sample in samples]


def test_a_wrong_option_does_not_wait_for_torch():
    for args, message in [
        (["--tasks", "tools"], "error: unrecognized arguments: --tasks"),
        (["--task", "tools", "--limit", "0"], "error: --limit 0"),
        (["--help"], ""),
    ]:
        out = subprocess.run(
            [sys.executable, "-X", "importtime", ROOT / "eval.py", *args],
            capture_output=True,
            text=True,
        )
        assert (
            message in out.stderr
            and "Traceback" not in out.stderr
            and out.returncode == (args != ["--help"])
        )
        assert not {"torch", "transformers"} & {
            line.rpartition("|")[2].strip() for line in out.stderr.splitlines()
        }


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"WORLD_SIZE": "4"},
            "error: the environment has WORLD_SIZE=4, but no usable RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with torchrun, "
            "which sets all of them, or unset WORLD_SIZE\n",
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
            "error: the environment has RANK=0, WORLD_SIZE=2, but no usable LOCAL_WORLD_SIZE: start with torchrun",
        ),
        (
            {"MASTER_ADDR": "h", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "1"},
            "error: --task x: ",
        ),  # they say nothing of several processes
    ],
)
def test_part_of_what_torchrun_sets(script, given, message):
    """As in a pod: each process would do the whole run by itself."""
    out = subprocess.run(
        [sys.executable, ROOT / script, "--task", "x", "--engine", "hf"],
        capture_output=True,
        text=True,
        env={**os.environ, **given},
    )
    assert out.returncode == 1 and out.stderr.startswith(message) and out.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "x"], "--task x"),
        (["--task", "healthbench"], "needs a judge"),
        (
            ["--task", "healthbench", "--judge-url", "x", "--judge-model", "m", "--subset", "easy"],
            "--subset easy: choose one of full, hard, consensus",
        ),
        (["--task", "tools", "--eval-data", "x"], "--eval-data x: the task tools does not use it"),
        (["--task", "bfcl", "--eval-data", "x"], "does not use it"),
        (["--task", "gpqa", "--subset", "hard"], "does not use it"),
        (["--task", "gpqa", "--eval-data", "x.csv"], "x.csv cannot be read"),
        (["--task", "gpqa", "--repeats", 0], "--repeats 0"),
        (["--task", "tools", "--temperature", -2], "--temperature -2"),
        (["--task", "tools", "--max-tokens", -5], "--max-tokens -5"),
        (["--task", "tools", "--max-tokens", 4000], "has room for 96"),
        (["--task", "tools", "--limit", -1], "--limit -1"),
        (["--task", "tools", "--model", "./nothing"], "no such file"),
        (["--tasks", "tools"], "unrecognized arguments: --tasks"),
        (
            [
                "--task",
                "healthbench",
                "--eval-data",
                "h.jsonl",
                "--judge-url",
                "http://127.0.0.1:9/v1",
                "--judge-model",
                "m",
            ],
            "cannot be used: ",
        ),
    ],
)
def test_bad_input(evaluate, monkeypatch, tmp_path, args, message):
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, HEALTH)))
    monkeypatch.setattr(hf, "load", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(InputError) as error:
        evaluate(*args)
    assert (
        message in str(error.value)
        and "\n" not in str(error.value)
        and not (tmp_path / "runs/a").exists()
    )


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
    for row, message in [
        ({**HEALTH[0], "rubrics": rubrics}, "row 2 has no rubrics"),
        ({**HEALTH[0], "example_tags": "theme:x"}, "row 2 has tags that are no list"),
        ({**HEALTH[0], "example_tags": [1]}, "row 2 has tags"),
        ("text", "row 2 is no object"),
    ]:
        (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, [*HEALTH, row])))
        with pytest.raises(InputError, match=message):
            rows.read(str(tmp_path / "h.jsonl"), healthbench.from_row)
