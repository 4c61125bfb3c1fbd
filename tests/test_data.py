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
    parsed = [data.read("rlla", str(tmp_path / name)) for name in ("a.json", "a.jsonl", "a.parquet")]
    assert parsed[0] == parsed[1] == parsed[2]
    assert parsed[0][0] == data.Example(PROMPT, CALL.removeprefix("<think> t </think>\n")) and len(parsed[0]) == 2


def test_a_thought_about_tags_is_no_tag(tmp_path):
    """As 17 of the 399 rows of the distilled data have it; ToolRL's own parser would take the thought for the call."""
    thought = CALL.replace(" t ", " I put the call between <tool_call> tags, and no <response>. ")
    (tmp_path / "a.json").write_text(json.dumps([{**ROW, "reward_model": {"ground_truth": thought}}]))
    reference = data.read("rlla", str(tmp_path / "a.json"))[0].reference
    assert rewards.score("rlla", [""], [CALL], [reference]).tolist() == [[1, 3]]


@pytest.mark.parametrize(("row", "message"), [
    ({}, "has no prompt"), ([], "is no object"), ({**ROW, "prompt": []}, "has no prompt"),
    ({**ROW, "prompt": "text"}, "has no prompt"), ({**ROW, "prompt": [{"role": "user"}]}, "has no prompt"),
    ({**ROW, "reward_model": None}, "has no reference"), ({**ROW, "reward_model": {"ground_truth": " "}}, "has no reference"),
    ({**ROW, "reward_model": {"ground_truth": "<tool_call>\n{\n</tool_call>"}}, "cannot be parsed"),
    ({**ROW, "reward_model": {"ground_truth": "<tool_call>"}}, "cannot be parsed"),
    ({**ROW, "reward_model": {"ground_truth": '<tool_call>\n{"name": "f"}\n</tool_call>'}}, "parameters"),
])
def test_a_bad_row_is_named(tmp_path, row, message):
    (tmp_path / "a.json").write_text(json.dumps([ROW, row]))
    with pytest.raises(InputError, match=f"row 1 .*{message}"):
        data.read("rlla", str(tmp_path / "a.json"))


@pytest.mark.parametrize("content", [b"not json", b"[", b"PAR1 truncated", b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"a.parquet(, line 1)? cannot be read"):
        data.read("rlla", str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match="missing.json cannot be read"):
        data.read("rlla", str(tmp_path / "missing.json"))


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


# Rubrics

RUBRIC = [{"title": "A", "description": "Essential Criteria: says a", "weight": 5}, {"title": "B", "description": "important criteria: b", "weight": 4},
          {"title": "C", "description": "c", "weight": 1}, {"title": "D", "description": "Pitfall Criteria: Fails to d", "weight": -2},
          {"title": "E", "description": "e", "weight": -1}, {"title": "F", "description": "f"}]


def rubric(tmp_path, task="rar-medicine", rows=None, **options):
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows or [{"question": "q", "rubric": RUBRIC}])))
    return data.read(task, str(tmp_path / "r.jsonl"), **options)


def test_rubric_categories_weights_and_pitfalls(tmp_path):
    (example,) = rubric(tmp_path)
    assert example.messages == [{"role": "user", "content": "q"}] and example.reference == ""
    assert [(c.text, c.label, c.weight, c.pitfall) for c in example.criteria] == [
        ("says a", "essential", 1, False), ("b", "important", 1, False), ("c", "optional", 1, False),
        ("Fails to d", "pitfall", 1, True), ("e", "pitfall", 1, True), ("f", "essential", 1, False)]
    (example,) = rubric(tmp_path, weights="category")
    assert [c.weight for c in example.criteria] == [1.0, 0.7, 0.3, 0.9, 0.9, 1.0]
    (example,) = rubric(tmp_path, weights="row", pitfalls="literal")
    assert [c.weight for c in example.criteria] == [5, 4, 1, 2, 1, 1] and not any(c.pitfall for c in example.criteria)
    (example,) = rubric(tmp_path, pitfalls="drop")
    assert [c.text for c in example.criteria] == ["says a", "b", "c", "f"]


def test_a_rubric_of_ones_own(tmp_path):
    rows = [{"prompt": PROMPT, "rubric": [{"description": "d", "title": "T"}, {"description": "d2"}]}, {"prompt": "text", "rubric": [{"description": "x"}]}]
    first, second = rubric(tmp_path, "rubric", rows)
    assert first.messages == PROMPT and [c.label for c in first.criteria] == ["T", "essential"]
    assert second.messages == [{"role": "user", "content": "text"}]


@pytest.mark.parametrize(("row", "message"), [
    ({"rubric": RUBRIC}, "has no prompt"), ({"question": "q"}, "has no rubric"), ({"question": "q", "rubric": []}, "has no rubric"),
    ({"question": "q", "rubric": ["text"]}, "without a text"), ({"question": "q", "rubric": [{"description": " "}]}, "without a text"),
    ({"question": "q", "rubric": [{"description": "d", "weight": 0}]}, "weight '0'"), ({"question": "q", "rubric": [{"description": "d", "weight": "5"}]}, "weight '5'"),
    ({"question": "q", "rubric": [{"description": "d", "weight": 1e300}]}, "up to 1e6"), ({"question": "q", "rubric": [{"description": "d", "weight": True}]}, "weight 'True'"),
    ({"question": "q", "rubric": [{"description": "Essential Criteria: "}]}, "without a text"), ([], "is no object"), ("text", "is no object"),
])
def test_a_bad_rubric_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=f"row 1 .*{message}"):
        rubric(tmp_path, rows=[{"question": "q", "rubric": RUBRIC}, row])


@pytest.mark.parametrize("title", ["", " ", "a\nb", "\ud800", 5, "joint"])
def test_a_bad_title_is_named(tmp_path, title):
    with pytest.raises(InputError, match="has an item with title"):
        rubric(tmp_path, "rubric", [{"question": "q", "rubric": [{"description": "d", "title": title}]}])


def test_only_pitfalls(tmp_path):
    with pytest.raises(InputError, match="nothing but pitfalls"):
        rubric(tmp_path, rows=[{"question": "q", "rubric": [{"description": "d", "weight": -1}]}], pitfalls="drop")


def test_public_rubrics_come_from_the_hubs_parquet_files(tmp_path, monkeypatch):
    """As the hub lays them out on refs/convert/parquet; the hub itself is out of a test's reach."""
    import huggingface_hub

    for split, n in (("train", 3), ("test", 2)):
        (tmp_path / "default" / split).mkdir(parents=True)
        rows = [{"question": f"{split} {i}", "rubric": RUBRIC[:2], "rubric_count": 2} for i in range(n)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "default" / split / "0000.parquet")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: asked.append((args, options)) or str(tmp_path))
    train, held_out = data.load("rar-science", None, None, 0, 5)
    assert [e.messages[0]["content"] for e in train + held_out] == ["train 0", "train 1", "train 2", "test 0", "test 1"]
    assert asked[0][0] == ("anisha2102/RaR-Science",) and asked[0][1]["repo_type"] == "dataset"
    with pytest.raises(InputError, match="hf://anisha2102/RaR-Medicine/dev could not be downloaded .*no split 'dev'.*--data"):
        data.read("rar-medicine", "hf://anisha2102/RaR-Medicine/dev")
    with pytest.raises(InputError, match="--task rubric needs --data"):
        data.load("rubric", None, None, 0, 5)
