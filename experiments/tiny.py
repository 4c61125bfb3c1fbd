"""What run.py --tiny puts in place of data, model and judge: a few rows, a million random parameters, any verdict."""

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
    return _lines(
        "tools.jsonl",
        [
            {"prompt": example.messages, "reward_model": {"ground_truth": example.reference}}
            for example in tools.examples(8, "train")
        ],
    )


def _healthbench() -> str:
    axes = (
        "accuracy",
        "completeness",
        "context_awareness",
        "communication_quality",
        "instruction_following",
    )
    rubrics = [
        {"criterion": f"Has {axis}.", "points": points, "tags": [f"axis:{axis}"]}
        for axis, points in zip(axes, (5, 4, 3, 2, 1), strict=True)
    ]
    rubrics.append(
        {"criterion": "Frightens the user.", "points": -3, "tags": ["axis:communication_quality"]}
    )
    return _lines(
        "healthbench.jsonl",
        [
            {
                "prompt_id": str(i),
                "prompt": [{"role": "user", "content": question}],
                "rubrics": rubrics,
                "example_tags": ["theme:tiny"],
            }
            for i, question in enumerate(QUESTIONS)
        ],
    )


def _gpqa() -> str:
    file = FOLDER / "gpqa.csv"
    with file.open("w") as out:
        writer = csv.writer(out)
        writer.writerow(
            [
                "Question",
                "Correct Answer",
                *(f"Incorrect Answer {k}" for k in (1, 2, 3)),
                "Record ID",
            ]
        )
        writer.writerows([question, "1", "2", "3", "4", i] for i, question in enumerate(QUESTIONS))
    return str(file)


def options(experiment: dict) -> dict[str, dict]:
    """For train.py and eval.py, in place of the experiment's."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = {
        "rar-medicine": _rubrics,
        "rar-science": _rubrics,
        "rlla": _tools,
        "healthbench": _healthbench,
        "gpqa": _gpqa,
        "bfcl": lambda: None,
    }
    train, evaluate = (data[experiment[part]["task"]]() for part in ("train", "eval"))
    small = {"engine": "hf", "max_tokens": 8}
    return {
        "train": small
        | {
            "model": models.tiny(),
            "data": train,
            "prompts": 4,
            "group": 4,
            "steps": 3,
            "lr": 1e-3,
            "eval_every": 2,
            "eval_prompts": 1,
            "save_every": 1,
        },
        "eval": small
        | ({"eval_data": evaluate} if evaluate else {})
        | {"limit": 4 if evaluate else 1},
    }


@contextlib.contextmanager
def judge() -> Iterator[str]:
    """The URL of a judge whose verdicts follow from a checksum of the question."""

    def answer(body: dict, n: int) -> str:
        prompt = body["messages"][0]["content"]
        return json.dumps(
            {name: zlib.crc32(f"{name} {prompt}".encode()) % 3 > 0 for name in names(body)}
        )

    server = Server(answer)
    try:
        yield server.url
    finally:
        server.stop()
