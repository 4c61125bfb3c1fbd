"""Sends what a run logs to wandb or trackio (--track). Only here that package is imported."""

import importlib
import json
from collections.abc import Callable

from tqdm import tqdm

from infra.ranks import InputError

ROWS = 64  # responses of a step that are sent; samples.jsonl has all of them


class Tracker:
    """Sends the records of one run, on rank 0. A resumed run goes on under its name, and sends the
    steps that it repeats again.

    A failure of the package must not end the run: it is said once, and then nothing more is sent.
    """

    def __init__(self, name: str, run: str, config: dict, resumed: bool):
        """Raises InputError if a new run cannot be tracked."""
        self.name = name
        self.failed = False
        same = {"id": run} if name == "wandb" else {}  # to wandb a name says nothing
        try:
            self.package = importlib.import_module(name)
            self.package.init(project="rvpo", name=run, config=config, resume="allow", **same)
        except Exception as error:
            if not resumed:
                raise InputError(
                    f"--track {name}: {one_line(error)}; log in there first, or leave it out"
                ) from error
            self._give_up(error)

    def metrics(self, record: dict) -> None:
        """A line of metrics.jsonl."""
        values = flat({name: value for name, value in record.items() if name != "step"})
        self._try(lambda: self.package.log(values, step=record["step"]))

    def samples(self, records: list[dict]) -> None:
        """The lines of samples.jsonl of one step, the first ROWS of them as a table."""
        rewards = dict.fromkeys(name for record in records for name in record["rewards"])
        columns = ["prompt", "response", "advantage", *rewards]
        data = []
        for record in records[:ROWS]:
            row = {**record["rewards"], **record, "prompt": json.dumps(record["prompt"])}
            data.append([row.get(name) for name in columns])

        def send() -> None:
            table = self.package.Table(columns=columns, data=data)
            self.package.log({"samples": table}, step=records[0]["step"])

        self._try(send)

    def finish(self) -> None:
        """Called when the run is finished."""
        self._try(lambda: self.package.finish())

    def _try(self, send: Callable) -> None:
        if self.failed:
            return
        try:
            send()
        except Exception as error:  # noqa: BLE001 - whatever the package raises
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        tqdm.write(
            f"warning: --track {self.name} failed: {one_line(error)}; the run goes on "
            "without it, everything is in metrics.jsonl and samples.jsonl"
        )


def flat(record: dict, prefix: str = "") -> dict[str, float]:
    """{"channels": {"format": {"mean": 1}}} -> {"channels/format/mean": 1}. Of (mean, standard
    error) it takes the mean. What is no number is left out."""
    numbers = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, tuple):
            mean, _ = value
            numbers[f"{prefix}{name}"] = float(mean)
        elif isinstance(value, (int, float)):
            numbers[f"{prefix}{name}"] = value
    return numbers


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
