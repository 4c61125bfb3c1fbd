"""What a task is: prompts, reward channels, and how responses are scored.

The built-in tasks are in tasks/. A task of your own is a file with a function `task(config)` that
returns a Task, see examples/polite.py.

NaN says that a reward is missing for a response: it is left out, and never counted as 0. What a
model writes is data: it is parsed, and never run.
"""

import contextlib
import hashlib
import inspect
import json
import math
import re
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infra import chats
from infra.ranks import InputError

# Where what a user wrote is called.
OURS = __file__, str(Path(__file__).parent / "tasks/__init__.py")
LARGEST = 1e100  # of rewards: beyond it squares overflow, and the channel would lose its signal


class Channel(NamedTuple):
    """One reward.

    fn: (prompts, responses, references), three lists of G texts -> a list of G numbers. A prompt is
    what `asked` returns. A response is whole, with its thoughts, which `answer` leaves out.
    """

    name: str
    fn: Callable[[list[str], list[str], list[str]], list[float]] | None = None  # None: a judge's
    full: float = 1.0  # the value that satisfies it
    bounds: tuple[float, float] = (0.0, 1.0)  # its worst and best value; only --agg softmin asks
    weight: float = 1.0  # in the aggregation; 0: it is only logged
    help: str = ""  # a few words for people: what it asks


class Example(NamedTuple):
    """One prompt, with what its responses are scored by."""

    messages: list[dict]  # the chat so far, [{role, content}], see infra/chats.py
    reference: str = ""  # a text with which rule-based rewards compare a response
    criteria: tuple = ()  # what a judge decides, see tasks/rubrics.py
    id: str = ""  # an evaluation averages the scores of examples with one id: they are one item
    category: str = ""  # of a benchmark, which averages over its items
    tools: tuple = ()  # JSON objects: what the chat template says that the policy may call


class Task:
    """Prompts and channels whose rewards are functions.

    Judged tasks and benchmarks (tasks/) are subclasses: they replace the methods that differ.
    """

    # How eval.py samples, and whether it clips means to [0, 1].
    temperature = 0.0
    max_tokens = 1024
    clip = False
    shows_prompts = True  # in eval.py's samples.jsonl

    def __init__(self, prompts: Callable, channels: list[Channel]):
        """prompts: (n_train, n_test) -> (training examples, held-out examples); None means all.
        channels: of every prompt. Raises InputError."""
        check_channels(channels)
        names = [channel.name for channel in channels]
        weights = [channel.weight for channel in channels]
        distinct = len({"joint", *names}) == 1 + len(names)  # evaluations add "joint"
        if not distinct or not any(weights) or not all(0 <= w < math.inf for w in weights):
            raise InputError(
                "a task needs channels, each with a name of its own other than 'joint' and a "
                f"weight of at least 0, not all 0, got {names} with {weights}"
            )
        self.prompts = prompts
        self._channels = channels

    def channels(self, example: Example) -> list[Channel]:
        """The channels of one prompt, K of them: the columns of `start`'s rewards."""
        return self._channels

    def start(self, example: Example, responses: list[str]) -> Callable[[], np.ndarray]:
        """Begins to score G responses to one prompt. Returns a function that waits for their
        rewards (G, K). Only a judge starts work before that function is called."""
        return lambda: score(self._channels, example, responses)

    def try_out(self, example: Example) -> None:
        """Called before the model is loaded. Raises InputError for a faulty reward."""
        score(self._channels, example, ["", example.reference])

    def weigh(self, text: str) -> None:
        """--weights NAME=NUMBER,...: channels that it does not name keep their weight. Raises
        InputError."""
        weights = {channel.name: channel.weight for channel in self._channels}
        for part in text.split(","):
            name, _, number = part.partition("=")
            is_number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?", number)
            if name not in weights or not is_number or float(number) > 1e6:
                raise InputError(
                    f"--weights {part}: must be NAME=NUMBER, the number at least 0 and the name "
                    f"one of {', '.join(weights)}"
                )
            weights[name] = float(number)
        self._channels = [
            channel._replace(weight=weights[channel.name]) for channel in self._channels
        ]
        if not any(weights.values()):
            raise InputError(
                f"--weights {text}: all channels have weight 0, so there is nothing to learn from"
            )

    def result(
        self, example: Example, response: str, rewards: np.ndarray
    ) -> tuple[dict[str, float], dict]:
        """Of one evaluated response with rewards (K,): its scores by name, and what else to write
        into samples.jsonl. Channels that share a name are averaged."""
        channels = self.channels(example)
        present = {channel.name: [] for channel in channels}
        for channel, value in zip(channels, rewards.tolist(), strict=True):
            if not math.isnan(value):
                present[channel.name].append(value)
        scores = {"joint": float(satisfied(channels, rewards))}
        for name, values in present.items():
            scores[name] = sum(values) / len(values) if values else math.nan
        return scores, {"response": response, "reference": example.reference}

    def report(self, rewards: list[np.ndarray]) -> dict:
        """What a judge did since the last call, over all ranks; {} without one. rewards: of the
        whole batch, each (G, K)."""
        return {}

    def check(self, report: dict) -> None:
        """Raises InputError, on all ranks alike, if a judge failed too often."""

    def averages(self) -> dict[str, dict[str, float]]:
        """{name of an average: {category: its weight}}. Each average that a benchmark reports is
        taken over its categories' means of the score "correct"."""
        return {}


def distinct(task: Task, examples: list[Example]) -> list[Channel]:
    """The channels of all these prompts, one of each name, in the order in which they come."""
    channels = {}
    for example in examples:
        for channel in task.channels(example):
            channels.setdefault(channel.name, channel)
    return list(channels.values())


def described(channels: list[Channel]) -> dict[str, dict]:
    """{name: what people and tools need to read its values}, for config.json and results.json."""
    return {c.name: {"full": c.full, "weight": c.weight, "help": c.help} for c in channels}


# Scoring


def score(channels: list[Channel], example: Example, responses: list[str]) -> np.ndarray:
    """(G, K) float64. Raises InputError naming a reward that fails or returns something else than
    G numbers."""
    columns = []
    for channel in channels:
        if channel.fn is None:
            raise InputError(
                f"reward '{channel.name}' has no function: "
                f"write Channel('{channel.name}', function)"
            )
        with users_code(f"reward '{channel.name}'"):
            # Each function gets lists of its own: it may change them.
            prompts = [asked(example.messages)] * len(responses)
            references = [example.reference] * len(responses)
            values = channel.fn(prompts, list(responses), references)
        check_values(channel.name, values, len(responses))
        columns.append(np.asarray(values, dtype=np.float64))
    return np.stack(columns, axis=-1).reshape(len(responses), len(columns))


def answer(response: str) -> str:
    """What follows a response's last </think>; nothing if the response ends in its thoughts."""
    _, _, said = response.rpartition("</think>")
    return "" if "<think>" in said else said


def asked(messages: list[dict]) -> str:
    """The last message that is not the assistant's. A chat may end with an assistant's message: the
    response continues it."""
    *_, last = [message for message in messages if message["role"] != "assistant"]
    return last["content"] or ""


def satisfied(channels: list[Channel], rewards: np.ndarray) -> np.ndarray:
    """(..., K) -> (...): 1.0 if all rewards are full, else 0.0. A reward that is missing or has no
    weight is left out; NaN if all are."""
    left_out = np.isnan(rewards) | np.array([channel.weight == 0 for channel in channels])
    full = np.array([channel.full for channel in channels])
    all_full = (left_out | (rewards >= full - 1e-6)).all(-1)
    return np.where(left_out.all(-1), np.nan, all_full)


def to_unit(channels: list[Channel], rewards):
    """Tensor (..., K) -> (..., K): each channel 0 at its worst and 1 at its best."""
    worst, best = rewards.new_tensor([channel.bounds for channel in channels]).T
    return (rewards - worst) / (best - worst)


def digest(examples: list[Example]) -> str:
    """SHA-256 of all that is in the examples."""
    # Older runs had no tools, the last field. Without it their digest stays the same.
    content = [example if example.tools else example[:-1] for example in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# Checks of what a user wrote


@contextlib.contextmanager
def users_code(what: str):
    """For calls of what a user wrote: an exception becomes one InputError that says where it was
    raised."""
    try:
        # The user's code may change the directory. This goes back, for paths such as runs/NAME.
        with contextlib.chdir("."):
            yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        *_, raised_at = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(raised_at.filename).name}, line {raised_at.lineno})"
        if raised_at.filename in OURS:  # by the call itself, such as a wrong number of arguments
            place = ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{what} raised {reason}{place}") from error


def check_values(name: str, values: object, n: int) -> None:
    """Raises InputError if a reward did not return n numbers, NaN for a missing one."""
    if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != n:
        raise InputError(
            f"reward '{name}' returned {str(values)[:40]} for {n} responses: return a list, one "
            "number a response"
        )
    for i, value in enumerate(values):
        is_number = isinstance(value, (int, float, np.integer, np.floating, np.bool_))
        # A huge int would overflow float(). NaN passes: no comparison with it is true.
        if not is_number or abs(value if isinstance(value, int) else float(value)) > LARGEST:
            raise InputError(
                f"reward '{name}' returned {value!r:.40} for response {i}: "
                "return a finite number, or NaN if it is missing"
            )


def check_channels(channels: object) -> None:
    """Raises InputError for what cannot be a task's channels, each by itself."""
    if not isinstance(channels, (list, tuple)):
        raise InputError(
            "a task's channels must be a list of rewards.Channel, "
            f"and not a {type(channels).__name__}"
        )
    for i, channel in enumerate(channels):
        where = f"channel {i} of the task"
        if not isinstance(channel, Channel):
            raise InputError(
                f"{where} is a {type(channel).__name__}: it must be a "
                "rewards.Channel, such as Channel('short', function)"
            )
        name = channel.name
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"{where} has the name {name!r}: it must be one line of text")
        if channel.fn is not None and not callable(channel.fn):
            raise InputError(f"channel {name}: fn must be a function, and not {channel.fn!r}")
        if inspect.iscoroutinefunction(channel.fn):
            raise InputError(f"channel {name}: fn must not be async: let it call asyncio.run")
        if not isinstance(channel.help, str) or not (channel.help + "x").isprintable():
            raise InputError(
                f"channel {name}: help must be one line of text, and not {channel.help!r:.60}"
            )
        if not isinstance(channel.weight, Real):
            raise InputError(f"channel {name}: weight must be a number, and not {channel.weight!r}")
        if not _is_finite(channel.full):
            raise InputError(f"channel {name}: full must be a number, and not {channel.full!r}")
        if not _are_bounds(channel.bounds):
            raise InputError(
                f"channel {name}: bounds must be worst, best, two numbers of which "
                f"worst is less, and not {channel.bounds!r}"
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and abs(value) <= LARGEST


def _are_bounds(bounds: object) -> bool:
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        return False
    worst, best = bounds
    return _is_finite(worst) and _is_finite(best) and worst < best


def check_example(example: object, where: str) -> Example:
    """The example, with messages and tools as chat templates take them. Raises InputError."""
    if not isinstance(example, Example):
        raise InputError(
            f"{where} is a {type(example).__name__}: it must be a rewards.Example, "
            'such as Example([{"role": "user", "content": "Hello"}], "reference")'
        )
    for field in ("reference", "id", "category"):
        value = getattr(example, field)
        if not isinstance(value, str):
            raise InputError(
                f"{where}: its {field} is no text, but {value!r:.40} "
                f"({type(value).__name__}): make it one, with str or json.dumps"
            )
    for criterion in example.criteria:
        if not isinstance(getattr(criterion, "text", None), str):
            raise InputError(
                f"{where} has a criterion without a text, see tasks/rubrics.py: {criterion!r:.40}"
            )
    messages = chats.chat(example.messages, where)
    return example._replace(messages=messages, tools=chats.tools(example.tools, where))
