"""Do our scores agree with other tools'? Both score the same verdicts, orders, answers and calls, row by row.

    python tools/agree.py healthbench --python VENV/bin/python --data ROWS.jsonl               # inspect_evals
    python tools/agree.py healthbench --python VENV/bin/python --data ROWS.jsonl --source DIR  # simple-evals
    python tools/agree.py gpqa --python VENV/bin/python                                        # inspect_evals
    python tools/agree.py gpqa --python VENV/bin/python --source DIR                           # simple-evals
    python tools/agree.py bfcl --python VENV/bin/python                                        # bfcl-eval, whole
    python tools/agree.py rlla --python VENV/bin/python --data ROWS.parquet --source FILE      # ToolRL

VENV is none of this project's: pip install inspect_evals==0.26.0 inspect_ai==0.3.285 for the first four (simple-evals
needs pandas and what else its checkout imports), bfcl-eval==2025.8.6.2 soundfile for bfcl. DIR: a checkout of github
openai/simple-evals; FILE: verl/utils/reward_score/rlla.py of one of qiancheng0/ToolRL. Cases are drawn with a seed; the
rows of gpqa are made up. Prints how many scores are equal, how many are once ours are computed in the other's way, and
which differ. Standard errors are bootstrapped: equal is within 15% or 0.005.
"""

import argparse
import collections
import copy
import json
import math
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # a script sees its own folder only
sys.path.insert(0, str(Path(__file__).parent.parent))

from infra.ranks import InputError
from tools.others import AXES, CHOICES, order

TOOLS = {
    "healthbench": ("inspect_evals", "simple_evals"),
    "gpqa": ("inspect_evals", "simple_evals"),
    "bfcl": ("bfcl_eval",),
    "rlla": ("toolrl",),
}  # the second: with --source
ANSWERS = (
    "Answer: B",
    "answer: b",
    "ANSWER : C",
    "Answer:\nB",
    "Answer: $D$",
    "Answer: A\nAnswer: B",
    "**Answer: B**",
    "**Answer:** B",
    "Answer: **B**",
    "Answer: (B)",
    "Answer: B)",
    "Answer: B.",
    "Answer: B, since x",
    "B",
    "",
    "The answer is B",
    "Answer: E",
    "Answer: Both A and B",
    "Answer: AB",
    "Answer: A, B",
    "Answer: \\boxed{B}",
    "Not so: Answer: A is wrong.\nAnswer: C",
    "Answer: B\nis my choice",
    "Answer: Ä",
    "Answer： B",
    "final answer:C",
    "$\\text{Answer: D}$",
    "Answer: Because",
    "So ANSWER: A\n\nThe end.",
)


# The cases: {"kind": ..., and what both tools score}


def draw_healthbench(data: list[str]) -> list[dict]:
    """20 sets of verdicts, each with rates of its own of positive and negative criteria that are met; 5 in which some
    are missing. A criterion without an axis is given one at random."""
    from tasks import healthbench, rows

    rng, cases = random.Random(0), []
    examples = [example for path in data for example in rows.read(path, healthbench.from_row)]
    for i in range(25):
        rates, drawn = (rng.random(), rng.random()), []
        for example in examples:
            axes = [
                [k for k, axis in enumerate(AXES) if axis in item.tags]
                or [rng.randrange(len(AXES))]
                for item in example.criteria
            ]
            met = [int(rng.random() < rates[item.points < 0]) for item in example.criteria]
            drawn.append(
                {
                    "points": [item.points for item in example.criteria],
                    "axes": [k for k, *_ in axes],
                    "themes": json.loads(example.reference),
                    "met": [None if i >= 20 and rng.random() < 0.02 else x for x in met],
                }
            )
        cases.append({"kind": "some missing" if i >= 20 else "all verdicts", "rows": drawn})
    return cases


def draw_gpqa(data: list[str]) -> list[dict]:
    return [
        {"kind": "orders", "rows": 198, "repeats": 4},
        {"kind": "orders of few rows", "rows": 8, "repeats": 3},
        {"kind": "answers", "responses": ANSWERS},
    ]


def spoil(calls: list[dict], rng: random.Random) -> tuple[str, list[dict]]:
    """What was done, and the calls [{"name", "parameters"}] after it."""
    calls = copy.deepcopy(calls)
    call = rng.choice(calls)
    values, done = (
        call["parameters"],
        rng.choice("name value value type drop add twice fewer order".split()),
    )
    key = rng.choice([*values]) if values else None
    if done == "name":
        call["name"] += rng.choice(("_", " ", "x"))
    elif done == "twice":
        calls.append(call)
    elif done == "fewer":
        calls.remove(call)
    elif done == "order" and len(calls) > 1:
        calls.reverse()
    elif done in ("add", "order") or key is None:
        done, values["another"] = "add", 1
    elif done == "drop":
        del values[key]
    elif done == "type":
        values[key] = rng.choice(([values[key]], str(values[key]), {"a": values[key]}))
    else:
        values[key] = rng.choice(
            (f"{values[key]}x", f"{values[key]}-".upper(), 12345, None, True, 0.5)
        )
    return done, calls


def respond(calls: list[dict]) -> str:
    return (
        "<think> t </think>\n<tool_call>\n" + "\n".join(map(json.dumps, calls)) + "\n</tool_call>"
    )


def draw_bfcl(data: list[str]) -> list[dict]:
    """Every row with its ground truth; 200 spoiled ones; (ir)relevance with a call and without; 20 sets of
    accuracies."""
    from test_eval import echo

    from tasks import bfcl

    rng, right, others, sizes = random.Random(0), [], [], {}
    for category in bfcl.NON_LIVE + bfcl.LIVE:
        examples = bfcl.read(category)
        sizes[category] = len(examples)
        for example in examples:
            _, functions, truth = json.loads(example.reference)
            case = {
                "kind": "ground truth",
                "category": category,
                "id": example.id,
                "reference": example.reference,
            }
            if truth is not None:
                right.append(case | {"response": echo(category, functions, truth)})
            else:
                others += [
                    case | {"kind": f"relevance, {kind}", "response": text}
                    for kind, text in (
                        ("a call", respond([{"name": "f", "parameters": {}}])),
                        ("none", "<think> t </think>\n<response> No. </response>"),
                    )
                ]
    for case in rng.sample(right, 200):
        done, calls = spoil([json.loads(line) for line in case["response"].split("\n")[2:-1]], rng)
        others.append(case | {"kind": f"spoiled: {done}", "response": respond(calls)})
    return (
        right
        + others
        + [
            {
                "kind": "averages",
                "sizes": sizes,
                "accuracy": {c: round(rng.random(), 3) for c in sizes},
            }
            for _ in range(20)
        ]
    )


def draw_rlla(data: list[str]) -> list[dict]:
    """Every row's ground truth, changed in the ways that the format is about, and its calls spoiled twice."""
    from tasks import rlla, rows

    def ground_truth(row: dict, where: str) -> str:
        rlla.from_row(row, where)  # raises
        return row["reward_model"]["ground_truth"]

    rng, cases = random.Random(0), []
    for truth in [text for path in data for text in rows.read(path, ground_truth)]:
        think, _, rest = truth.partition("</think>")
        block = rest.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0]
        texts = {
            "ground truth": truth,
            "no thought": rest.strip(),
            "spaces around": f" \n{truth}\n\n",
            "empty": "",
            "text after": f"{truth} x",
            "text before": f"x {truth}",
            "blocks twice": truth + rest,
            "text": "text",
            "blank line": truth.replace("</think>\n", "</think>\n\n"),
            "cut": truth[: len(truth) * 2 // 3],
            "no line break": truth.replace("<tool_call>\n", "<tool_call>"),
            "single quotes": truth.replace('"', "'"),
            "two thoughts": f"{think}</think>\n{truth}",
            "response added": f"{truth}\n<response> r </response>",
            "tag in thought": truth.replace("<think>", "<think><tool_call>", 1),
            "no parameters": truth.replace('"parameters"', '"arguments"'),
        }
        if block:
            texts["a call named 1"] = truth.replace(
                block, block + '\n{"name": 1, "parameters": {}}'
            )
        for _ in range(2 if block else 0):
            done, calls = spoil([json.loads(line) for line in block.split("\n")], rng)
            texts[f"calls: {done}"] = truth.replace(block, "\n".join(map(json.dumps, calls)))
        cases += [{"kind": kind, "truth": truth, "response": text} for kind, text in texts.items()]
    return cases


# Our scores of a case: {name: value}


def ours_healthbench(case: dict, clip: bool = False, missing: float = math.nan) -> dict[str, float]:
    """clip: every row's score of an axis or theme to [0, 1], which ours are not."""
    import numpy as np

    import eval as evaluation
    from rewards import Example
    from tasks.healthbench import HealthBench, Item

    samples = []
    for row in case["rows"]:
        items = tuple(
            Item("", points, (AXES[k],))
            for points, k in zip(row["points"], row["axes"], strict=True)
        )
        met = np.array([missing if x is None else x for x in row["met"]], dtype=float)
        scores, _ = HealthBench.result(None, Example([], json.dumps(row["themes"]), items), "", met)
        samples.append(
            {
                "category": "",
                "scores": {
                    name: float(np.clip(x, 0, 1)) if clip and ":" in name else x
                    for name, x in scores.items()
                },
            }
        )
    table = evaluation.summarize(samples, {}, True, 0)
    return {
        f"{name} {key}": value for name, metric in table.items() for key, value in metric.items()
    }


def ours_gpqa(case: dict) -> dict[str, str | None]:
    from config import EvalConfig
    from tasks import gpqa

    if case["kind"] == "answers":
        return {text: gpqa.letter(text) for text in case["responses"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        path.write_text(
            "\n".join([",".join(["Question", *CHOICES]), *["q,0,1,2,3"] * case["rows"]])
        )
        task = gpqa.task(EvalConfig(task="gpqa", eval_data=str(path), repeats=case["repeats"]))
        prompts = [example.messages[0]["content"] for example in task.prompts(0, None)[1]]
    return {
        f"{j // case['repeats']}/{j % case['repeats']}": order(prompt.splitlines()[-4:])
        for j, prompt in enumerate(prompts)
    }


def ours_bfcl(case: dict) -> dict[str, float]:
    from tasks import bfcl

    if case["kind"] != "averages":
        return {"correct": bfcl.correct([""], [case["response"]], [case["reference"]])[0]}
    task = object.__new__(bfcl.BFCL)
    task.rows = {category: [None] * n for category, n in case["sizes"].items()}
    return {
        name: sum(weight * case["accuracy"][c] for c, weight in weights.items())
        for name, weights in task.averages().items()
        if "all rows" not in name
    }


def ours_rlla(case: dict, whole: bool = False) -> dict[str, float | str]:
    """whole: the reference with its thought, which ours are without."""
    from tasks import bfcl, rlla

    row = {
        "prompt": [{"role": "user", "content": ""}],
        "reward_model": {"ground_truth": case["truth"]},
    }
    pair = [case["response"]], [case["truth"] if whole else rlla.from_row(row, "").reference]
    try:
        correctness = rlla.correctness([], *pair)[0]
    except ValueError:
        correctness = "raises"
    return {
        "format": rlla.format_reward([], *pair)[0],
        "correctness": correctness,
        "format in bfcl": bfcl.right_format([], *pair)[0],
    }


def ours_their_way(what: str, tool: str, case: dict) -> dict[str, dict]:
    """{how the other tool differs: our scores, computed so}"""
    if (what, tool) == ("healthbench", "inspect_evals"):
        return {
            "rows clipped": ours_healthbench(case, True),
            "missing is not met": ours_healthbench(case, missing=0.0),
            "both": ours_healthbench(case, True, 0.0),
        }
    if what == "rlla":
        return {"tags in the reference's thought": ours_rlla(case, whole=True)}
    if (what, tool) != ("gpqa", "inspect_evals") or "rows" not in case:
        return {}
    rng, orders = random.Random(42), {}
    for i in range(case["rows"]):
        shuffled = [*"0123"]
        rng.shuffle(shuffled)
        orders |= {f"{i}/{k}": "".join(shuffled) for k in range(case["repeats"])}
    return {"one order for all repeats": orders}


def compare(
    what: str, tool: str, cases: list[dict], theirs: list[dict]
) -> list[tuple[str, str, str, object, object]]:
    """(kind of the case, verdict, name, our score, their score) for every score that both have. verdict: "equal", how
    the other tool differs, or "differs"."""

    def same(name: str, x, y) -> bool:
        if isinstance(x, float) and isinstance(y, float):
            rel, absolute = (0.15, 0.005) if name.endswith("stderr") else (1e-9, 1e-9)
            return math.isclose(x, y, rel_tol=rel, abs_tol=absolute)
        return x == y

    out = []
    for case, their in zip(cases, theirs, strict=True):
        our = globals()[f"ours_{what}"](case)
        wrong = {
            name for name in our.keys() & their.keys() if not same(name, our[name], their[name])
        }
        ways = ours_their_way(what, tool, case) if wrong else {}
        for name in sorted(our.keys() & their.keys()):
            reasons = [
                way
                for way, scores in ways.items()
                if name in scores and same(name, scores[name], their[name])
            ]
            verdict = (reasons or ["differs"])[0] if name in wrong else "equal"
            out.append((case["kind"], verdict, name, our[name], their[name]))
    return out


def score(tool: str, cases: list[dict], args: argparse.Namespace) -> list[dict]:
    """The other tool's scores of the cases. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:
        asked, given = Path(folder) / "cases.json", Path(folder) / "scores.json"
        asked.write_text(json.dumps(cases))
        run = [
            args.python,
            Path(__file__).parent / "others.py",
            f"{args.what}_of_{tool}",
            asked,
            given,
            *args.source,
        ]
        try:
            done = subprocess.run(run, capture_output=True, text=True)
        except OSError as error:
            raise InputError(f"--python {args.python} cannot be run: {error.strerror}") from error
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise InputError(
                f"{tool} could not score the cases with --python {args.python}: {reason}"
            )
        return json.loads(given.read_text())


def record(file: Path, name: str, pairs: list[tuple[dict, dict]]) -> None:
    """Puts pairs (case, their scores) into the file: the shortest of each kind and outcome, of short ones two."""
    kinds = collections.defaultdict(list)
    for pair in sorted((pair for pair in pairs if pair[1]), key=lambda pair: len(str(pair))):
        kinds[pair[0]["kind"], pair[1].get("correct")].append(pair)
    recorded = json.loads(file.read_text()) if file.exists() else {}
    recorded[name] = [
        pair
        for same in kinds.values()
        for k, pair in enumerate(same[:2])
        if len(str(pair)) < (12_000, 400)[k]
    ]
    text = json.dumps(recorded, ensure_ascii=False, separators=(",", ":"))
    file.write_text(text.replace('[{"kind"', '\n[{"kind"') + "\n")  # a line a pair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=TOOLS)
    add("--python", required=True, help="the Python that has the other tool")
    add("--data", nargs="+", default=[], help="of healthbench and rlla: files of rows")
    add("--source", nargs=1, default=[], help="a checkout's folder (simple-evals) or file (ToolRL)")
    add(
        "--record",
        type=Path,
        help="the file of tests/test_agreement.py, into which some cases are put",
    )
    args = parser.parse_args()
    tool = TOOLS[args.what][-1 if args.source else 0]
    try:
        if not args.data and args.what in ("healthbench", "rlla"):
            raise InputError(f"{args.what} needs --data: the files of rows that both tools score")
        if not args.source and args.what == "rlla":
            raise InputError("rlla needs --source: the file rlla.py of a checkout of ToolRL")
        cases = globals()[f"draw_{args.what}"](args.data)
        theirs = score(tool, cases, args)
    except InputError as error:
        sys.exit(f"error: {error}")
    found = compare(args.what, tool, cases, theirs)
    for column in (0, 2):  # by kind, and by score
        names = [re.sub(r"(?<=axis|heme):\w+", "", row[column]) for row in found]
        counts = collections.Counter(zip(names, [row[1] for row in found], strict=True))
        for (name, verdict), n in (
            sorted(counts.items()) if len(counts) < 80 else ()
        ):  # not every order of gpqa
            print(f"{name:42}{verdict:34}{n:7}")
        print()
    for kind, verdict, name, our, their in [row for row in found if row[1] == "differs"][:40]:
        print(f"{verdict}: {kind}, {name!r}: here {our}, {tool} {their}")
    if args.record:
        record(args.record, f"{args.what} {tool}", list(zip(cases, theirs, strict=True)))


if __name__ == "__main__":
    main()
