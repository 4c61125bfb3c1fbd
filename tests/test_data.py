"""The generated prompts, and ToolRL's schema with every way in which a row can be wrong."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

import data
import rewards
from rewards import InputError

PROMPT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
CALL = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'
ROW = {"data_source": "rlla", "prompt": PROMPT, "reward_model": {"style": "rule", "ground_truth": CALL}}


def test_train_and_test_prompts_never_meet():
    texts = {split: {json.dumps(e.messages) for e in data.tools(3000, split)} for split in ("train", "test")}
    assert not texts["train"] & texts["test"]
    assert min(map(len, texts.values())) > 2990
    assert data.tools(5, "train") == data.tools(5, "train") != data.tools(5, "train", seed=1)


def test_several_hundred_thousand_prompts():
    """The birthday bound: 20,000 draws from 300,000 equally likely prompts would repeat some 660 times."""
    rng = random.Random(0)
    drawn = {json.dumps(data.tools_example(rng).messages) for _ in range(20_000)}
    assert len(drawn) > 19_900


def test_rlla_reads_every_format(tmp_path):
    rows = [ROW, {**ROW, "reward_model": {"ground_truth": "<think> t\u2028 </think>\n<response> r </response>"}}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    parsed = [data.rlla(str(tmp_path / name)) for name in ("a.json", "a.jsonl", "a.parquet")]
    assert parsed[0] == parsed[1] == parsed[2]
    assert parsed[0][0] == data.Example(PROMPT, CALL.removeprefix("<think> t </think>\n")) and len(parsed[0]) == 2


def test_a_thought_about_tags_is_no_tag(tmp_path):
    """As 17 of the 399 rows of the distilled data have it; ToolRL's own parser would take the thought for the call."""
    thought = CALL.replace(" t ", " I put the call between <tool_call> tags, and no <response>. ")
    (tmp_path / "a.json").write_text(json.dumps([{**ROW, "reward_model": {"ground_truth": thought}}]))
    reference = data.rlla(str(tmp_path / "a.json"))[0].reference
    assert rewards.score("rlla", [""], [CALL], [reference]).tolist() == [[1, 3]]


@pytest.mark.parametrize(("row", "message"), [
    ({}, "has no prompt"), ([], "has no prompt"), ({**ROW, "prompt": []}, "has no prompt"),
    ({**ROW, "prompt": "text"}, "has no prompt"), ({**ROW, "prompt": [{"role": "user"}]}, "has no prompt"),
    ({**ROW, "reward_model": None}, "has no reference"), ({**ROW, "reward_model": {"ground_truth": " "}}, "has no reference"),
    ({**ROW, "reward_model": {"ground_truth": "<tool_call>\n{\n</tool_call>"}}, "cannot be parsed"),
    ({**ROW, "reward_model": {"ground_truth": "<tool_call>"}}, "cannot be parsed"),
    ({**ROW, "reward_model": {"ground_truth": '<tool_call>\n{"name": "f"}\n</tool_call>'}}, "parameters"),
])
def test_a_bad_row_is_named(tmp_path, row, message):
    (tmp_path / "a.json").write_text(json.dumps([ROW, row]))
    with pytest.raises(InputError, match=f"row 1 .*{message}"):
        data.rlla(str(tmp_path / "a.json"))


@pytest.mark.parametrize("content", [b"not json", b"[", b"PAR1 truncated", b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"a.parquet(, line 1)? cannot be read"):
        data.rlla(str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match="missing.json cannot be read"):
        data.rlla(str(tmp_path / "missing.json"))


def test_held_out_rows(tmp_path):
    rows = [{**ROW, "prompt": [{"role": "user", "content": str(i)}]} for i in range(10)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    train, held_out = data.load("rlla", str(tmp_path / "a.json"), None, 0, 3)
    assert [e.messages[0]["content"] for e in train] == list("0123456") and len(held_out) == 3
    train, held_out = data.load("rlla", str(tmp_path / "a.json"), str(tmp_path / "a.json"), 0, 4)
    assert len(train) == 10 and len(held_out) == 4
    for n_eval in (10, 12):
        with pytest.raises(InputError, match="no rows are left"):
            data.load("rlla", str(tmp_path / "a.json"), None, 0, n_eval)
    with pytest.raises(InputError, match="makes its own prompts"):
        data.load("tools", str(tmp_path / "a.json"), None, 0, 10)
