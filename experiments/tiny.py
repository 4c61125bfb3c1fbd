"""What run.py --tiny puts in place of data, model and judge.

A few rows, a million random parameters, and a judge whose verdicts mean nothing.
"""

import contextlib
import csv
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the stub is

from judge_server import Server, names

from local import models
from tasks import tools
from tasks.gpqa import CHOICES

FOLDER = Path("runs/tiny-data")
QUESTIONS = (
    "How do I treat a cold?",
    "What helps against a headache?",
    "When is a fever too high?",
    "Is coffee bad?",
)


def _lines(name: str, rows: list[dict]) -> str:
    file = FOLDER / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _rubrics() -> str:
    """In RaR's schema; three training rows and one that is held out."""
    items = [
        {"title": "a", "description": "Essential Criteria: Names a remedy.", "weight": 5},
        {"title": "b", "description": "Optional Criteria: Is friendly.", "weight": 1},
        {"title": "c", "description": "Pitfall Criteria: Recommends antibiotics.", "weight": -1},
    ]
    return _lines(
        "rubrics.jsonl", [{"question": question, "rubric": items} for question in QUESTIONS]
    )


def _tools() -> str:
    """In ToolRL's schema."""
    rows = [
        {"prompt": example.messages, "reward_model": {"ground_truth": example.reference}}
        for example in tools.examples(8, "train")
    ]
    return _lines("tools.jsonl", rows)


def _healthbench() -> str:
    """In HealthBench's schema."""
    points = {
        "accuracy": 5,
        "completeness": 4,
        "context_awareness": 3,
        "communication_quality": 2,
        "instruction_following": 1,
    }
    rubrics = [
        {"criterion": f"Has {axis}.", "points": points[axis], "tags": [f"axis:{axis}"]}
        for axis in points
    ]
    rubrics.append(
        {"criterion": "Frightens the user.", "points": -3, "tags": ["axis:communication_quality"]}
    )
    rows = [
        {
            "prompt_id": str(i),
            "prompt": [{"role": "user", "content": question}],
            "rubrics": rubrics,
            "example_tags": ["theme:tiny"],
        }
        for i, question in enumerate(QUESTIONS)
    ]
    return _lines("healthbench.jsonl", rows)


def _gpqa() -> str:
    """In GPQA's schema."""
    file = FOLDER / "gpqa.csv"
    with file.open("w") as out:
        writer = csv.writer(out)
        writer.writerow(["Question", *CHOICES, "Record ID"])
        writer.writerows([question, "1", "2", "3", "4", i] for i, question in enumerate(QUESTIONS))
    return str(file)


def _bfcl() -> None:
    """Its rows are in a package."""


def options(experiment: dict) -> dict[str, dict]:
    """For train.py and eval.py, in place of the experiment's."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = {
        "rar-medicine": _rubrics,
        "rar-science": _rubrics,
        "rlla": _tools,
        "healthbench": _healthbench,
        "gpqa": _gpqa,
        "bfcl": _bfcl,
    }
    small = {"engine": "hf", "max_tokens": 8}
    train = small | {
        "model": models.tiny(),
        "data": data[experiment["train"]["task"]](),
        "prompts": 4,
        "group": 4,
        "steps": 3,
        "lr": 1e-3,
        "eval_every": 2,
        "eval_prompts": 1,
        "save_every": 1,
    }
    evaluate = small | {"limit": 1}  # of each category
    rows = data[experiment["eval"]["task"]]()
    if rows:
        evaluate = small | {"eval_data": rows, "limit": 4}
    return {"train": train, "eval": evaluate}


@contextlib.contextmanager
def judge() -> Iterator[str]:
    """The URL of a judge whose verdicts follow from a checksum of the question."""

    def answer(body: dict, n: int) -> str:
        prompt = body["messages"][0]["content"]
        checksums = {name: zlib.crc32(f"{name} {prompt}".encode()) for name in names(body)}
        return json.dumps({name: checksum % 3 > 0 for name, checksum in checksums.items()})

    server = Server(answer)
    try:
        yield server.url
    finally:
        server.stop()
