"""What runs and evaluations leave on disk, read for plot.py, report.py and show.py.

A run of train.py has steps, evaluations along the way, and what was sampled in each step. One of
eval.py has one evaluation and what was sampled for it; one of eval.py --policies has both for each
policy. A `Batch` is what was sampled in one step, or for one evaluation. It is read when it is
asked for, because all of them together may be gigabytes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from infra.ranks import InputError
from infra.run_directory import by_step

MALFORMED = ValueError, LookupError, TypeError, AttributeError  # what a line of another kind raises


class Response(NamedTuple):
    text: str
    finish: str  # "length" if it was cut off
    rewards: dict[str, float | None]  # by channel, criterion or score; None: missing
    advantage: float | None  # None in an evaluation

    def worth(self) -> float:
        """By which responses are ordered: the advantage, or the mean of what was measured."""
        if self.advantage is not None:
            return self.advantage
        present = [value for value in self.rewards.values() if value is not None]
        return sum(present) / max(1, len(present))


class Group(NamedTuple):
    prompt: list[dict]  # the chat; [] if it was not written down
    title: str  # of an item of eval.py: its id and category
    reference: str  # with what responses were compared, if that was written down
    responses: list[Response]


class Batch(NamedTuple):
    kind: str  # "step" or "evaluation"
    step: int | None  # None: an evaluation of a single model
    file: Path
    start: int  # where it begins in the file, in bytes
    size: int

    def when(self) -> tuple[str, int | None]:
        """What batches of several runs are compared by."""
        return self.kind, self.step

    def label(self) -> str:
        """Such as "step 3"."""
        if self.step is None:
            return self.kind
        return f"step {self.step}" if self.kind == "step" else f"evaluation, {self.step} steps"


class Channel(NamedTuple):  # as config.json and results.json name it
    full: float = 1.0  # the value that satisfies it
    weight: float = 1.0
    help: str = ""

    def is_satisfied(self, value: float) -> bool:
        return value >= self.full - 1e-6


class Run(NamedTuple):
    path: Path
    options: dict  # config.json, or the settings of results.json
    channels: dict[str, Channel]  # {} if the run did not write them down
    steps: list[dict]  # of metrics.jsonl
    evals: list[dict]  # {"step": N or None, "eval": {metric: (mean, standard error)}}
    metric: str  # by which the best is chosen
    batches: list[Batch]

    def trains(self) -> bool:
        return "agg" in self.options

    def method(self) -> str:
        """Such as "rvpo 2"; of an evaluation the model."""
        if not self.trains():
            return str(self.options.get("model", "evaluation"))
        agg = self.options["agg"]
        has_beta = agg in ("rvpo", "explicit", "softmin") and "beta" in self.options
        return f"{agg} {self.options['beta']}" if has_beta else agg

    def channel(self, name: str) -> Channel:
        """Criteria, and channels that the run did not write down, are satisfied by 1."""
        return self.channels.get(name, Channel())

    def points(self, metric: str) -> list[tuple[int | None, float, float]]:
        """(step, mean, standard error) of each evaluation that has the metric.

        The error of a single prompt is 0."""
        points = []
        for line in self.evals:
            mean, error = line["eval"].get(metric, (None, None))
            if mean is not None:
                points.append((line["step"], mean, error or 0.0))
        return points

    def best(self) -> int | None:
        """After how many steps the metric was highest; the earliest of equal ones."""
        points = self.points(self.metric)
        if not points:
            return None
        step, _, _ = max(points, key=lambda point: point[1])
        return step


def read(path: Path) -> Run:
    """The run or evaluation in a directory. Raises InputError."""
    if folders := by_step(path):
        return read_policies(path, folders)
    if (path / "results.json").is_file():
        return read_evaluation(path)
    if (path / "config.json").is_file():
        return read_training(path)
    raise InputError(
        f"{path}: no run is there; name the directory of a run of train.py or eval.py, such as "
        "runs/NAME"
    )


def read_training(path: Path) -> Run:
    options = read_json(path / "config.json")
    channels = read_channels(options.pop("channels", {}), path / "config.json")
    file = path / "metrics.jsonl"
    lines = [line for line, _ in read_lines(file)] if file.is_file() else []
    if not lines:
        raise InputError(f"{file} holds no step and no evaluation yet")
    if not all("step" in line for line in lines):
        raise InputError(f"{file} cannot be read: a line has no step")
    steps = [line for line in lines if "eval" not in line]
    evals = [line for line in lines if "eval" in line]
    return Run(
        path,
        options,
        channels,
        steps,
        evals,
        "joint",
        batches_of_steps(path / "samples.jsonl"),
    )


def read_evaluation(path: Path, step: int | None = None) -> Run:
    """step: of the policy that was evaluated, if it is one of several."""
    file = path / "results.json"
    results = read_json(file)
    try:
        options = {"task": results.get("task"), **results.get("settings", {})}
        metrics = results["metrics"]
        values = {name: (of["mean"], of["stderr"]) for name, of in metrics.items()}
        metric, *_ = values
    except MALFORMED as error:
        raise unreadable(file, error) from error
    samples = path / "samples.jsonl"
    batches = []
    if samples.is_file():
        batches.append(Batch("evaluation", step, samples, 0, samples.stat().st_size))
    channels = read_channels(results.get("channels", {}), file)
    return Run(path, options, channels, [], [{"step": step, "eval": values}], metric, batches)


def read_policies(path: Path, folders: list[Path]) -> Run:
    """What eval.py --policies wrote. folders: its step-N, in their order."""
    runs = []
    for folder in folders:
        runs.append(read_evaluation(folder, int(folder.name.removeprefix("step-"))))
    first, *_ = runs
    return first._replace(
        path=path,
        options={**first.options, "model": str(Path(first.options.get("model", "")).parent)},
        evals=[line for run in runs for line in run.evals],
        batches=[batch for run in runs for batch in run.batches],
    )


def read_channels(written: object, file: Path) -> dict[str, Channel]:
    """{name: Channel} of {name: {"full", "weight", "help"}}."""
    try:
        return {name: read_channel(fields) for name, fields in written.items()}
    except MALFORMED as error:
        raise unreadable(file, error) from error


def read_channel(fields: dict) -> Channel:
    """The fields that are known here: a newer version may have written more."""
    known = {name: fields[name] for name in Channel._fields if name in fields}
    channel = Channel(**known)
    return Channel(float(channel.full), float(channel.weight), str(channel.help))


# Batches


def batches_of_steps(file: Path) -> list[Batch]:
    """Where each step stands in a samples.jsonl, which may not be there."""
    batches = []
    if not file.is_file():
        return batches
    start = 0
    for line, size in read_lines(file):
        try:
            step = line["step"]
        except MALFORMED as error:
            raise unreadable(file, error) from error
        if batches and batches[-1].step == step:
            batches[-1] = batches[-1]._replace(size=batches[-1].size + size)
        else:
            batches.append(Batch("step", step, file, start, size))
        start += size
    return batches


def groups_of(run: Run, batch: Batch) -> list[Group]:
    """What was sampled, each prompt with its responses. Raises InputError."""
    with batch.file.open("rb") as file:
        file.seek(batch.start)
        lines = file.read(batch.size).splitlines()
    try:
        parsed = [parse(line) for line in lines]
        if batch.kind == "evaluation":
            return [evaluated_group(line) for line in parsed]
        return sampled_groups(parsed, run.options.get("group"))
    except MALFORMED as error:
        raise unreadable(batch.file, error) from error


def sampled_groups(lines: list[dict], size: int | None) -> list[Group]:
    """Of one step. size: G, by which a prompt that was drawn twice is told from one group."""
    groups = []
    for line in lines:
        prompt = chat_of(line.get("prompt"))
        if not groups or groups[-1].prompt != prompt or len(groups[-1].responses) == size:
            groups.append(Group(prompt, "", "", []))
        response = Response(
            line["response"], line.get("finish", ""), line["rewards"], line.get("advantage")
        )
        groups[-1].responses.append(response)
    return groups


def evaluated_group(item: dict) -> Group:
    """An item's line: its scores, and for each of its examples a response with its verdicts."""
    details = item["responses"]
    first, *_ = details
    responses = []
    finish = "length" if item.get("truncated") == 1 else ""
    for detail in details:
        rewards = item["scores"] | detail.get("rewards", {})
        for k, verdict in enumerate(detail.get("met", []), 1):  # of HealthBench
            rewards[f"{k} criterion {k}"] = verdict
        responses.append(Response(text_of(detail), finish, rewards, None))
    title = f"item {item.get('id', '')}"
    if item.get("category"):
        title += f" of {item['category']}"
    if len(details) > 1:
        title += f"; its scores are means over its {len(details)} responses"
    prompt = chat_of(item.get("prompt") or first.get("prompt"))
    return Group(prompt, title, first.get("reference", ""), responses)


def text_of(detail: dict) -> str:
    """A response; of GPQA, whose questions are not to be published, the letter that it chose."""
    if "response" in detail:
        return detail["response"]
    return f"{detail['letter']} (the right answer: {detail['correct']})"


def chat_of(prompt: object) -> list[dict]:
    """The messages of a prompt, which may be a text."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return list(prompt or [])


def criteria_of(group: Group) -> list[str]:
    """The names of rewards that are a judge's verdicts: "1 Says when to see a doctor"."""
    names = dict.fromkeys(name for response in group.responses for name in response.rewards)
    numbered = [name for name in names if re.match(r"\d+ ", name)]
    in_order = [name for k, name in enumerate(numbered, 1) if name.startswith(f"{k} ")]
    return numbered if numbered == in_order else []


# Files


def read_json(file: Path) -> dict:
    try:
        return parse(file.read_bytes())
    except (OSError, *MALFORMED) as error:
        raise unreadable(file, error) from error


def read_lines(file: Path) -> Iterator[tuple[dict, int]]:
    """Each line and its size in bytes. One that is still being written is left out."""
    try:
        with file.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    yield parse(line), len(line)
    except (OSError, *MALFORMED) as error:
        raise unreadable(file, error) from error


def parse(text: bytes) -> dict:
    """A JSON object, with None for NaN and infinity. Raises ValueError."""
    value = json.loads(text, parse_constant=no_number)
    if not isinstance(value, dict):
        raise ValueError(f"no JSON object, but {text[:40]!r}")
    return value


def no_number(name: str) -> None:
    """What stands for NaN and infinity."""


def unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} cannot be read: {type(error).__name__} {error}")
