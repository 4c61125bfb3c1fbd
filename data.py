"""Prompts with their reference answers, from a task's name.

`tools` is built in and generated: real text, no download. `rlla` is ToolRL's data set in its public schema. Both ask
for ToolRL's output format: <think>..</think>, then a <tool_call> block of JSON lines.
"""

import hashlib
import http.client
import json
import random
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from rewards import InputError, tool_calls


class Example(NamedTuple):
    """messages: the chat so far, [{role, content}]. reference: what the task's rewards compare a response with."""

    messages: list[dict[str, str]]
    reference: str


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


# ToolRL's data set: github qiancheng0/ToolRL, dataset/rlla_4k (3,920 training and 80 test rows)
RLLA_URL = "https://raw.githubusercontent.com/qiancheng0/ToolRL/main/dataset/rlla_4k/{split}.parquet"


def _rows(path: str) -> list[dict]:
    """The rows of a .parquet, .jsonl or .json file (a list of objects). An URL is downloaded."""
    where = path
    try:
        if path.startswith(("http://", "https://")):
            path, _ = urllib.request.urlretrieve(path)
        if Path(path).read_bytes()[:4] == b"PAR1":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{path}, line {number}"
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except (urllib.error.URLError, http.client.HTTPException) as error:
        raise InputError(f"{path} could not be downloaded ({error}): name a local copy with --data") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as parquet, JSON (a list) or JSONL: {error}") from error


def _rlla_example(row: object, where: str) -> Example:
    """One row in the public schema: prompt [{role, content}], reward_model {ground_truth}. where: for the message."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    messages = prompt if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt) else []
    if not messages or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise InputError(f'{where} has no prompt: it must be a list of {{"role": ..., "content": ...}}')
    reward_model = row.get("reward_model")
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
    return Example([{"role": m["role"], "content": m["content"]} for m in messages], reference)


def rlla(path: str) -> list[Example]:
    """ToolRL's prompts from a file or URL. Raises InputError naming the row, counted from 0."""
    return [_rlla_example(row, f"{path}: row {i}") for i, row in enumerate(_rows(path))]


def load(task: str, data: str | None, eval_data: str | None, n_train: int,
         n_eval: int) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples) of a task; at most n_eval of the latter. `tools` makes n_train of the
    former, a file is used whole. With --data alone the last n_eval rows of the file are held out. Raises InputError."""
    if task == "tools":
        if data or eval_data:
            raise InputError("--data and --eval-data: the task tools makes its own prompts; use --task rlla for a file")
        return tools(n_train, "train"), tools(n_eval, "test")
    if eval_data or not data:
        held_out = rlla(eval_data or RLLA_URL.format(split="test"))[:n_eval]
        train = rlla(data or RLLA_URL.format(split="train"))
        if not held_out and n_eval:
            raise InputError(f"{eval_data} has no rows to evaluate on")
    else:
        rows = rlla(data)
        cut = max(0, len(rows) - n_eval)
        train, held_out = rows[:cut], rows[cut:]
    if not train:
        raise InputError(f"{data}: no rows are left for training after {len(held_out)} were held out; give more rows, "
                         "or lower --eval-prompts")
    return train, held_out
