"""The half of tools/agree.py that the other tool's Python runs: its scores of the cases. Imports nothing of rvpo.

    VENV/bin/python tools/others.py WHAT_of_TOOL CASES.json SCORES.json [SOURCE]

CASES: a list of cases, see tools/agree.py. SCORES: a list as long, {name: the tool's score}, {} where it has none.
What the tools do not offer as a function is called by its private name, so other versions may need other calls.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path

AXES = (
    "axis:accuracy",
    "axis:completeness",
    "axis:communication_quality",
    "axis:context_awareness",
    "axis:instruction_following",
)
CHOICES = "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"


def order(choices: list[str]) -> str:
    """As "2031": which of CHOICES are A, B, C, D. The text of a choice ends with its number."""
    return "".join(choice.strip()[-1] for choice in choices)


def checkout(source: str, name: str):
    """A module of simple-evals, the folder of which may have any name."""
    os.environ["debug"] = "1"  # noqa: SIM112 its own switch: one item after another
    package = sys.modules["simple_evals"] = types.ModuleType("simple_evals")
    package.__path__ = [source]
    return importlib.import_module(f"simple_evals.{name}")


def healthbench_of_simple_evals(cases: list[dict], source: str) -> list[dict]:
    module, out = checkout(source, "healthbench_eval"), []
    module.np.random.seed(0)  # of the bootstrap
    grader = object.__new__(module.HealthBenchEval)
    for case in cases:
        results = []
        for row in (
            case["rows"] if case["kind"] != "some missing" else ()
        ):  # it asks its judge until none is
            verdicts = iter([json.dumps({"criteria_met": bool(met)}) for met in row["met"]])
            grader.grader_model = lambda _, verdicts=verdicts: types.SimpleNamespace(
                response_text=next(verdicts)
            )
            items = [
                module.RubricItem("", points, [AXES[k]])
                for points, k in zip(row["points"], row["axes"], strict=True)
            ]
            metrics, *_ = grader.grade_sample([], "", row["themes"], items)
            results.append(
                types.SimpleNamespace(
                    metrics=metrics, score=None, html="", convo=[], example_level_metadata={}
                )
            )
        found = module._aggregate_get_clipped_mean(results).metrics
        out.append(
            {
                f"{name.replace('_score', '')} {key}": float(found[name + stat])
                for name in found
                if f"{name}:n_samples" in found
                for key, stat in (("mean", ""), ("n", ":n_samples"), ("stderr", ":bootstrap_std"))
            }
        )
    return out


def healthbench_of_inspect_evals(cases: list[dict], _) -> list[dict]:
    from inspect_ai.scorer import SampleScore, Score
    from inspect_evals.healthbench import dataset, scorer

    out, keys = [], {"score": "mean", "std": "stderr", "n_samples": "n"}
    for case in cases:
        scores = []
        for row in case["rows"]:
            items = [
                {"criterion": f"c{i}", "points": points, "tags": [AXES[k]]}
                for i, (points, k) in enumerate(zip(row["points"], row["axes"], strict=True))
            ]
            sample = dataset.record_to_sample(
                {
                    "prompt_id": "p",
                    "prompt": [{"role": "user", "content": "p"}],
                    "example_tags": row["themes"],
                    "rubrics": items,
                }
            )
            graded = [
                item | {"met": bool(met)}
                for item, met in zip(sample.metadata["rubrics"], row["met"], strict=True)
            ]
            value = scorer._calculate_score_metadata(
                graded,
                sum(max(0, item["points"]) for item in items),
                sum(item["points"] for item in graded if item["met"]),
            )
            scores.append(
                SampleScore(
                    score=Score(
                        value={
                            name: value[name]
                            for name in ("healthbench_score", "criteria_met", "total_criteria")
                        },
                        metadata={"detailed_results": graded},
                    )
                )
            )
        found = scorer.healthbench_bootstrapped()(scores)
        named = [
            (re.fullmatch("(axis|theme)_(.*)_(score|std|n_samples)", name), x)
            for name, x in found.items()
        ]
        out.append(
            {"overall mean": float(found["bootstrap_score"]), "overall stderr": float(found["std"])}
            | {f"{of[1]}:{of[2]} {keys[of[3]]}": float(x) for of, x in named if of}
        )
    return out


def gpqa_of_simple_evals(cases: list[dict], source: str) -> list[dict]:
    import pandas

    module, out = checkout(source, "gpqa_eval"), []
    module.common.aggregate_results = lambda results: results
    for case in cases:
        said = iter(case.get("responses", [""] * case.get("rows", 0) * case.get("repeats", 0)))
        rows = case.get("rows", len(case.get("responses", ())))
        frame = pandas.DataFrame([dict(zip(("Question", *CHOICES), "q0123", strict=True))] * rows)
        module.pandas.read_csv = lambda _, frame=frame: frame

        class Sampler:
            def _pack_message(self, content, role):
                return {"content": content}

            def __call__(self, messages, said=said):
                return next(said)

        results = module.GPQAEval(case.get("repeats", 1))(Sampler())
        if "rows" in case:
            out.append(
                {
                    f"{j % rows}/{j // rows}": order(result.convo[0]["content"].splitlines()[-4:])
                    for j, result in enumerate(results)
                }
            )
        else:
            letters = [re.search("Extracted Answer: (.*?)<", result.html)[1] for result in results]
            out.append(
                dict(
                    zip(
                        case["responses"],
                        [None if x == "None" else x for x in letters],
                        strict=True,
                    )
                )
            )
    return out


def gpqa_of_inspect_evals(cases: list[dict], _) -> list[dict]:
    from inspect_ai.dataset import MemoryDataset
    from inspect_ai.model import ModelName, ModelOutput
    from inspect_ai.solver import TaskState
    from inspect_ai.solver._multiple_choice import parse_answers
    from inspect_evals.gpqa import gpqa

    row, out = dict.fromkeys(("Record ID", "High-level domain", "Subdomain"), "x"), []
    row |= dict(zip(("Question", *CHOICES), "q0123", strict=True))
    for case in cases:
        data = MemoryDataset([gpqa.record_to_sample(row) for _ in range(case.get("rows", 1))])
        data.shuffle_choices(gpqa.DEFAULT_SHUFFLE_SEED)
        if "rows" in case:
            out.append(
                {
                    f"{i}/{k}": order(sample.choices)
                    for i, sample in enumerate(data)
                    for k in range(case["repeats"])
                }
            )
        else:
            states = [
                TaskState(
                    ModelName("mockllm/model"),
                    0,
                    0,
                    "q",
                    [],
                    choices=data[0].choices,
                    output=ModelOutput.from_content("mockllm", text),
                )
                for text in case["responses"]
            ]
            out.append(
                {
                    text: min(parse_answers(state, multiple_correct=False), default=None)
                    for text, state in zip(case["responses"], states, strict=True)
                }
            )
    return out


def bfcl_of_bfcl_eval(cases: list[dict], _) -> list[dict]:
    """By its runner, whose only part of ours is the handler, which reads ToolRL's format."""
    from bfcl_eval.eval_checker import eval_runner as runner
    from bfcl_eval.eval_checker import eval_runner_helper as helper

    def decode_ast(text: str, language: str) -> list[dict]:
        block = text.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0]
        return [{call["name"]: call["parameters"]} for call in map(json.loads, block.split("\n"))]

    model = next(
        name
        for name, of in runner.MODEL_CONFIG_MAPPING.items()
        if not of.underscore_to_dot and "_" not in name
    )  # its price and name are of no interest
    handler, files, tables, out = (
        types.SimpleNamespace(decode_ast=decode_ast),
        runner.TEST_FILE_MAPPING,
        {},
        [],
    )
    helper.write_score_csv_file = lambda data, file_path, header, **_: tables.update(
        {f"{file_path.stem} {name}": x for name, x in zip(header, data[0], strict=True)}
    )
    rows = {
        category: {row["id"]: row for row in runner.load_file(runner.PROMPT_PATH / files[category])}
        for category in {case["category"] for case in cases if "category" in case}
    }
    answers = {
        category: {
            row["id"]: row
            for row in runner.load_file(runner.POSSIBLE_ANSWER_PATH / files[category])
        }
        for category in rows
        if "relevance" not in category
    }
    folder = Path(tempfile.mkdtemp())
    for case in cases:
        if case["kind"] == "averages":
            helper.generate_leaderboard_csv(
                {
                    model: {
                        c: {"accuracy": x, "total_count": case["sizes"][c]}
                        for c, x in case["accuracy"].items()
                    }
                },
                folder,
            )
            names = {
                "non-live": "non_live Non_Live Overall Acc",
                "non-live AST": "non_live AST Summary",
                "live": "live Live Overall Acc",
                "live AST": "live AST Summary",
            }
            out.append(
                {ours: tables[f"data_{name}"] for ours, name in names.items()}
                | {
                    "v3 without multi-turn (live, non-live)": tables["data_overall Overall Acc"]
                    * 3
                    / 2
                }
            )
            continue
        category, result = case["category"], [{"id": case["id"], "result": case["response"]}]
        prompt = [rows[category][case["id"]]]
        if "relevance" in category:
            accuracy, _ = runner.relevance_file_runner(
                handler, result, prompt, model, category, folder
            )
        else:
            language = {"java": "Java", "javascript": "JavaScript"}.get(category, "Python")
            try:
                accuracy, _ = runner.ast_file_runner(
                    handler,
                    result,
                    prompt,
                    [answers[category][case["id"]]],
                    language,
                    category,
                    model,
                    folder,
                )
            except Exception as error:  # noqa: BLE001 what its checker does not foresee is what is asked
                accuracy = f"raises {type(error).__name__}"
        out.append({"correct": accuracy})
    return out


def rlla_of_toolrl(cases: list[dict], source: str) -> list[dict]:
    spec = importlib.util.spec_from_file_location("toolrl", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, forms = [], ("<tool_call>", "<response>", "<tool_call> <response>")
    for case in cases:
        text = [[{"content": case["response"].strip()}]]  # stripped by its compute_score
        with contextlib.redirect_stdout(io.StringIO()):
            score, *scores = [
                module.customize_format_reward_func(text, [reference], 1, 1.0, 0.0)[0]
                for reference in (case["truth"], *forms)
            ]
            try:
                right = module.customize_correctness_reward_tool(
                    text, [case["truth"]], 1, 3.0, -3.0
                )[0]
            except ValueError:
                right = "raises"
        out.append({"format": score, "correctness": right, "format in bfcl": max(scores)})
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[name for name in globals() if "_of_" in name])
    parser.add_argument("cases", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("source", nargs="?")
    args = parser.parse_args()
    args.scores.write_text(
        json.dumps(globals()[args.what](json.loads(args.cases.read_text()), args.source))
    )
