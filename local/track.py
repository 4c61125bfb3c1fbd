"""A run's logs to wandb or trackio, for --track. The package is imported here only."""

import importlib
import json

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


class Tracker:
    """Of one run, on rank 0. A run that is resumed goes on under its name; steps it repeats are sent again."""

    def __init__(self, package: str, name: str, config: dict):
        self.package = importlib.import_module(package)
        same = {"id": name} if package == "wandb" else {}  # to wandb a name says nothing
        self.package.init(project="rvpo", name=name, config=config, resume="allow", **same)

    def metrics(self, record: dict) -> None:
        """A line of metrics.jsonl."""
        self.package.log(flat({name: value for name, value in record.items() if name != "step"}), step=record["step"])

    def samples(self, records: list[dict]) -> None:
        """The lines of samples.jsonl of one step, the first ROWS of them as a table."""
        columns = ["prompt", "response", "advantage", *dict.fromkeys(name for r in records for name in r["rewards"])]
        rows = [{**record["rewards"], **record, "prompt": json.dumps(record["prompt"])} for record in records[:ROWS]]
        table = self.package.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
        self.package.log({"samples": table}, step=records[0]["step"])

    def finish(self) -> None:
        self.package.finish()
