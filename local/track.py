"""A run's logs to wandb or trackio, for --track. The package is imported here only."""

import importlib
import json
from collections.abc import Callable

from tqdm import tqdm

from infra.ranks import InputError

ROWS = 64  # of samples a step: all of them are in samples.jsonl


def flat(record: dict, prefix: str = "") -> dict[str, float]:
    """{"channels": {"format": {"mean": 1}}} -> {"channels/format/mean": 1}; of [mean, standard error] the mean. What is
    no number is left out."""
    out = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, tuple):
            out[f"{prefix}{name}"] = float(value[0])
        elif isinstance(value, (int, float)):
            out[f"{prefix}{name}"] = value
    return out


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Tracker:
    """Of one run, on rank 0. A run that is resumed goes on under its name; steps it repeats are
    sent again.

    What the package raises is said once, and then nothing more is sent: it must not end the run.
    """

    def __init__(self, name: str, run: str, config: dict, resumed: bool):
        """Raises InputError if a new run cannot be tracked."""
        self.name, self.failed = name, False
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
        columns = [
            "prompt",
            "response",
            "advantage",
            *dict.fromkeys(name for r in records for name in r["rewards"]),
        ]
        rows = [
            {**record["rewards"], **record, "prompt": json.dumps(record["prompt"])}
            for record in records[:ROWS]
        ]
        data = [[row.get(name) for name in columns] for row in rows]

        def send() -> None:
            table = self.package.Table(columns=columns, data=data)
            self.package.log({"samples": table}, step=records[0]["step"])

        self._try(send)

    def finish(self) -> None:
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
