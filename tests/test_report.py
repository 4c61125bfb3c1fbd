"""tools/report.py: what the page says of runs and evaluations, and that texts in it stay texts."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

from infra.ranks import InputError
from tools import report, runs

ATTACK = "document.title = 'a response ran'"
HOSTILE = {
    "script": f"<script>{ATTACK}</script>",
    "end": f"</script><script>{ATTACK}</script>",
    "comment": f"<!-- <script> --!> <script>{ATTACK}</script>",
    "image": f'<img src=x onerror="{ATTACK}">',
    "template": "<!-- DATA --> SCRIPT_HASH ${DATA} $& </body></html>",
    "long": "abcdefghi " * 10_000,
    "arabic": "مرحبا، كيف يمكنني مساعدتك؟",
    "emoji": "👩‍👩‍👧 fine",
    "control": "a\x1b[31mred\x00\u202eb\r\n\tc",
    "surrogate": "half \ud83d of a pair",
    "empty": "",
}
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say <b>x</b>."}]
CHANNELS = {"short": {"full": 1.0}, "polite": {"full": 0.5, "weight": 0.0, "help": "says please"}}


def sample(step: int, text: str, short=1.0, polite=0.5, advantage=0.0, prompt=CHAT) -> dict:
    return {
        "step": step,
        "prompt": prompt,
        "response": text,
        "finish": "stop",
        "rewards": {"short": short, "polite": polite},
        "advantage": advantage,
    }


def metrics(step: int, **others) -> dict:
    channel = {"mean": 0.5, "missing": 0.0, "binding": 0.5, "credit": -0.25}
    return {
        "step": step,
        "joint": 0.25,
        "grad_norm": 1.5,
        "length_mean": 20.0,
        "truncated": 0.0,
        "bad_updates": [],
        "seconds": {"sample": 3.0, "update": 1.0},
        "channels": {"short": channel, "polite": channel},
        **others,
    }


def evaluation(step: int, joint: float | None) -> dict:
    return {"step": step, "eval": {"short": [0.75, 0.125], "joint": [joint, 0.1]}}


def write_run(path, samples=None, lines=None, **options):
    """As train.py leaves a run of two steps, with evaluations before and after it."""
    path.mkdir(parents=True)
    config = {"agg": "rvpo", "beta": "2", "task": "reply", "steps": 2, "prompts": 1, "group": 2}
    config |= {"channels": CHANNELS, "device": "cpu", "world_size": 1, **options}
    (path / "config.json").write_text(json.dumps(config))
    if lines is None:
        lines = [evaluation(0, 0.1), metrics(1), metrics(2), evaluation(2, 0.5)]
    if samples is None:
        samples = [sample(step, text) for step in (1, 2) for text in ("yes", "no")]
    for name, records in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        (path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_evaluation(path, responses: list[dict], scores: dict, **fields):
    """As eval.py leaves an evaluation of one item."""
    path.mkdir(parents=True)
    table = {name: {"mean": value, "stderr": 0.05, "n": 1} for name, value in scores.items()}
    settings = {"model": "runs/a", "seed": 0}
    results = {"task": "rubric", "settings": settings, "metrics": table, "averages": {}}
    (path / "results.json").write_text(json.dumps(results))
    item = {"id": "7", "category": "", "scores": scores, "truncated": 0.0, "responses": responses}
    (path / "samples.jsonl").write_text(json.dumps({**item, **fields}) + "\n")
    return path


class Scripts(HTMLParser):
    """The script elements of a page, as a browser finds them: ({attribute: value}, text)."""

    def __init__(self, page: bytes):
        super().__init__(convert_charrefs=False)
        self.found = []
        self.tags = set()
        self.feed(page.decode())  # which refuses what is no UTF-8

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "script":
            self.found.append((dict(attributes), ""))

    def handle_data(self, text):
        if self.cdata_elem == "script":
            attributes, so_far = self.found[-1]
            self.found[-1] = attributes, so_far + text

    def data(self) -> dict[str, object]:
        named = [(attributes["id"], text) for attributes, text in self.found if "id" in attributes]
        return {name: json.loads(text) for name, text in named}


def data_of(*paths) -> dict[str, object]:
    """What the page of these runs has as data, by the id of the element."""
    return Scripts(report.page([runs.read(path) for path in paths])).data()


def test_a_page_of_two_runs(tmp_path):
    first = write_run(tmp_path / "a", seed=1)
    second = write_run(tmp_path / "b", agg="gdpo", seed=2)
    data = data_of(first, second)
    page = data["data"]
    assert [(run["name"], run["method"], run["short"]) for run in page["runs"]] == [
        ("a", "rvpo 2", "rvpo 2"),
        ("b", "gdpo", "gdpo"),
    ]
    assert [run["color"] for run in page["runs"]] == ["#0072B2", "#D55E00"]  # as in the figures
    assert page["runs"][0]["channels"]["polite"] == {
        "full": 0.5,
        "weight": 0.0,
        "help": "says please",
    }
    facts = {name: cells for name, *cells in page["facts"]}
    assert facts["steps"] == ["2 of 2"] * 2 and facts["machine"] == ["cpu"] * 2
    assert facts["time"] == ["8 s, 4.0 s a step: sample 75%, update 25%"] * 2
    assert facts["seed"] == ["1", "2"] and "seed" not in dict(page["options"])
    assert page["results"]["head"][1:] == [
        "a: first, 0 steps",
        "a: best and final, 2 steps",
        "b: first, 0 steps",
        "b: best and final, 2 steps",
    ]
    assert page["results"]["rows"][1] == ["joint", *["0.100 ± 0.100", "0.500 ± 0.100"] * 2]
    assert [batch["label"] for batch in page["batches"]] == ["step 1", "step 2"]
    assert page["notes"] == []
    assert data.keys() == {"data", *(f"samples-{r}-{b}" for r in (0, 1) for b in (0, 1))}
    (group,) = data["samples-1-0"]
    assert group["prompt"] == CHAT and group["names"] == ["short", "polite"]
    assert [response["text"] for response in group["responses"]] == ["yes", "no"]
    assert group["responses"][0]["values"] == [1.0, 0.5]


def test_the_curves_of_a_page(tmp_path):
    page = data_of(write_run(tmp_path / "a"))["data"]
    titles = [row["title"] for row in page["panels"]]
    assert titles == ["Of each step", "short", "polite"]
    assert page["panels"][2]["help"] == "says please; satisfied from 0.5"
    joint, *_ = page["panels"][0]["panels"]
    assert joint["lines"] == [{"run": 0, "points": [[1, 0.25], [2, 0.25]]}]
    assert joint["dots"] == [{"run": 0, "points": [[0, 0.1, 0.1], [2, 0.5, 0.1]]}]
    mean, credit, binding = page["panels"][1]["panels"]  # nothing is missing
    assert mean["dots"] == [{"run": 0, "points": [[0, 0.75, 0.125], [2, 0.75, 0.125]]}]
    assert credit["credit"] and credit["lines"] == [{"run": 0, "points": [[1, -0.25], [2, -0.25]]}]
    assert binding["title"] == "how often it binds" and binding["dots"] == []
    assert page["runs"][0]["best"] == 2


# Texts


def hostile_page(tmp_path) -> bytes:
    prompt = [{"role": HOSTILE["end"], "content": HOSTILE["image"]}]
    samples = [sample(1, text, prompt=prompt) for text in HOSTILE.values()]
    path = write_run(tmp_path / "a", samples, group=len(HOSTILE), model=HOSTILE["end"])
    return report.page([runs.read(path)])


def test_no_text_becomes_a_part_of_the_page(tmp_path):
    scripts = Scripts(hostile_page(tmp_path))
    types = [attributes.get("type") for attributes, _ in scripts.found]
    assert types == ["application/json"] * 2 + [None]  # our own, which is no response's
    assert "img" not in scripts.tags
    groups = scripts.data()["samples-0-0"]
    texts = [response["text"] for group in groups for response in group["responses"]]
    assert texts == list(HOSTILE.values())


def test_a_browser_lets_no_other_script_run(tmp_path):
    page = hostile_page(tmp_path)
    _, script = Scripts(page).found[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'".encode() in page
    assert b"default-src 'none'" in page
    assert (
        ATTACK not in script
        and "innerHTML" not in script
        and "http" not in script.replace("http://www.w3.org/2000/svg", "")
    )


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
def test_in_a_browser(tmp_path):
    page = tmp_path / "page.html"
    page.write_bytes(hostile_page(tmp_path))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", page.as_uri()]
    out = subprocess.run(command, capture_output=True, timeout=300)
    dom = out.stdout.decode()
    assert "<title>a</title>" in dom  # no response has changed it
    shown = dom.partition('<div id="shown">')[2].partition("</main>")[0]
    assert "<img" not in shown and "<script" not in shown
    assert "&lt;img src=x" in shown  # the prompt, a text
    for code in ("001B", "0000", "202E", "000D", "D83D"):
        assert f'<span class="code">U+{code}</span>' in shown
    assert HOSTILE["arabic"] in shown and HOSTILE["emoji"] in shown and "(empty)" in shown
    assert "show all 100,000 characters" in shown and len(shown) < 50_000
    assert shown.count("✓ short 1") == shown.count('class="chip yes unpaid"') == len(HOSTILE)
    assert dom.count("<polyline") == 10


# Cases


def notes_of(path) -> str:
    return " ".join(data_of(path)["data"]["notes"])


def test_a_run_without_evaluations(tmp_path):
    lines = [{"step": 0, "eval": {}}, metrics(1), metrics(2), {"step": 2, "eval": {}}]
    path = write_run(tmp_path / "a", lines=lines)
    assert notes_of(path) == "a has no evaluation: there are no points, and no best policy."
    page = data_of(path)["data"]
    assert page["results"]["rows"] == [] and page["runs"][0]["best"] is None


def test_a_run_that_was_stopped(tmp_path):
    """Also within a line: what is whole is shown."""
    path = write_run(tmp_path / "a", steps=9)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (path / name).open("a") as out:
            out.write('{"step": 3, "prom')
    assert notes_of(path) == "a was stopped, or is still running, after 2 of 9 steps."
    assert len(data_of(path)["data"]["batches"]) == 2


def test_metrics_that_are_not_finite(tmp_path):
    """As null, which is what train.py writes, and as NaN."""
    lines = [evaluation(0, None), metrics(1, grad_norm=math.nan, bad_updates=[0]), metrics(2)]
    samples = [sample(1, "x", short=math.nan, advantage=None)]
    path = write_run(tmp_path / "a", samples, lines)
    data = data_of(path)
    assert "in 1 of its steps a loss or gradient was not finite" in notes_of(path)
    norm = next(
        panel for panel in data["data"]["panels"][0]["panels"] if "gradient" in panel["title"]
    )
    assert norm["lines"][0]["points"] == [[2, 1.5]]
    assert data["samples-0-0"][0]["responses"][0]["values"] == [None, 0.5]


def test_old_logs_lack_fields(tmp_path):
    line = {"step": 1, "joint": 0.5, "channels": {"short": {"mean": 0.5}}}
    old = {"step": 1, "prompt": "Hi", "response": "x", "rewards": {"short": 1.0}}
    path = write_run(tmp_path / "a", [old], [line], steps=1, channels={})
    data = data_of(path)
    assert "1 is taken to satisfy a reward" in notes_of(path)
    (group,) = data["samples-0-0"]
    assert group["prompt"] == [{"role": "user", "content": "Hi"}]
    assert group["responses"][0]["advantage"] is None
    (path / "samples.jsonl").unlink()
    assert data_of(path)["data"]["batches"] == []


def test_a_prompt_that_was_drawn_twice_in_a_step_is_two_groups(tmp_path):
    path = write_run(tmp_path / "a", [sample(1, text) for text in "abcd"])
    first, second = data_of(path)["samples-0-0"]
    assert [response["text"] for response in first["responses"]] == ["a", "b"]
    assert [response["text"] for response in second["responses"]] == ["c", "d"]


def test_long_runs_are_thinned_and_the_page_says_so(tmp_path, monkeypatch):
    samples = [sample(step, "x" * 1000) for step in range(1, 11) for _ in range(2)]
    path = write_run(tmp_path / "a", samples)
    monkeypatch.setattr(report, "LIMIT", 8_000)  # bytes, of 24,000
    labels = [batch["label"] for batch in data_of(path)["data"]["batches"]]
    assert labels == ["step 2", "step 6", "step 10"]
    assert "the samples of 3 of 10 steps, because all would take" in notes_of(path)
    chats = [[{"role": "user", "content": str(p)}] for p in range(5)]
    write_run(tmp_path / "b", [sample(1, "x" * 1000, prompt=chat) for chat in chats])
    monkeypatch.setattr(report, "LIMIT", 3_000)
    assert "b, step 1, the first 2 of 5 prompts are in this page" in notes_of(tmp_path / "b")
    assert len(data_of(tmp_path / "b")["samples-0-0"]) == 2


# Evaluations


def test_verdicts_of_a_judge(tmp_path):
    verdicts = {"1 Says when to see a doctor": 1.0, "2 Recommends rest": None}
    samples = [{**sample(1, "Rest."), "rewards": verdicts}]
    trained = write_run(tmp_path / "a", samples)
    details = [{"response": "Rest.", "rewards": verdicts}]
    evaluated = write_evaluation(tmp_path / "b", details, {"joint": 0.0}, prompt=CHAT)
    data = data_of(trained, evaluated)
    (of_training,), (of_evaluation,) = data["samples-0-0"], data["samples-1-1"]
    for group in (of_training, of_evaluation):
        assert group["criteria"] == ["Says when to see a doctor", "Recommends rest"]
        assert group["responses"][0]["verdicts"] == [1.0, None]
    assert of_evaluation["names"] == ["joint"] and of_evaluation["prompt"] == CHAT
    assert [batch["label"] for batch in data["data"]["batches"]] == ["step 1", "evaluation"]
    assert data["data"]["results"]["head"][-1] == "b"


def test_benchmarks(tmp_path):
    """HealthBench has verdicts without texts; of GPQA no text is shown; old ones lack prompts."""
    health = write_evaluation(
        tmp_path / "h", [{"response": "x", "met": [1.0, 0.0]}], {"overall": 0.5}
    )
    (group,) = data_of(health)["samples-0-0"]
    assert group["criteria"] == ["criterion 1", "criterion 2"] and group["prompt"] == []
    hidden = {"letter": "B", "correct": "A", "base64": "c2VjcmV0"}
    gpqa = write_evaluation(tmp_path / "g", [hidden] * 4, {"accuracy": 0.0})
    (group,) = data_of(gpqa)["samples-0-0"]
    texts = [response["text"] for response in group["responses"]]
    assert texts == ["B (the right answer: A)"] * 4


def test_policies_along_a_run(tmp_path):
    for step, joint in ((0, 0.1), (10, 0.7), (5, 0.3)):
        details = [{"response": f"after {step}", "reference": "Anna"}]
        write_evaluation(tmp_path / f"p/step-{step}", details, {"joint": joint})
    data = data_of(tmp_path / "p")
    labels = [f"evaluation, {step} steps" for step in (0, 5, 10)]
    assert [batch["label"] for batch in data["data"]["batches"]] == labels
    assert data["samples-0-1"][0]["responses"][0]["text"] == "after 5"
    assert data["samples-0-1"][0]["reference"] == "Anna"
    (joint,) = data["data"]["panels"][0]["panels"]
    assert joint["dots"] == [
        {"run": 0, "points": [[0, 0.1, 0.05], [5, 0.3, 0.05], [10, 0.7, 0.05]]}
    ]


# The program


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: shutil.rmtree(path), "no run is there; name the directory of a run"),
        (lambda path: (path / "metrics.jsonl").unlink(), "holds no step and no evaluation yet"),
        (
            lambda path: (path / "config.json").write_text("[]"),
            "config.json cannot be read: ValueE",
        ),
        (lambda path: (path / "metrics.jsonl").write_text("{}\n"), "cannot be read: a line has no"),
        (lambda path: (path / "metrics.jsonl").write_text("{x}\n"), "metrics.jsonl cannot be read"),
        (lambda path: (path / "samples.jsonl").write_text("3\n"), "samples.jsonl cannot be read"),
        (
            lambda path: (path / "samples.jsonl").write_text("{}\n"),
            "cannot be read: KeyError 'step'",
        ),
        (
            lambda path: (path / "samples.jsonl").write_text('{"step": 1}\n'),
            "cannot be read: KeyError 'response'",
        ),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path, spoil, message):
    path = write_run(tmp_path / "a")
    spoil(path)
    with pytest.raises(InputError, match=re.escape(message)):
        report.page([runs.read(path)])


def test_the_command(tmp_path):
    write_run(tmp_path / "runs/a")
    script = [sys.executable, ROOT / "tools/report.py", "runs/a"]
    out = subprocess.run([*script, "--out", "both.html"], cwd=tmp_path, capture_output=True)
    assert out.stdout == b"both.html: 0.0 MB; open it in a browser\n"
    assert (tmp_path / "both.html").read_bytes().startswith(b"<!doctype html>")
    out = subprocess.run([*script, "--out", "no/x.html"], cwd=tmp_path, capture_output=True)
    assert out.returncode == 1 and out.stderr == (
        b"error: no/x.html cannot be written (No such file or directory): "
        b"name another file with --out\n"
    )
