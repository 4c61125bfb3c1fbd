"""The generated prompts, and ToolRL's schema with every way in which a row can be wrong."""

import functools
import hashlib
import io
import json
import math
import random
from unittest import mock

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import rewards
from config import TrainConfig
from infra.ranks import InputError
from tasks import rlla, rows, rubrics, tools

PROMPT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
CALL = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'
ROW = {
    "data_source": "rlla",
    "prompt": PROMPT,
    "reward_model": {"style": "rule", "ground_truth": CALL},
}


def with_truth(text: str) -> dict:
    return {**ROW, "reward_model": {"ground_truth": text}}


def test_train_and_test_prompts_never_meet():
    train = {json.dumps(e.messages) for e in tools.examples(3000, "train")}
    test = {json.dumps(e.messages) for e in tools.examples(3000, "test")}
    assert not train & test
    assert min(len(train), len(test)) > 2990
    first = tools.examples(5, "train")
    assert first == tools.examples(5, "train") != tools.examples(5, "train", seed=1)
    assert tools.prompts(5, 3) == (first, tools.examples(3, "test"))
    _, held_out = tools.prompts(0, None)
    assert len(held_out) == 200


@pytest.mark.parametrize(
    ("split", "digest"), [("train", "1177bc958f2fd479"), ("test", "c8cae6ed85dd128a")]
)
def test_the_prompts_are_those_of_earlier_runs(split, digest):
    text = json.dumps([[e.messages, e.reference] for e in tools.examples(500, split)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_several_hundred_thousand_prompts():
    """The birthday bound: 20,000 draws of 300,000 equally likely prompts repeat some 660 times."""
    rng = random.Random(0)
    drawn = {json.dumps(tools.example(rng).messages) for _ in range(20_000)}
    assert len(drawn) > 19_900


def test_rlla_reads_every_format(tmp_path):
    reply = "<think> t\u2028 </think>\n<response> r </response>"
    made = [ROW, with_truth(reply)]
    (tmp_path / "a.json").write_text(json.dumps(made))
    lines = [json.dumps(row, ensure_ascii=False) for row in made]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    write_parquet(tmp_path / "a.parquet", made)
    of_json, of_jsonl, of_parquet = (
        rows.read(str(tmp_path / name), rlla.from_row)
        for name in ("a.json", "a.jsonl", "a.parquet")
    )
    assert of_json == of_jsonl == of_parquet
    first, _ = of_json
    assert first == rewards.Example(PROMPT, CALL.removeprefix("<think> t </think>\n"))


def write_parquet(path, made: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)


def test_a_thought_about_tags_is_no_tag(tmp_path):
    """As 17 of the 399 rows of the distilled data have it. ToolRL's own parser would take the
    thought for the call."""
    thought = CALL.replace(" t ", " I put the call between <tool_call> tags, and no <response>. ")
    (tmp_path / "a.json").write_text(json.dumps([with_truth(thought)]))
    (example,) = rows.read(str(tmp_path / "a.json"), rlla.from_row)
    assert rlla.task(TrainConfig(task="rlla")).start(example, [CALL])().tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "has no prompt"),
        ([], "is no object"),
        ({**ROW, "prompt": []}, "has no prompt"),
        ({**ROW, "prompt": "text"}, "has no prompt"),
        ({**ROW, "prompt": [{"role": "user"}]}, "has no content in message 0"),
        ({**ROW, "reward_model": None}, "has no reference"),
        (with_truth(" "), "has no reference"),
        (with_truth("<tool_call>\n{\n</tool_call>"), "cannot be parsed"),
        (with_truth("<tool_call>"), "cannot be parsed"),
        (with_truth('<tool_call>\n{"name": "f"}\n</tool_call>'), "parameters"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    (tmp_path / "a.json").write_text(json.dumps([ROW, row]))
    with pytest.raises(InputError, match=f"row 1 .*{message}"):
        rows.read(str(tmp_path / "a.json"), rlla.from_row)


@pytest.mark.parametrize("content", [b"not json", b"[", b"PAR1 truncated", b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"a.parquet(, line 1)? cannot be read"):
        rows.read(str(tmp_path / "a.parquet"), rlla.from_row)
    with pytest.raises(InputError, match="missing.json cannot be read"):
        rows.read(str(tmp_path / "missing.json"), rlla.from_row)


def load(task: str, train_data, test_data, n_train: int | None, n_test: int | None):
    """What a task of files trains on and holds out."""
    from_row = functools.partial(rubrics.from_row, by_title=task == "rubric")
    if task == "rlla":
        from_row = rlla.from_row
    public = {"rlla": rlla.PUBLIC, **rubrics.PUBLIC}.get(task)
    files = {"data": train_data and str(train_data), "eval_data": test_data and str(test_data)}
    return rows.prompts(TrainConfig(task=task, **files), public, from_row)(n_train, n_test)


# Chats

CALLS = [
    {"id": "1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
]
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def of_chat(*more: dict, **columns) -> rewards.Example:
    prompt = [{"role": "user", "content": "u"}, *more]
    row = {"prompt": prompt, "rubric": [{"description": "d"}], **columns}
    return rubrics.from_row(row, "row 0", True)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "assistant", "content": None, "tool_calls": CALLS},
        ),
        (
            {"role": "assistant", "tool_calls": json.dumps(CALLS)},
            {"role": "assistant", "content": None, "tool_calls": CALLS},
        ),
        (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                "name": None,
            },
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
            },
        ),
        (
            {"role": "tool", "content": "14:00", "tool_call_id": "1", "name": "clock"},
            {"role": "tool", "content": "14:00", "tool_call_id": "1", "name": "clock"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "t", "images": []},
            {"role": "assistant", "content": "a", "reasoning_content": "t"},
        ),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "a\nb"},
        ),
    ],
)
def test_a_message_keeps_what_a_chat_template_can_take(given, kept):
    assert of_chat(given).messages == [{"role": "user", "content": "u"}, kept]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "c"}, 'row 0 has no role in message 1: it must be a text, such as "user"'),
        ({"role": "", "content": "c"}, "row 0 has no role in message 1"),
        ({"role": "user", "content": None}, "row 0 has no content in message 1: it must be a text"),
        ({"role": "user", "content": 3}, "row 0 has content in message 1 that is no text: '3'"),
        (
            {"role": "user", "content": [{"type": "image", "image": "x.png"}]},
            "row 0 has content of type 'image' in message 1: a policy reads nothing but text",
        ),
        (
            {"role": "user", "content": "c", "images": ["x.png"]},
            "row 0 has 'images' in message 1, which no chat template is given: "
            "a message may have role, content, tool_calls, name",
        ),
        (
            {"role": "assistant", "tool_calls": "f()"},
            "row 0 has tool_calls in message 1 that are no list of JSON objects: 'f()'",
        ),
        (
            {"role": "tool", "content": "c", "tool_call_id": 1},
            "row 0 has a tool_call_id in message 1 that is no text: '1'",
        ),
    ],
)
def test_what_a_chat_template_cannot_take_is_refused(message, said):
    with pytest.raises(InputError) as error:
        of_chat(message)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_chat_of_the_assistants_alone_asks_nothing():
    row = {"prompt": [{"role": "assistant", "content": "a"}], "rubric": RUBRIC}
    message = "row 0 has no prompt: all of its messages are the assistant's"
    with pytest.raises(InputError, match=message):
        rubrics.from_row(row, "row 0", True)


@pytest.mark.parametrize("made", [[CLOCK], json.dumps([CLOCK])])
def test_tools_are_a_column(made):
    assert of_chat(tools=made).tools == (CLOCK,)
    assert of_chat(tools=None).tools == of_chat().tools == ()
    assert rlla.from_row({**ROW, "tools": made}, "row 0").tools == (CLOCK,)
    message = "row 0 has tools that are no list of JSON objects: 'clock'"
    with pytest.raises(InputError, match=message):
        of_chat(tools="clock")


def test_a_parquet_file_adds_no_keys_to_objects(tmp_path):
    """Its objects have the keys of all rows, None where a row has none."""
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "g", "arguments": {"city": "Oslo"}}}],
    }
    made = [
        {**ROW, "prompt": [*PROMPT, {"role": "assistant", "content": "", "tool_calls": CALLS}]},
        {**ROW, "prompt": [*PROMPT, call]},
        ROW,
    ]
    write_parquet(tmp_path / "a.parquet", made)
    examples = rows.read(str(tmp_path / "a.parquet"), rlla.from_row)
    assert [e.messages for e in examples] == [row["prompt"] for row in made]


def test_a_null_prompt_leaves_the_question():
    row = {"prompt": None, "question": "q", "rubric": RUBRIC}
    assert rubrics.from_row(row, "row 0", True).messages == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("https://h/a.csv?download=true", b"a,b\n1,2\n"),
        ("https://h/download?id=3", b"a,b\r\n1,2\r\n"),
        ("https://h/rows?x=a.csv", b'{"a": "1", "b": "2"}\n'),
        ("https://h/A.CSV", b"a,b\n1,2\n"),
        ("https://h/a.jsonl?raw=1", b'{"a": "1", "b": "2"}'),
    ],
)
def test_a_download_is_known_by_its_name_or_its_content(monkeypatch, url, content):
    serve(monkeypatch, content)
    assert rows.read_rows(url) == [{"a": "1", "b": "2"}]


def test_what_was_downloaded_and_cannot_be_parsed(monkeypatch):
    serve(monkeypatch, b"<html>Log in</html>")
    formats = r"parquet, JSON \(a list\), JSONL or CSV"
    message = rf"https://h/a\?x=1, line 1 cannot be read as {formats}: Expecting value"
    with pytest.raises(InputError, match=message):
        rows.read_rows("https://h/a?x=1")


def serve(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(rows.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content))


def test_held_out_rows(tmp_path):
    path = tmp_path / "a.json"
    made = [{**ROW, "prompt": [{"role": "user", "content": str(i)}]} for i in range(10)]
    path.write_text(json.dumps(made))
    train, held_out = load("rlla", path, None, 1, 3)
    assert [e.messages[0]["content"] for e in train] == list("0123456") and len(held_out) == 3
    train, held_out = load("rlla", path, path, None, 4)
    assert len(train) == 10 and len(held_out) == 4
    assert [len(part) for part in load("rlla", None, path, 0, None)] == [0, 10]  # an evaluation
    (tmp_path / "none.json").write_text("[]")
    for n_test in (10, 12):
        with pytest.raises(InputError, match="no rows are left"):
            load("rlla", path, None, 1, n_test)
    with pytest.raises(InputError, match="none.json has no rows to evaluate on"):
        load("rlla", path, tmp_path / "none.json", 1, 3)


# Rubrics

RUBRIC = [
    {"title": "A", "description": "Essential Criteria: says a", "weight": 5},
    {"title": "B", "description": "important criteria: b", "weight": 4},
    {"title": "C", "description": "c", "weight": 1},
    {"title": "D", "description": "Pitfall Criteria: Fails to d", "weight": -2},
    {"title": "E", "description": "e", "weight": -1},
    {"title": "F", "description": "f"},
]


def rubric(tmp_path, task="rar-medicine", lines=None):
    """The examples of a file of these lines, or of one row with RUBRIC."""
    made = lines or [{"question": "q", "rubric": RUBRIC}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, made)))
    _, examples = load(task, None, tmp_path / "r.jsonl", 0, None)
    return examples


@pytest.fixture
def judged(monkeypatch):
    """A task of rubrics whose judge finds everything met, and remembers what it was asked."""

    class Yes:
        def check(self):
            pass

        def start(self, messages, responses, items):
            self.items = items
            verdicts = [math.nan if "f" in item.split() else 1.0 for item in items]
            return lambda: np.array([verdicts] * len(responses))

    monkeypatch.setattr(rubrics, "Judge", lambda options, explain: Yes())
    return rubrics.task(TrainConfig(task="rar-medicine", judge_url="http://h/v1", judge_model="m"))


def test_rubric_categories_weights_and_pitfalls(tmp_path, judged):
    (example,) = rubric(tmp_path)
    assert example.messages == [{"role": "user", "content": "q"}] and example.reference == ""
    assert [(c.text, c.category) for c in example.criteria] == [
        ("says a", "essential"),
        ("b", "important"),
        ("c", "optional"),
        ("Fails to d", "pitfall"),
        ("e", "pitfall"),
        ("f", "essential"),
    ]
    assert [channel.name for channel in judged.channels(example)] == [
        "essential",
        "important",
        "optional",
        "pitfall",
        "pitfall",
        "essential",
    ]
    for name, weights in [
        (None, [1] * 6),
        ("category", [1.0, 0.7, 0.3, 0.9, 0.9, 1.0]),
        ("row", [5, 4, 1, 2, 1, 1]),
    ]:
        if name:
            judged.weigh(name)
        assert [channel.weight for channel in judged.channels(example)] == weights
    with pytest.raises(InputError, match="--weights pitfall=2: .*one of uniform, category, row"):
        judged.weigh("pitfall=2")


def test_pitfalls_are_asked_about_and_inverted(tmp_path, judged):
    (example,) = rubric(tmp_path)
    rewards = judged.start(example, ["r1", "r2"])()
    np.testing.assert_array_equal(rewards, [[1, 1, 1, 0, 0, math.nan]] * 2)
    pitfall = rubrics.PITFALL
    assert judged.judge.items == ["says a", "b", "c", f"{pitfall}Fails to d", f"{pitfall}e", "f"]
    scores, more = judged.result(example, "r1", rewards[0])
    assert scores == {"joint": 0, "essential": 1, "important": 1, "optional": 1, "pitfall": 0}
    assert more["response"] == "r1" and more["rewards"]["4 Fails to d"] == 0
    assert math.isnan(more["rewards"]["6 f"])
    scores, _ = judged.result(example, "r1", np.full(6, math.nan))
    assert all(math.isnan(score) for score in scores.values())


def test_a_rubric_of_ones_own(tmp_path):
    lines = [
        {"prompt": PROMPT, "rubric": [{"description": "d", "title": "T"}, {"description": "d2"}]},
        {"prompt": "text", "rubric": [{"description": "x"}]},
    ]
    first, second = rubric(tmp_path, "rubric", lines)
    assert first.messages == PROMPT and [c.label for c in first.criteria] == ["T", "essential"]
    assert second.messages == [{"role": "user", "content": "text"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rubric": RUBRIC}, "has no prompt"),
        ({"question": "q"}, "has no rubric"),
        ({"question": "q", "rubric": []}, "has no rubric"),
        ({"question": "q", "rubric": ["text"]}, "without a text"),
        ({"question": "q", "rubric": [{"description": " "}]}, "without a text"),
        ({"question": "q", "rubric": [{"description": "d", "weight": 0}]}, "weight '0'"),
        ({"question": "q", "rubric": [{"description": "d", "weight": "5"}]}, "weight '5'"),
        ({"question": "q", "rubric": [{"description": "d", "weight": 1e300}]}, "up to 1e6"),
        ({"question": "q", "rubric": [{"description": "d", "weight": True}]}, "weight 'True'"),
        ({"question": "q", "rubric": [{"description": "Essential Criteria: "}]}, "without a text"),
        ([], "is no object"),
        ("text", "is no object"),
    ],
)
def test_a_bad_rubric_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=f"row 1 .*{message}"):
        rubric(tmp_path, lines=[{"question": "q", "rubric": RUBRIC}, row])


@pytest.mark.parametrize("title", ["", " ", "a\nb", "\ud800", 5, "joint"])
def test_a_bad_title_is_named(tmp_path, title):
    row = {"question": "q", "rubric": [{"description": "d", "title": title}]}
    with pytest.raises(InputError, match="has an item with title"):
        rubric(tmp_path, "rubric", [row])


def test_public_rubrics_come_from_the_hubs_parquet_files(tmp_path, monkeypatch):
    """As the hub lays them out on refs/convert/parquet; the hub itself is out of a test's reach."""
    for split, n in (("train", 3), ("test", 2)):
        (tmp_path / "default" / split).mkdir(parents=True)
        made = [
            {"question": f"{split} {i}", "rubric": RUBRIC[:2], "rubric_count": 2} for i in range(n)
        ]
        write_parquet(tmp_path / "default" / split / "0000.parquet", made)
    download = mock.Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    train, held_out = load("rar-science", None, None, 1, 5)
    questions = [e.messages[0]["content"] for e in train + held_out]
    assert questions == ["train 0", "train 1", "train 2", "test 0", "test 1"]
    first, *_ = download.call_args_list
    assert first.args == ("anisha2102/RaR-Science",) and first.kwargs["repo_type"] == "dataset"
    dev = "hf://anisha2102/RaR-Medicine/dev"
    message = f"{dev} could not be downloaded .*no split 'dev'.*--data"
    with pytest.raises(InputError, match=message):
        load("rar-medicine", dev, None, 1, 5)
    for n_train in (0, 1):
        with pytest.raises(InputError, match="--task rubric needs --data"):
            load("rubric", None, None, n_train, 5)


def test_the_digest_of_examples_without_tools_is_that_of_earlier_runs():
    """Else no older run could be resumed, and no older evaluation compared. Tools count."""
    example = rewards.Example([{"role": "user", "content": "q"}], "r")
    before = hashlib.sha256(b'[[[{"role": "user", "content": "q"}], "r", [], "", ""]]').hexdigest()
    assert rewards.digest([example]) == before
    assert rewards.digest([example._replace(tools=({"name": "f"},))]) != before
