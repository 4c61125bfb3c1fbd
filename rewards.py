"""What a task is: its prompts, its reward channels, how responses are scored. The built-in ones are in tasks/; one of
your own is a file with a function `task(config)` that returns a Task, see examples/polite.py.

NaN says that a reward is missing for a response; it is left out, never counted as 0. Model output is data: it is
parsed, never run.
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


class Channel(NamedTuple):  # one reward
    name: str
    fn: Callable[[list[str], list[str], list[str]], list[float]] | None = (
        None  # see `score`; None: a judge decides
    )
    full: float = 1.0  # the value that satisfies it
    bounds: tuple[float, float] = (
        0.0,
        1.0,
    )  # its worst and its best value, which only --agg softmin asks for
    weight: float = 1.0  # in the aggregation; 0: it is logged, and nothing else


class Example(NamedTuple):
    """messages: the chat so far, [{role, content}], see tasks/chats.py. reference: a text with
    which rule-based rewards compare a response. criteria: what a judge decides, see
    tasks/rubrics.py. id: in an evaluation, examples with one id are one item, whose scores are
    averaged. category: the one of a benchmark, over which it averages items. tools: JSON objects,
    what the chat template says that the policy may call."""

    messages: list[dict]
    reference: str = ""
    criteria: tuple = ()
    id: str = ""
    category: str = ""
    tools: tuple = ()


def digest(examples: list[Example]) -> str:
    """SHA-256 of all that is in them. Without tools, the last field, it is that of before there
    were any: older runs can be resumed, and older evaluations compared."""
    content = [example if example.tools else example[:-1] for example in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Task:
    """A rule-based one. Judged tasks and benchmarks (tasks/) replace what is different with them."""

    temperature, max_tokens, clip = (
        0.0,
        1024,
        False,
    )  # of eval.py: how it samples, whether means are clipped to [0, 1]

    def __init__(self, prompts: Callable, channels: list[Channel]):
        """prompts: (n_train, n_test) -> (training examples, held-out examples); None: all. channels: every prompt's."""
        check_channels(channels)
        names = [
            "joint",
            *(channel.name for channel in channels),
        ]  # what evaluation calls all of them
        weights = [channel.weight for channel in channels]
        if (
            len({*names}) < len(names)
            or not any(weights)
            or not all(0 <= weight < math.inf for weight in weights)
        ):
            raise InputError(
                "a task needs channels, each with a name of its own other than 'joint' and a weight of at "
                f"least 0, not all 0, got {names[1:]} with {weights}"
            )
        self.prompts, self._channels = prompts, channels

    def weigh(self, text: str) -> None:
        """--weights NAME=NUMBER,...: the channels that are not named keep their weight."""
        known = {channel.name: channel.weight for channel in self._channels}
        for part in text.split(","):
            name, _, number = part.partition("=")
            if (
                name not in known
                or not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?", number)
                or float(number) > 1e6
            ):
                raise InputError(
                    f"--weights {part}: must be NAME=NUMBER, the number at least 0 and the name one of "
                    + ", ".join(known)
                )
            known[name] = float(number)
        self._channels = [
            channel._replace(weight=known[channel.name]) for channel in self._channels
        ]
        if not any(channel.weight for channel in self._channels):
            raise InputError(
                f"--weights {text}: all channels have weight 0, so there is nothing to learn from"
            )

    def channels(self, example: Example) -> list[Channel]:
        """The channels of one prompt, K of them: the columns of `start`'s rewards."""
        return self._channels

    def try_out(self, example: Example) -> None:
        """Raises InputError for a faulty reward."""
        score(self._channels, example, ["", example.reference])

    def start(self, example: Example, responses: list[str]) -> Callable[[], np.ndarray]:
        """G responses to one prompt -> a function that waits for their rewards (G, K). A judge begins at once."""
        return lambda: score(self._channels, example, responses)

    def result(
        self, example: Example, response: str, rewards: np.ndarray
    ) -> tuple[dict[str, float], dict]:
        """Of one evaluated response with its rewards (K,): (scores by name, channels with one name taken together; what
        else to write into samples.jsonl)."""
        channels, columns = self.channels(example), {}
        for channel, value in zip(channels, rewards.tolist(), strict=True):
            columns.setdefault(channel.name, []).extend([] if math.isnan(value) else [value])
        scores = {name: sum(x) / len(x) if x else math.nan for name, x in columns.items()}
        return (
            {"joint": float(satisfied(channels, rewards)), **scores},
            {"response": response, "reference": example.reference},
        )

    def report(self, rewards: list[np.ndarray]) -> dict:
        """What a judge did since the last call, over all ranks. rewards: of the whole batch, each (G, K)."""
        return {}

    def check(self, report: dict) -> None:
        """Raises InputError, on all ranks alike, if a judge failed too often."""

    def averages(self) -> dict[str, dict[str, float]]:
        """{name: {category: weight}}: the benchmark's means over categories, of the score "correct"."""
        return {}


def check_channels(channels: object) -> None:
    """Raises InputError for what cannot be a task's channels, each by itself."""
    if not isinstance(channels, (list, tuple)):
        raise InputError(
            "a task's channels must be a list of rewards.Channel, and not a "
            f"{type(channels).__name__}"
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
    return isinstance(value, Real) and abs(value) <= 1e100


def _are_bounds(bounds: object) -> bool:
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        return False
    worst, best = bounds
    return _is_finite(worst) and _is_finite(best) and worst < best


def check_example(example: object, where: str) -> Example:
    """The same, with messages and tools as chat templates take them. Raises InputError."""
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


@contextlib.contextmanager
def users_code(what: str):
    """What a user wrote runs in this. An exception becomes one InputError that says where it was
    raised. The working directory stays, for paths such as runs/NAME count from it."""
    try:
        with contextlib.chdir("."):
            yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({Path(at.filename).name}, line {at.lineno})"
        if at.filename == __file__:  # what the user wrote cannot be called
            place = ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{what} raised {reason}{place}") from error


def answer(response: str) -> str:
    """What follows a response's last </think>; nothing if the response ends in its thoughts."""
    said = response.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def asked(messages: list[dict]) -> str:
    """The last message that is not the assistant's: a chat may end in how an answer begins."""
    last = [message for message in messages if message["role"] != "assistant"][-1]
    return last["content"] or ""


def score(channels: list[Channel], example: Example, responses: list[str]) -> np.ndarray:
    """(G, K) float64. Raises InputError naming a reward that fails or returns something else.

    A channel's fn: (prompts, responses, references), three lists of G texts -> a list of G numbers,
    NaN for a missing one. prompts: what `asked` says. responses: whole, with their thoughts, which
    `answer` leaves out.
    """
    columns = []
    for name, fn, *_ in channels:
        if fn is None:
            raise InputError(f"reward '{name}' has no function: write Channel('{name}', function)")
        with users_code(f"reward '{name}'"):
            n = len(responses)  # lists of its own: it may change them
            values = fn([asked(example.messages)] * n, list(responses), [example.reference] * n)
        if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != len(responses):
            raise InputError(
                f"reward '{name}' returned {str(values)[:40]} for {len(responses)} responses: return a "
                "list, one number a response"
            )
        for i, value in enumerate(values):
            # Beyond 1e100 squares overflow, and the channel would lose its signal without a word.
            number = isinstance(value, (int, float, np.integer, np.floating, np.bool_))
            if not number or abs(value if isinstance(value, int) else float(value)) > 1e100:
                raise InputError(
                    f"reward '{name}' returned {value!r:.40} for response {i}: "
                    "return a finite number, or NaN if it is missing"
                )
        columns.append(np.asarray(values, dtype=np.float64))
    return np.stack(columns, axis=-1).reshape(len(responses), len(columns))


def satisfied(channels: list[Channel], rewards: np.ndarray) -> np.ndarray:
    """(..., K) -> (...), 1.0 if every reward that is present and has weight is full, else 0.0; NaN if there is none."""
    missing = np.isnan(rewards) | np.array([channel.weight == 0 for channel in channels])
    full = np.array([channel.full for channel in channels])
    return np.where(missing.all(-1), np.nan, (missing | (rewards >= full - 1e-6)).all(-1))


def to_unit(channels: list[Channel], rewards):
    """(..., K) -> (..., K): each channel 0 at its worst and 1 at its best."""
    worst, best = rewards.new_tensor([channel.bounds for channel in channels]).T
    return (rewards - worst) / (best - worst)
