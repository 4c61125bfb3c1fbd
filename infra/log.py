"""What a run says while it trains: metrics.jsonl, samples.jsonl, the terminal, a tracker.

`Log` says what there is to say, and where it goes is up to its subclass. `RunLog` is train.py's; to
log elsewhere, write another one. The numbers come from statistics.py, the warnings from watch.py.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from infra.ranks import RANK, InputError, on_rank_0
from infra.run_directory import write_json
from infra.statistics import mean_and_error, step_statistics
from infra.terminal import Pace, line_of_evaluation, line_of_step
from infra.watch import Watch
from rollout import Group

LOGS = "metrics.jsonl", "samples.jsonl"


class Log:
    """What `train.fit` and `train.evaluate` report to. A subclass must define three methods:
    `metrics`, `samples` and `say`.

    Every rank calls every method with the same arguments. What should happen once, such as writing
    to a file, is for one rank to do. A method that raises must raise on all ranks.
    """

    def metrics(self, record: dict) -> None:
        """Keeps the numbers of a step or of an evaluation, once for each.

        record: "step", how many steps are done, and numbers, some of them in further dicts. An
        evaluation's are under "eval": (mean, standard error) by name. NaN: there is no such number.
        """
        raise NotImplementedError

    def samples(self, records: list[dict]) -> None:
        """Keeps the responses of a step, a record each: step, prompt, response, finish, rewards by
        name, advantage. Called once a step, before the policy is updated."""
        raise NotImplementedError

    def say(self, line: str) -> None:
        """Shows a line to whoever watches the run."""
        raise NotImplementedError

    def groups(self, step: int, groups: list[Group]) -> None:
        """Called in every step, once its advantages are known. step: counted from 1."""
        records = []
        for group in groups:
            records += sample_records(step, group)
        self.samples(records)

    def step(self, step: int, groups: list[Group], metrics: dict) -> dict:
        """Called after every step. metrics: what `update` returned, "beta", "lr", the "seconds" of
        each phase, and a judge's report, if there is a judge, as "judge". Returns the record."""
        seconds = sum(metrics["seconds"].values()) - metrics["seconds"]["save"]
        statistics = step_statistics(groups, metrics["beta"], seconds)
        record = {"step": step, **metrics, **statistics}
        if judge := metrics.get("judge"):
            record["judge"] = {**judge, "share_of_step": judge["seconds"] / seconds}
        self.metrics(record)
        self.say(line_of_step(record, *self.progress(step)))
        if bad := record["bad_updates"]:
            self.say(f"step {step}: a loss or gradient is not finite; updates left out: {bad}")
        return record

    def evaluation(
        self,
        step: int,
        scores: list[dict[str, float]],
        report: dict,
        full: dict[str, float] | None = None,
    ) -> None:
        """Called after an evaluation, at `step` steps.

        scores: of each prompt, by name; NaN if missing. A name is a channel's, or "joint": whether
        all channels were satisfied. report: the judge's, or {}. full: the value that satisfies a
        channel, by its name.
        """
        names = list(dict.fromkeys(name for row in scores for name in row))
        names.sort(key=lambda name: name == "joint")  # which stands last
        results = {name: mean_and_error(scores_of(name, scores)) for name in names}
        record = {"step": step, "eval": results}
        if report:
            record["judge"] = report
        self.metrics(record)
        head, _ = self.progress(step)
        self.say(line_of_evaluation(results, head))

    def progress(self, step: int) -> tuple[str, str]:
        """The number of a step as its line shows it, and how long the run will go on, or ""."""
        return str(step), ""


class RunLog(Log):
    """Writes into runs/NAME/ and onto the terminal, from rank 0. Every rank makes one.

    write_policy: writes the policy into a directory. If it is given, the policy of each evaluation
    is kept, in runs/NAME/policies/step-N. tracker: what `open_tracker` returned.
    """

    def __init__(
        self,
        run: Path,
        steps: int = 0,
        begun: int = 0,
        write_policy: Callable | None = None,
        tracker=None,
        evaluated: Iterable[int] = (),
    ):
        """steps, begun: all steps, and those that are done. evaluated: after which steps there is
        an evaluation."""
        self.run = run
        self.pace = Pace(steps, evaluated)
        self.write_policy = write_policy
        self.tracker = tracker
        self.watch = Watch()
        hidden = RANK > 0 or steps == 0
        self.bar = tqdm(total=steps, initial=begun, disable=hidden, unit="step", dynamic_ncols=True)

    def begin(self, lengths: dict[str, int], config: dict) -> None:
        """Cuts the logs back to the lengths that they had at a checkpoint, and writes config.json.
        Called once, before anything is logged. Raises InputError on all ranks."""

        def work() -> None:
            for name in LOGS:
                cut_back(self.run / name, lengths.get(name, 0))
            write_json(self.run / "config.json", config)

        try:
            on_rank_0(work)
        except OSError as error:
            raise InputError(f"{self.run}: {error}") from error

    def lengths(self) -> dict[str, int]:
        """The size of each log in bytes, for a later `begin`."""
        return {name: size_of(self.run / name) for name in LOGS}

    def metrics(self, record: dict) -> None:
        self._append("metrics.jsonl", [record])
        if self.tracker:
            self.tracker.metrics(record)

    def samples(self, records: list[dict]) -> None:
        self._append("samples.jsonl", records)
        if self.tracker:
            self.tracker.samples(records)

    def say(self, line: str) -> None:
        if RANK > 0:
            return
        try:
            self.bar.write(line)
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads on: the run is in its files
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end

    def progress(self, step: int) -> tuple[str, str]:
        steps = self.pace.steps
        if not self.pace.seconds:
            return f"{step:{len(str(steps))}}/{steps}", ""
        return f"{step:{len(str(steps))}}/{steps}", self.pace.left(step)

    def step(self, step: int, groups: list[Group], metrics: dict) -> dict:
        self.pace.step()
        record = super().step(step, groups, metrics)
        joint, grad = f"{record['joint']:.2f}", f"{record['grad_norm']:.2f}"
        self.bar.set_postfix(joint=joint, grad=grad, refresh=False)
        self.bar.update()
        for warning in self.watch.step(groups, record):
            self.say(warning)
        return record

    def evaluation(
        self,
        step: int,
        scores: list[dict[str, float]],
        report: dict,
        full: dict[str, float] | None = None,
    ) -> None:
        self.pace.evaluation()
        super().evaluation(step, scores, report, full)
        if step == 0 and full:
            for warning in self.watch.evaluation(scores, full):
                self.say(warning)
        if self.write_policy:
            self.write_policy(self.run / "policies" / f"step-{step}")

    def _append(self, name: str, records: list[dict]) -> None:
        """Adds JSON lines to a log. Raises InputError on all ranks."""

        def append() -> None:
            with (self.run / name).open("a") as out:
                out.writelines(json.dumps(as_json(record)) + "\n" for record in records)

        try:
            on_rank_0(append)
        except OSError as error:
            raise InputError(f"{self.run / name} cannot be written: {error}") from error


def open_tracker(run: Path, config: dict, resumed: bool):
    """The tracker that --track names, on rank 0; None on the others, or if it names none. Called
    before the model is loaded. Raises InputError on all ranks."""

    def begin():
        from local.track import Tracker

        return Tracker(config["track"], run.name, config, resumed)

    return on_rank_0(begin) if config["track"] else None


# Records and lines


def sample_records(step: int, group: Group) -> Iterator[dict]:
    """A group's lines of samples.jsonl, one a response."""
    example = group.prompt.example
    names = [channel.name for channel in group.channels]
    if example.criteria:  # whose channels may share a name
        names = [f"{k} {criterion.text}" for k, criterion in enumerate(example.criteria, 1)]
    rewards, advantages = group.rewards.tolist(), group.advantages.tolist()
    for response, values, advantage in zip(group.responses, rewards, advantages, strict=True):
        yield {
            "step": step,
            "prompt": example.messages,
            "response": response.text,
            "finish": response.finish,
            "rewards": dict(zip(names, values, strict=True)),
            "advantage": advantage,
        }


def scores_of(name: str, rows: list[dict[str, float]]) -> list[float]:
    """The scores of that name that are not missing."""
    return [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]


# Files


def as_json(value):
    """The same value with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def cut_back(file: Path, size: int) -> None:
    """Leaves the first `size` bytes. Raises OSError if the file has fewer."""
    size_now = size_of(file)
    if size_now < size:
        raise OSError(
            f"{file.name} has {size_now} bytes, at the checkpoint it had {size}: "
            "it was changed since"
        )
    if size_now > size:
        os.truncate(file, size)
