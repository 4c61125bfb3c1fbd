"""Benchmarks: scoring by hand, BFCL's own ground truth through its checker, the statistics, and the command."""

import base64
import itertools
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from judge_server import Server, names
from test_train import needs_vllm

import benchmarks
import data
import eval as evaluation
import model
import rewards
from rewards import InputError


def evaluate(monkeypatch, tmp_path, *args, name: str = "a"):
    """eval.py in this process. Returns (results.json, samples.jsonl)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "tiny", "--engine", "hf", "--name", name, *map(str, args)])
    evaluation.main()
    folder = tmp_path / "runs" / name
    return json.loads((folder / "results.json").read_text()), [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


# HealthBench

def test_healthbench_score_by_hand():
    met = np.array([1, 0, 1, 1])
    assert benchmarks.healthbench_score([7, 5, 10, -6], met) == pytest.approx(11 / 22)
    assert benchmarks.healthbench_score([7, -6], np.array([0, 1])) == pytest.approx(-6 / 7)  # not clipped
    assert np.isnan(benchmarks.healthbench_score([-6, -1], np.array([0, 1])))  # no positive points: skipped
    assert np.isnan(benchmarks.healthbench_score([7, 5], np.array([1, np.nan])))  # a missing verdict is not a 0


HEALTH = [
    {"prompt_id": "a", "prompt": [{"role": "user", "content": "ache"}], "example_tags": ["theme:hedging", "physician_agreed_category:x"], "rubrics": [
        {"criterion": "c1", "points": 7, "tags": ["level:example", "axis:accuracy"]}, {"criterion": "c2", "points": 5, "tags": ["axis:accuracy"]},
        {"criterion": "c3", "points": 10, "tags": ["axis:completeness"]}, {"criterion": "c4", "points": -6, "tags": ["axis:communication_quality"]}]},
    {"prompt_id": "b", "prompt": [{"role": "user", "content": "cough"}], "example_tags": ["theme:communication"], "rubrics": [
        {"criterion": "c5", "points": 3, "tags": ["axis:completeness"]}, {"criterion": "bad", "points": -9, "tags": ["axis:accuracy"]}]},
]


def healthbench(tmp_path, server, rows=None) -> list:
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, rows or HEALTH)))
    return ["--task", "healthbench", "--data", "h.jsonl", "--max-tokens", 8, "--judge-url", server.url, "--judge-model", "m"]


def test_healthbench(monkeypatch, tmp_path):
    server = Server(lambda body, n: json.dumps({"explanation": "x", **{name: any(f" {c}\"" in body["messages"][0]["content"] for c in ("c1", "c3", "c4", "bad"))
                                                                       for name in names(body)}}))
    results, samples = evaluate(monkeypatch, tmp_path, *healthbench(tmp_path, server))
    assert samples[0]["scores"].pop("axis:communication_quality") is None  # no positive points: skipped
    assert samples[0]["scores"] == pytest.approx({"overall": 11 / 22, "theme:hedging": 11 / 22, "axis:accuracy": 7 / 12, "axis:completeness": 1.0})
    assert samples[1]["scores"]["overall"] == -3 and samples[1]["met"] == [0, 1]
    means = {name: metric["mean"] for name, metric in results["metrics"].items()}
    assert means == pytest.approx({"overall": 0.0, "theme:hedging": 0.5, "theme:communication": 0.0, "axis:accuracy": 7 / 12, "axis:completeness": 0.5})
    assert results["metrics"]["overall"]["n"] == 2 and results["metrics"]["axis:accuracy"]["n"] == 1
    prompt = next(request["body"]["messages"][0]["content"] for request in server.requests if " c4" in request["body"]["messages"][0]["content"])
    assert r'"\u005b-6] c4"' in prompt and '"explanation"' in prompt and '"user": "ache"' in prompt
    assert results["judge"]["requests"] == 6 and results["settings"]["judge_model"] == "m"


def test_healthbench_clips_the_mean_and_bootstraps():
    samples = [{"id": str(i), "group": "", "scores": {"overall": x}} for i, x in enumerate([-3.0, 0.5, 0.7, 1.0])]
    clipped, plain = (evaluation.summarize(samples, {}, clip, 0)["overall"] for clip in (True, False))
    assert clipped["mean"] == 0 and plain["mean"] == pytest.approx(-0.2)
    draws = np.random.default_rng(1).choice([-3.0, 0.5, 0.7, 1.0], (20_000, 4)).mean(1)
    assert clipped["stderr"] == pytest.approx(draws.clip(0, 1).std(), rel=0.1) and plain["stderr"] == pytest.approx(draws.std(), rel=0.1)


def test_healthbench_without_enough_verdicts_keeps_the_responses(monkeypatch, tmp_path):
    server = Server(lambda body, n: '{"explanation": "x", "criterion_1": "true"}' if n > 1 else '{"criterion_1": true}')
    with pytest.raises(InputError, match="100% of the rows have a verdict missing"):
        evaluate(monkeypatch, tmp_path, *healthbench(tmp_path, server))
    lines = (tmp_path / "runs/a/samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["met"] == [None] * 4 and json.loads(lines[0])["scores"]["overall"] is None
    assert not (tmp_path / "runs/a/results.json").exists()


def test_one_missing_verdict_leaves_its_row_out(monkeypatch, tmp_path):
    server = Server(lambda body, n: (400, "too long") if " c2" in body["messages"][0]["content"] else json.dumps(dict.fromkeys(names(body), True)))
    results, samples = evaluate(monkeypatch, tmp_path, *healthbench(tmp_path, server), "--judge-max-missing", 0.6)
    assert samples[0]["scores"]["overall"] is None and samples[0]["scores"]["axis:completeness"] == 1
    assert results["metrics"]["overall"] == pytest.approx({"mean": 0, "stderr": 0, "n": 1}) and results["judge"]["missing"] == pytest.approx(1 / 6)
    assert results["judge"]["rows_missing"] == 0.5
    with pytest.raises(InputError, match="50% of the rows have a verdict missing, more than --judge-max-missing 0.2"):
        evaluate(monkeypatch, tmp_path, *healthbench(tmp_path, server), name="b")


# GPQA

GPQA = ("Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Record ID\n"
        '"Secret ""one"",\nin two lines?",right1,w1,x1,y1,rec1\nSecret two?,right2,w2,x2,y2,rec2\nSecret three?,right3,w3,x3,y3,rec3\n')


def gpqa(tmp_path, **options):
    (tmp_path / "g.csv").write_text(GPQA)
    return benchmarks.load(SimpleNamespace(**{"task": "gpqa", "data": str(tmp_path / "g.csv"), "repeats": 2, "seed": 0, "limit": 0, **options}))


def test_gpqa_permutations_are_simple_evals(tmp_path):
    """Rows repeated, then one permutation each from Random(0), in order."""
    rng, items = random.Random(0), gpqa(tmp_path)
    for repeat, i in itertools.product(range(2), range(3)):
        order = rng.sample(range(4), 4)
        text = items[i].examples[repeat].messages[0]["content"]
        choices = [f"{['right', 'w', 'x', 'y'][k]}{i + 1}" for k in order]
        assert text.splitlines()[-4:] == [f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
        letter = "ABCD"[order.index(0)]
        right = ["Answer: E"] * 2
        right[repeat] = f"so\nAnswer: {letter}"
        scores, more = items[i].score(right, None)
        assert scores == {"accuracy": 0.5, "answered": 0.5} and more["correct"][repeat] == letter == more["letters"][repeat]
    assert 'Secret "one",\nin two lines?' in items[0].examples[0].messages[0]["content"]
    assert [item.id for item in items] == ["rec1", "rec2", "rec3"] and len(gpqa(tmp_path, limit=2)) == 2
    assert gpqa(tmp_path, seed=1)[0].examples != items[0].examples


@pytest.mark.parametrize(("response", "letter"), [("Answer: B", "B"), ("answer : $c$", "C"), ("Answer: A\nAnswer: B", "A"), ("The answer is B", None),
                                                  ("Answer:\nB", None), ("**Answer: D**", "D"), ("", None), ("Answer: E", None)])
def test_gpqa_letter(response, letter):
    assert benchmarks.gpqa_letter(response) == letter


def test_gpqa_items_are_not_published(monkeypatch, tmp_path):
    (tmp_path / "g.csv").write_text(GPQA)
    answer = "Secret two? is right2. Answer: A"
    monkeypatch.setattr(evaluation.rollout, "_response", lambda tokens, logp, finish, *rest: evaluation.rollout.Response(tokens, logp, [], finish, answer))
    results, samples = evaluate(monkeypatch, tmp_path, "--task", "gpqa", "--data", "g.csv", "--max-tokens", 4, "--repeats", 2)
    for file in (tmp_path / "runs/a").iterdir():
        assert not any(secret in file.read_text() for secret in ("Secret", "right", "w1", "x2"))
    assert base64.b64decode(samples[1]["responses_base64"][0]).decode() == answer
    assert results["metrics"]["answered"]["mean"] == 1 and len(samples) == 3


@pytest.mark.parametrize(("text", "message"), [("Question\nq\n", "row 0 lacks a column"), (GPQA + "q,,a,b,c,d\n", "row 3 lacks a column"), ("Question\n", "no rows"),
                                               (GPQA + "q,a,b,c,d,rec1\n", "the same id"), ('"a\n', "cannot be read")])
def test_bad_gpqa_rows(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        benchmarks.load(SimpleNamespace(task="gpqa", data=str(tmp_path / "x.csv"), repeats=1, seed=0, limit=0))


# BFCL

def literal(value, kind: str) -> str:
    """The value as Java or JavaScript source, as the checker's converters read it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and kind == "ArrayList":
        return f"new ArrayList<String>(Arrays.asList({', '.join(literal(x, 'json') for x in value)}))"
    if isinstance(value, list) and kind == "Array":
        return f"new String[]{{{', '.join(map(str, value))}}}"  # the converter keeps quotes as a part of the string
    if isinstance(value, dict) and kind == "HashMap":
        return "new HashMap<String, Object>() {{ " + " ".join(f'put("{k}", {literal(v, "json")});' for k, v in value.items()) + " }}"
    if kind in ("long", "float"):
        return f"{value}{kind[0].upper()}"
    return value if isinstance(value, str) and kind != "json" else json.dumps(value)


def plain(value):
    """Of an object, or of the objects in a list, the first accepted value of every key."""
    if isinstance(value, list):
        return [plain(x) if isinstance(x, dict) else x for x in value]
    return {k: v[0] for k, v in value.items() if v and v[0] != ""} if isinstance(value, dict) else value


def echo(category: str, functions: list[dict], truth: list[dict]) -> str:
    """A response that says the ground truth."""
    lines, properties = [], {f["name"]: f["parameters"]["properties"] for f in functions}
    for call in truth:
        ((name, accepted),) = call.items()
        parameters = {k: plain(values[0]) for k, values in accepted.items() if values and values[0] != ""}
        if category in ("simple_java", "simple_javascript"):
            kinds = {k: kind["type"] if category == "simple_java" else "String" for k, kind in properties[name].items()}
            parameters = {k: literal(v, kinds[k]) for k, v in parameters.items()}
        lines.append(json.dumps({"name": name, "parameters": parameters}))
    return "<think> t </think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


@pytest.fixture(scope="module")
def bfcl_items():
    return benchmarks.load(SimpleNamespace(task="bfcl", data=None, limit=0))


def test_bfcl_ground_truth_passes_its_checker(bfcl_items):
    """The rest is the data's own: a few rows require a parameter that their answer leaves out."""
    package, passed, total = benchmarks.bfcl_package(), 0, 0
    items = {item.id: item for item in bfcl_items}
    for category in benchmarks.NON_LIVE + benchmarks.LIVE:
        if "relevance" in category:
            continue
        for entry, truth in zip(package.entries(category, include_language_specific_hint=False), package.truths(category), strict=True):
            scores, _ = items[entry["id"]].score([echo(category, entry["function"], truth["ground_truth"])], None)
            assert scores["format"] == 1
            passed, total = passed + scores["correct"], total + 1
            wrong = echo(category, entry["function"], truth["ground_truth"]).replace('{"name": "', '{"name": "x')
            assert items[entry["id"]].score([wrong], None)[0]["correct"] == 0
    print(f"{passed:.0f} of {total}")
    assert total == 2501 and passed / total >= 0.99


def test_bfcl_relevance_and_format(bfcl_items):
    call = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>'
    refusal = "<think> t </think>\n<response> I have no tool for that. </response>"
    by_group = {item.group: item for item in bfcl_items}
    assert set(by_group) == set(benchmarks.NON_LIVE + benchmarks.LIVE)
    for group, response, scores in [("irrelevance", call, (0, 1)), ("irrelevance", refusal, (1, 1)), ("live_irrelevance", "text", (1, 0)),
                                    ("live_relevance", call, (1, 1)), ("live_relevance", refusal, (0, 1)), ("live_relevance", call.replace("{}", "3"), (0, 1)),
                                    ("simple_python", refusal, (0, 1)), ("simple_python", call, (0, 1)), ("parallel", "", (0, 0))]:
        got, _ = by_group[group].score([response], None)
        assert (got["correct"], got["format"]) == scores, (group, response)


def test_bfcl_calls_are_read_as_toolrl_reads_them():
    block = '<tool_call>\n{"name": "f", "parameters": {"x": 1}}\nbad line\n{"name": "g"}\n[]\n{"name": "h", "parameters": {}}\n</tool_call>'
    assert benchmarks.bfcl_calls(block) == [{"f": {"x": 1}}, {"h": {}}]
    assert benchmarks.bfcl_calls(block + '<tool_call>\n{"name": "last", "parameters": {}}\n</tool_call> text') == [{"last": {}}]
    assert benchmarks.bfcl_calls('{"name": "f", "parameters": {}}') == benchmarks.bfcl_calls("") == benchmarks.bfcl_calls("[" * 50_000) == []


def test_bfcl_prompt_is_toolrls(bfcl_items):
    system, user = bfcl_items[0].examples[0].messages
    assert "\n1. Name: calculate_triangle_area\nDescription: Calculate the area" in system["content"] and '\nParameters: {"base": {"type": "integer"' in system["content"]
    assert '{"name": "Tool name", "parameters": {"Parameter name": "Parameter content", "... ...": "... ..."}}' in system["content"]
    assert user["content"] == "**Dialogue Records History**\n<user> Find the area of a triangle with a base of 10 units and height of 5 units. </user>"
    java = next(item for item in bfcl_items if item.group == "simple_java")
    assert "Java 8 SDK syntax" in java.examples[0].messages[0]["content"]


def test_bfcl_averages_by_hand():
    averages = benchmarks.bfcl_averages()
    assert all(sum(weights.values()) == pytest.approx(1) for weights in averages.values())
    right = {"simple_python": 0.9, "simple_java": 0.6, "simple_javascript": 0.3, "multiple": 0.8, "parallel": 0.4, "irrelevance": 0.5,
             "live_simple": 0.5, "live_irrelevance": 1.0}
    samples = [{"id": f"{c}{i}", "group": c, "scores": {"correct": float(i < 10 * right.get(c, 0)), "format": 1.0}}
               for c in benchmarks.NON_LIVE + benchmarks.LIVE for i in range(10)]
    means = {name: metric["mean"] for name, metric in evaluation.summarize(samples, averages, False, 0).items()}
    assert means["non-live"] == pytest.approx((0.6 + 0.8 + 0.4 + 0 + 0.5) / 5)
    live = {"live_simple": 258, "live_multiple": 1053, "live_parallel": 16, "live_parallel_multiple": 24, "live_irrelevance": 884, "live_relevance": 16}
    assert means["live"] == pytest.approx((0.5 * 258 + 884) / sum(live.values()))
    assert means["v3 without multi-turn (live, non-live)"] == pytest.approx((means["live"] + means["non-live"]) / 2)
    assert means["simple_java"] == pytest.approx(0.6) and means["format"] == 1


def test_bfcl_eval_missing(monkeypatch):
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps bfcl-eval"):
        benchmarks.bfcl_package.__wrapped__()


# Comparing

def result(tmp_path, name, values, task="gpqa", **settings):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"task": task, "settings": {"items": "x", "model": name, **settings}, "averages": {}, "metrics": {}}))
    (folder / "samples.jsonl").write_text("\n".join(json.dumps({"id": str(i), "group": "", "scores": scores}) for i, scores in enumerate(values)))
    return folder / "results.json"


def test_compare_against_exact_tests(tmp_path):
    """Eight pairs: all 256 sign flips enumerated, and the bootstrap interval from as many draws of our own."""
    rng = np.random.default_rng(0)
    x, y = rng.random(8), rng.random(8) + 0.25
    (row,) = evaluation.compare(result(tmp_path, "a", [{"s": v} for v in x]), result(tmp_path, "b", [{"s": v} for v in y]))
    d = y - x
    exact = np.mean([abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12 for signs in itertools.product([-1, 1], repeat=8)])
    assert row["difference"] == pytest.approx(d.mean()) and row["p"] == pytest.approx(exact, abs=0.015) and row["n"] == 8
    draws = rng.choice(d, (100_000, 8)).mean(1)
    assert [row["low"], row["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_compare_is_paired_corrected_and_leaves_missing_pairs_out(tmp_path):
    rng = np.random.default_rng(1)
    base = rng.random(200)  # items differ far more than the two models do
    first = [{"overall": v, "axis:a": v, "axis:b": v} for v in base]
    second = [{"overall": v + 0.02 + 0.02 * rng.standard_normal(), "axis:a": v + 0.01 * rng.standard_normal(), "axis:b": v + 0.02} for v in base]
    second[0]["axis:b"] = None
    overall, a, b = evaluation.compare(result(tmp_path, "a", first), result(tmp_path, "b", second))
    assert overall["p"] < 0.001 and overall["low"] > 0.01 and "p_holm" not in overall
    assert a["p"] > 0.01 and b["n"] == 199 and b["p_holm"] == pytest.approx(2 * b["p"]) and a["p_holm"] == pytest.approx(max(a["p"], 2 * b["p"]))
    same = evaluation.compare(tmp_path / "a/results.json", tmp_path / "a/results.json")
    assert all(row["difference"] == 0 and row["p"] == 1 for row in same)


def test_holm_by_hand():
    assert evaluation.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluation.holm([0.9, 0.8]) == [1.0, 1.0] and evaluation.holm([]) == []


def test_compare_refuses(tmp_path):
    good = result(tmp_path, "good", [{"s": 1.0}])
    for name, options, message in [("items", {"items": "y"}, "different items"), ("heat", {"temperature": 1}, "temperature is None in"), ("task", {"task": "bfcl"}, "task is gpqa")]:
        with pytest.raises(InputError, match=f"cannot be compared: .*{message}"):
            evaluation.compare(good, result(tmp_path, name, [{"s": 1.0}], **options))
    with pytest.raises(InputError, match="different items"):
        evaluation.compare(good, result(tmp_path, "more", [{"s": 1.0}, {"s": 0.0}]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/results.json").write_text("{}")
    broken = [tmp_path / "broken/results.json", tmp_path / "missing/results.json", result(tmp_path, "none", [])]
    for number, scores in enumerate(["text", None, [1], {"s": "0.5"}, {"s": [1]}, {"s": float("inf")}]):
        broken.append(result(tmp_path, f"odd{number}", [scores]))
    twice = result(tmp_path, "twice", [{"s": 1.0}])
    (tmp_path / "twice/samples.jsonl").write_text('{"id": "0", "group": "", "scores": {}}\n' * 2)
    with pytest.raises(InputError, match="no metric in common"):
        evaluation.compare(good, result(tmp_path, "other", [{"t": 1.0}]))
    for path in [*broken, twice]:
        with pytest.raises(InputError, match="cannot be read as eval.py writes them"):
            evaluation.compare(good, path)


# The command

def test_trained_tasks_and_the_command(monkeypatch, tmp_path):
    results, samples = evaluate(monkeypatch, tmp_path, "--task", "tools", "--limit", 3, "--max-tokens", 16)
    assert len(samples) == 3 and set(results["metrics"]) == {"joint", *rewards.TOOLS_CHANNELS}
    example = data.tools(3, "test")[1]
    answer = rewards.score("tools", [""], [samples[1]["response"]], [example.reference])[0]
    assert list(samples[1]["scores"].values())[1:] == answer.tolist() and samples[1]["reference"] == example.reference
    row = {"prompt": example.messages, "reward_model": {"ground_truth": "<think> t </think>\n" + example.reference.rpartition("</think>\n")[2]}}
    (tmp_path / "rlla.json").write_text(json.dumps([row] * 2))
    command = [sys.executable, ROOT / "eval.py", "--model", model.resolve("tiny"), "--engine", "hf", "--task", "rlla", "--data", "rlla.json", "--max-tokens", "8"]
    out = subprocess.run([*command, "--name", "b"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and "correctness  -3.000 (0.000)  n=2" in out.stdout, out.stderr[-2000:]
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command[1:], "--name", "c"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert (tmp_path / "runs/b/samples.jsonl").read_text() == (tmp_path / "runs/c/samples.jsonl").read_text()  # greedy: the same on two ranks
    out = subprocess.run([sys.executable, ROOT / "eval.py", "compare", "runs/b/results.json", "runs/c/results.json"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.count("1.0000") >= 3


@needs_vllm
def test_vllm_and_transformers_answer_alike(monkeypatch, tmp_path):
    """Greedy, from the checkpoint as it is."""
    args = ["--task", "tools", "--limit", "4", "--max-tokens", "12"]
    _, samples = evaluate(monkeypatch, tmp_path, *args)
    out = subprocess.run([sys.executable, ROOT / "eval.py", "--model", "tiny", "--engine", "vllm", *args, "--name", "vllm"], cwd=tmp_path, capture_output=True,
                         text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    of_vllm = [json.loads(line)["response"] for line in (tmp_path / "runs/vllm/samples.jsonl").read_text().splitlines()]
    assert of_vllm == [sample["response"] for sample in samples]


@pytest.mark.parametrize(("args", "message"), [
    ([], "--task None: choose one of healthbench"), (["--task", "x"], "--task x"), (["--task", "healthbench"], "needs a judge"),
    (["--task", "healthbench", "--subset", "easy"], "--subset easy: choose one of full, hard, consensus"), (["--task", "tools", "--data", "x"], "brings its own"), (["--task", "gpqa", "--subset", "hard"], "does not use it"),
    (["--task", "gpqa", "--data", "x.csv"], "x.csv cannot be read"), (["--task", "gpqa", "--repeats", 0], "--repeats 0"), (["--task", "tools", "--temperature", -2], "--temperature -2"),
    (["--task", "tools", "--max-tokens", -5], "--max-tokens -5"), (["--task", "tools", "--max-tokens", 4000], "has room for 96"), (["--task", "tools", "--limit", -1], "--limit -1"),
    (["--task", "tools", "--model", "./nothing"], "no such file"), (["--tasks", "tools"], "unrecognized arguments: --tasks"),
    (["--task", "healthbench", "--data", "h.jsonl", "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m"], "cannot be used: ClientConnectorError: Cannot connect"),
])
def test_bad_input(monkeypatch, tmp_path, args, message):
    monkeypatch.setattr(model, "load", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(InputError) as error:
        evaluate(monkeypatch, tmp_path, *args)
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "runs/a").exists()


@pytest.mark.parametrize("rubrics", [None, [], [{"criterion": "c"}], [{"points": 1}], ["c"], [{"criterion": "c", "points": -1}], [{"criterion": "c", "points": float("nan")}],
                                     [{"criterion": "c", "points": True}]])
def test_a_bad_healthbench_row_is_named(tmp_path, rubrics):
    for row, message in [({**HEALTH[0], "rubrics": rubrics}, "row 2 has no rubrics"), ({**HEALTH[0], "example_tags": "theme:x"}, "row 2 has tags that are no list"),
                         ({**HEALTH[0], "example_tags": [1]}, "row 2 has tags"), ("text", "row 2 is no object")]:
        (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, [*HEALTH, row])))
        with pytest.raises(InputError, match=message):
            benchmarks.load(SimpleNamespace(task="healthbench", data=str(tmp_path / "h.jsonl"), limit=0))
