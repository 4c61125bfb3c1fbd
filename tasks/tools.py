"""The task `tools`: prompts that ask for one tool call in ToolRL's format, and seven channels.

Prompts are generated. Each channel is at most 1.
"""

import functools
import hashlib
import json
import random
import re

from rewards import Channel, Example, Task

OPTIONS = ()  # none of those that only some tasks read

CITIES = (
    "Paris Oslo Cairo Lima Tokyo Delhi Rome Berlin Madrid Dublin "
    "Vienna Prague Sydney Toronto Boston"
)
NAMES = "Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul"
SONGS = "Yesterday, Imagine, Thriller, Hello, Hey Jude, Let It Be, Purple Rain, Africa"
VALUES = {  # of each parameter
    "city": CITIES.split(),
    "name": NAMES.split(),
    "food": "pizza sushi pasta tacos curry salad soup noodles burgers steak".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "song": SONGS.split(", "),
    "word": "hello house water friend winter garden bread music light river".split(),
    "language": "French Spanish German Italian Dutch Polish Greek Swedish".split(),
    "days": range(2, 15),
    "minutes": range(5, 60),
    "people": range(2, 13),
    "amount": range(10, 500),
}
TOOLS = {  # name: (description, request)
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


def example(rng: random.Random) -> Example:
    """Three tools in the system prompt, two worked requests, one to answer.

    Without the worked ones a 135M model never hits the format, and rewards that never vary teach
    nothing.
    """
    names = rng.sample(sorted(TOOLS), 3)
    lines = ["Answer every request with one tool call. Tools:"]
    for name in names:
        description, template = TOOLS[name]
        lines.append(f"{name}({', '.join(_keys(template))}): {description}")
    messages = [{"role": "system", "content": "\n".join(lines)}]
    for name in rng.sample(names, 2):
        request, answer = _request(rng, name)
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    request, answer = _request(rng, rng.choice(names))
    return Example([*messages, {"role": "user", "content": request}], answer)


def _keys(template: str) -> list[str]:
    """The parameters that a request names."""
    return [key for key in VALUES if "{" + key + "}" in template]


def _request(rng: random.Random, tool: str) -> tuple[str, str]:
    """A user's request for the tool, and the answer to it."""
    _, template = TOOLS[tool]
    parameters = {key: rng.choice(VALUES[key]) for key in _keys(template)}
    call = json.dumps({"name": tool, "parameters": parameters})
    answer = f"<think> I will use {tool}. </think>\n<tool_call>\n{call}\n</tool_call>"
    return template.format(**parameters), answer


def examples(n: int, split: str, seed: int = 0, draw=example) -> list[Example]:
    """n of 'train' or 'test'. A prompt's own hash decides its split, so that the two never meet."""
    rng = random.Random(f"{split}/{seed}")
    out = []
    while len(out) < n:
        drawn = draw(rng)
        digest = hashlib.sha256(json.dumps(drawn.messages).encode()).digest()
        if (digest[0] < 26) == (split == "test"):  # a tenth is test
            out.append(drawn)
    return out


def tool_calls(text: str) -> list[dict]:
    """The first <tool_call> block: each line is a JSON object with a "name".

    Raises ValueError for anything else.
    """
    if "<tool_call>" not in text or "</tool_call>" not in text:
        raise ValueError("no <tool_call> block")
    block = text.split("<tool_call>")[1].split("</tool_call>")[0].strip()
    if len(block) > 100_000:  # a megabyte would take a tenth of a second to parse
        raise ValueError("a <tool_call> block of more than 100,000 characters")
    try:
        calls = [json.loads(line) for line in block.split("\n")]
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError('a line of the <tool_call> block is no JSON object with a "name"')
    return calls


BLOCKS = re.compile(r"<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>", re.DOTALL)
TAGS = "<think>", "</think>", "<tool_call>", "</tool_call>"
BRIEF = 200  # characters: enough for a short thought and any call of the task


def _call(text: str) -> tuple[str | None, dict]:
    """Name and parameters of the first call; (None, {}) if there is none that can be parsed."""
    try:
        call, *_ = tool_calls(text)
    except ValueError:
        return None, {}
    if not isinstance(call.get("parameters"), dict):
        return None, {}
    return call["name"], call["parameters"]


@functools.lru_cache(256)  # every channel of a response asks for all
def values(response: str, reference: str) -> dict[str, float]:
    """The value of every channel. Without a call, the four that are about the call are 0."""
    name, parameters = _call(response)
    true_name, true = _call(reference)
    each_tag_once = all(response.count(tag) == 1 for tag in TAGS)
    blocks = BLOCKS.search(response) if each_tag_once else None
    in_blocks = len(blocks.group()) if blocks else 0
    named = [key for key in true if key in parameters]
    right = [key for key in named if _same(parameters[key], true[key])]
    invented = sum(key not in true for key in parameters)
    return {
        "format": float(blocks is not None),
        "tool": float(name == true_name),
        "arg_names": len(named) / len(true),
        "arg_values": len(right) / len(true),
        "no_invented": (name is not None) - invented / max(1, len(parameters)),
        "clean": in_blocks / max(1, len(response.strip())),  # the share that is in the blocks
        "brief": min(1.0, max(0.0, 2 - len(response) / BRIEF)),  # falls to 0 at twice BRIEF
    }


def _same(value: object, truth: object) -> bool:
    return value == truth and type(value) is type(truth)


def prompts(n_train: int, n_test: int | None) -> tuple[list[Example], list[Example]]:
    return examples(n_train, "train"), examples(200 if n_test is None else n_test, "test")


def task(config) -> Task:
    made = Task(prompts, [channel(name, asks) for name, asks in CHANNELS.items()])
    made.max_tokens = 256  # in an evaluation
    return made


CHANNELS = {
    "format": "thinks, then calls, in ToolRL's format",
    "tool": "calls the right tool",
    "arg_names": "share of the right arguments that are named",
    "arg_values": "share of the right arguments with the right value",
    "no_invented": "1 less the share of arguments that do not exist",
    "clean": "share of the text that is inside the blocks",
    "brief": "falls to 0 with the length",
}


def channel(name: str, asks: str) -> Channel:
    def fn(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
        pairs = zip(responses, references, strict=True)
        return [values(*pair)[name] for pair in pairs]

    return Channel(name, fn, help=asks)
