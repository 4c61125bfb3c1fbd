"""Prompts with what their responses are scored by, from a task's name.

`tools` is built in and generated: real text, no download. `rlla` is ToolRL's data set in its public schema. Both ask
for ToolRL's output format: <think>..</think>, then a <tool_call> block of JSON lines. `rar-medicine`, `rar-science`
(Rubrics as Rewards, arXiv 2507.17746) and `rubric` (a file of your own) have criteria for a judge instead.
"""

import csv
import hashlib
import http.client
import io
import json
import math
import random
import re
import urllib.request
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from rewards import InputError, tool_calls


class Criterion(NamedTuple):
    text: str  # the item that the judge decides
    label: str  # criteria with the same label are one line in the logs
    weight: float = 1.0  # in the soft-min
    pitfall: bool = False  # the item is a mistake: meeting it is bad


class Example(NamedTuple):
    """messages: the chat so far, [{role, content}]. reference: what rule-based rewards compare a response with.
    criteria: what a judge decides, each a reward channel of this prompt's group."""

    messages: list[dict[str, str]]
    reference: str = ""
    criteria: tuple[Criterion, ...] = ()


def encode(tokenizer, examples: list[Example], limit: int) -> list[tuple[list[int], Example]]:
    """(token ids, example) of each prompt. Raises InputError for one of more than `limit` tokens."""
    encoded = []
    for i, example in enumerate(examples):
        prompt = f"prompt {i} ('...{example.messages[-1]['content'][-40:]!a}')"
        try:
            ids = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{prompt} does not go through the model's chat template: {error}") from error
        if not 0 < len(ids) <= limit:
            raise InputError(f"{prompt} has {len(ids)} tokens, and beside --max-tokens the model's context has room "
                             f"for {limit}: leave it out of the data, or lower --max-tokens")
        encoded.append((ids, example))
    return encoded


def digest(*examples: Example) -> str:
    """SHA-256 of all that is in them."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


def prompt_at(position: int, n: int, seed: int) -> int:
    """Index of the prompt at a position of the endless stream of shuffled epochs of n prompts."""
    epoch, i = divmod(position, n)
    return int(np.random.default_rng([seed, epoch]).permutation(n)[i])


VALUES = {
    "city": "Paris Oslo Cairo Lima Tokyo Delhi Rome Berlin Madrid Dublin Vienna Prague Sydney Toronto Boston".split(),
    "name": "Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul".split(),
    "food": "pizza sushi pasta tacos curry salad soup noodles burgers steak".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "song": ["Yesterday", "Imagine", "Thriller", "Hello", "Hey Jude", "Let It Be", "Purple Rain", "Africa"],
    "word": "hello house water friend winter garden bread music light river".split(),
    "language": "French Spanish German Italian Dutch Polish Greek Swedish".split(),
    "days": list(range(2, 15)),
    "minutes": list(range(5, 60)),
    "people": list(range(2, 13)),
    "amount": list(range(10, 500)),
}
# name: (description, request)
TOOLS = {
    "get_weather": ("weather forecast", "What is the weather in {city} for the next {days} days?"),
    "book_table": ("book a restaurant table", "Book a table for {people} people on {day}."),
    "find_hotel": ("search hotels", "Find a hotel in {city} for {people} people."),
    "order_food": ("order food", "Order {food} for {people} people."),
    "set_timer": ("start a timer", "Set a timer for {minutes} minutes."),
    "play_song": ("play music", "Play the song {song}."),
    "translate": ("translate a word", "Translate the word {word} to {language}."),
    "send_money": ("transfer money", "Send {amount} dollars to {name}."),
    "call_contact": ("phone someone", "Call {name} in {minutes} minutes."),
    "find_flight": ("search flights", "Find a flight to {city} on {day}."),
}
ANSWER = '<think> I will use {name}. </think>\n<tool_call>\n{call}\n</tool_call>'
SYSTEM = "Answer every request with one tool call. Tools:\n"


def _request(rng: random.Random, tool: str) -> tuple[str, str]:
    """A user's request for the tool, and the answer to it."""
    template = TOOLS[tool][1]
    parameters = {key: rng.choice(values) for key, values in VALUES.items() if "{" + key + "}" in template}
    call = json.dumps({"name": tool, "parameters": parameters})
    return template.format(**parameters), ANSWER.format(name=tool, call=call)


def tools_example(rng: random.Random) -> Example:
    """Three tools in the system prompt, two worked requests, one to answer. Without the worked ones a 135M model never
    hits the format, and rewards that never vary teach nothing."""
    names = rng.sample(sorted(TOOLS), 3)
    lines = []
    for name in names:
        description, template = TOOLS[name]
        lines.append(f"{name}({', '.join(key for key in VALUES if '{' + key + '}' in template)}): {description}")
    messages = [{"role": "system", "content": SYSTEM + "\n".join(lines)}]
    for name in rng.sample(names, 2):
        request, answer = _request(rng, name)
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    request, answer = _request(rng, rng.choice(names))
    return Example([*messages, {"role": "user", "content": request}], answer)


def tools(n: int, split: str, seed: int = 0) -> list[Example]:
    """n examples of 'train' or 'test'. A prompt's own hash decides its split, so that the two never meet."""
    rng, out = random.Random(f"{split}/{seed}"), []
    while len(out) < n:
        example = tools_example(rng)
        digest = hashlib.sha256(json.dumps(example.messages).encode()).digest()
        if (digest[0] < 26) == (split == "test"):  # a tenth is test
            out.append(example)
    return out


# Where public data are: {split} is train or test. ToolRL has 3,920 + 80 rows, RaR-Medicine 17,926 + 2,242, RaR-Science
# 18,333 + 2,292.
PUBLIC = {
    "rlla": "https://raw.githubusercontent.com/qiancheng0/ToolRL/main/dataset/rlla_4k/{split}.parquet",
    "rar-medicine": "hf://anisha2102/RaR-Medicine/{split}",
    "rar-science": "hf://anisha2102/RaR-Science/{split}",
}


def _hub_split(path: str) -> list[str]:
    """hf://OWNER/NAME/SPLIT -> parquet files, from the branch into which the hub converts every data set."""
    from huggingface_hub import snapshot_download

    owner, name, split = path.removeprefix("hf://").split("/")
    pattern = f"*/{split}/*.parquet"
    folder = Path(snapshot_download(f"{owner}/{name}", repo_type="dataset", revision="refs/convert/parquet",
                                    allow_patterns=pattern))
    files = sorted(map(str, folder.glob(pattern)))
    if not files:
        raise OSError(f"the data set has no split '{split}'")
    return files


def read_rows(path: str) -> list[dict]:
    """The rows of a .parquet, .jsonl, .json (a list of objects) or .csv file. An URL, or a data set of the hub
    (hf://OWNER/NAME/SPLIT), is downloaded. Raises InputError."""
    import httpx
    import pyarrow.parquet

    where = path
    try:
        if path.startswith("hf://"):
            return pyarrow.parquet.read_table(_hub_split(path)).to_pylist()
        if path.startswith(("http://", "https://")):
            with urllib.request.urlopen(path, timeout=60) as reply:
                content = reply.read()
        else:
            content = Path(path).read_bytes()
        if content[:4] == b"PAR1":
            return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        text, rows = content.decode("utf-8-sig"), []
        if path.lower().endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(text), strict=True))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for number, line in enumerate(text.split("\n"), start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    rows.append(json.loads(line))
    except (OSError, ValueError, RecursionError, csv.Error, http.client.HTTPException, httpx.HTTPError,
            pyarrow.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "://" in where:
            raise InputError(f"{where} could not be downloaded ({reason}): name a local copy with --data") from error
        raise InputError(f"{where} cannot be read as parquet, JSON (a list), JSONL or CSV: {reason}") from error
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {i} is no object")
    return rows


def chat(messages: object, where: str) -> list[dict[str, str]]:
    """A row's chat, checked. where: for the message of the InputError."""
    chat = messages if isinstance(messages, list) and all(isinstance(message, dict) for message in messages) else []
    if not chat or not all(isinstance(m.get(key), str) for m in chat for key in ("role", "content")):
        raise InputError(f'{where} has no prompt: it must be a list of {{"role": ..., "content": ...}}')
    return [{"role": m["role"], "content": m["content"]} for m in chat]


def _rlla_example(row: dict, where: str) -> Example:
    """One row in ToolRL's schema: prompt [{role, content}], reward_model {ground_truth}."""
    messages, reward_model = chat(row.get("prompt"), where), row.get("reward_model")
    reference = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if not isinstance(reference, str) or not reference.strip():
        raise InputError(f'{where} has no reference answer: reward_model must have a text "ground_truth"')
    # Only the answer counts: in the distilled variant of the data one thought in twenty talks about <tool_call> tags.
    reference = reference.rpartition("</think>")[2].strip()
    if "<tool_call>" in reference:
        try:
            calls = tool_calls(reference)
        except ValueError as error:
            raise InputError(f"{where} has a reference answer that cannot be parsed: {error}") from error
        if not all(isinstance(call.get("parameters"), dict) for call in calls):
            raise InputError(f'{where} has a reference call without an object "parameters"')
    return Example(messages, reference)


# RaR's categories: the weights of its explicit aggregation, and the smallest row weight, for rows that lack the prefix.
CATEGORIES = {"essential": (1.0, 5), "important": (0.7, 3), "optional": (0.3, 0), "pitfall": (0.9, -math.inf)}
WEIGHTS, PITFALLS = ("uniform", "category", "row"), ("invert", "literal", "drop")


def _criterion(item: object, where: str, by_title: bool, weights: str, pitfalls: str) -> Criterion | None:
    """One item of a rubric: {description, weight?, title?}. None for a pitfall that is to be dropped."""
    text, weight = (item.get("description"), item.get("weight")) if isinstance(item, dict) else (None, None)
    prefix = re.match(r"\s*(essential|important|optional|pitfall) criteria:\s*", str(text), re.IGNORECASE)
    if not isinstance(text, str) or not text[prefix.end() if prefix else 0:].strip():
        raise InputError(f'{where} has an item of its rubric without a text "description"')
    if weight is not None and not (type(weight) in (int, float) and 1e-6 <= abs(weight) <= 1e6):
        raise InputError(f"{where} has an item with weight {str(weight)[:40]!r}: it must be a number up to 1e6, other "
                         "than 0, negative for a pitfall")
    by_weight = next(name for name, (_, low) in CATEGORIES.items() if (weight or 5) >= low)
    category = prefix[1].lower() if prefix and by_weight != "pitfall" else by_weight
    if category == "pitfall" and pitfalls == "drop":
        return None
    value = {"uniform": 1.0, "category": CATEGORIES[category][0], "row": abs(weight or 1.0)}[weights]
    label = item["title"] if by_title and item.get("title") is not None else category
    if not isinstance(label, str) or not label.strip() or not label.isprintable() or label == "joint":
        raise InputError(f"{where} has an item with title {label!r}: it must be one line of text, and not 'joint', the "
                         "logs' name for all together")
    return Criterion(text[prefix.end() if prefix else 0:].strip(), label, value,
                     category == "pitfall" and pitfalls == "invert")


def _rubric_example(row: dict, where: str, **options) -> Example:
    """One row in RaR's schema: question (or prompt: a text or a chat), rubric [{description, weight, title}]."""
    prompt = row.get("prompt", row.get("question"))
    messages = chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, where)
    items = row.get("rubric")
    if not isinstance(items, list) or not items:
        raise InputError(f'{where} has no rubric: it must be a list of {{"description": ..., "weight": ...}}')
    criteria = [_criterion(item, where, **options) for item in items]
    if not any(criteria):
        raise InputError(f"{where} has nothing but pitfalls: leave it out of the data, or do not --pitfalls drop")
    return Example(messages, criteria=tuple(filter(None, criteria)))


def read(task: str, path: str, weights: str = "uniform", pitfalls: str = "invert") -> list[Example]:
    """A task's prompts from a file, URL or hub path. Raises InputError naming the row, counted from 0."""
    out = []
    for i, row in enumerate(read_rows(path)):
        where = f"{path}: row {i}"
        if task == "rlla":
            out.append(_rlla_example(row, where))
        else:
            out.append(_rubric_example(row, where, by_title=task == "rubric", weights=weights, pitfalls=pitfalls))
    return out


def load(task: str, data: str | None, eval_data: str | None, n_train: int, n_eval: int,
         **rubric: str) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples) of a task; at most n_eval of the latter. `tools` makes n_train of the
    former, a file is used whole. With --data alone the last n_eval rows of the file are held out. rubric: options of
    `read`. Raises InputError."""
    if task == "tools":
        if data or eval_data:
            raise InputError("--data and --eval-data: the task tools makes its own prompts; use --task rlla for a file")
        return tools(n_train, "train"), tools(n_eval, "test")
    if not data and task not in PUBLIC:
        raise InputError(f"--task {task} needs --data FILE, see README.md for its schema")
    if eval_data or not data:
        held_out = read(task, eval_data or PUBLIC[task].format(split="test"), **rubric)[:n_eval]
        train = read(task, data or PUBLIC[task].format(split="train"), **rubric)
        if not held_out and n_eval:
            raise InputError(f"{eval_data} has no rows to evaluate on")
    else:
        rows = read(task, data, **rubric)
        cut = max(0, len(rows) - n_eval)
        train, held_out = rows[:cut], rows[cut:]
    if not train:
        raise InputError(f"{data}: no rows are left for training after {len(held_out)} were held out; give more rows, "
                         "or lower --eval-prompts")
    return train, held_out
