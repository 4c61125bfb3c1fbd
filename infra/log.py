"""What a run says while it trains: metrics.jsonl, samples.jsonl, the terminal, a tracker."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import rvpo
from infra.ranks import RANK, InputError, on_rank_0
from infra.run_directory import write_json
from rewards import satisfied
from rollout import Group

UNHIT = 3  # after as many steps a reward that was always the same, and not full, is pointed out
CONSTANT = 10  # after as many one that was always full, and a judge that has
ONE_SIDED = 0.02  # said yes, or no, to all questions but this share
LOGS = "metrics.jsonl", "samples.jsonl"


def has_signal(group: "Group") -> Tensor:
    """(G,) bool: the rollout has a reward with weight in a channel that is not constant in its group."""
    weights = torch.tensor([channel.weight for channel in group.channels])
    return rvpo.has_signal(group.rewards, weights)


def channel_stats(groups: "list[Group]", beta: float) -> dict[str, dict[str, float]]:
    """Diagnostics of a step's raw rewards by channel, the same for every aggregation; NaN where there are no data.
    Channels with one name are taken together.

    mean, std, min, max: over all rollouts. missing: share of NaN. constant: share of groups in which the channel does
    not vary. binding: share of rollouts in which the channel (one with this name) has the largest soft-min weight (ties
    are shared). weight: its (their summed) soft-min weight. The last two are over rollouts with signal.
    """
    values, constant, binding, weight = (
        {c.name: [] for group in groups for c in group.channels} for _ in range(4)
    )
    rollouts = 0  # with signal
    for group in groups:
        weights = torch.tensor([channel.weight for channel in group.channels])
        signal = has_signal(group)
        z = rvpo.zscore(group.rewards).requires_grad_()
        (shares,) = torch.autograd.grad(
            rvpo.soft_min(z, beta, weights).sum(), z
        )  # (G, K), each rollout's sum to 1
        largest = (shares == shares.amax(-1, keepdim=True)).to(shares)
        largest = largest / largest.sum(-1, keepdim=True)
        rollouts += signal.sum().item()
        for k, channel in enumerate(group.channels):
            values[channel.name].append(group.rewards[:, k])
            present = group.rewards[~group.rewards[:, k].isnan(), k]
            constant[channel.name] += (
                [float(present.amax() == present.amin())] if len(present) else []
            )
            binding[channel.name].append(largest[signal, k])
            weight[channel.name].append(shares[signal, k])
    stats = {}
    for name, columns in values.items():
        column = torch.cat(columns)
        present = column[~column.isnan()]
        stats[name] = {
            "mean": present.mean().item(),
            "min": present.min().item() if len(present) else math.nan,
            "max": present.max().item() if len(present) else math.nan,
            "std": present.std(correction=min(1, len(present) - 1)).item()
            if len(present)
            else math.nan,
            "missing": 1 - len(present) / len(column),
            "constant": sum(constant[name]) / len(constant[name]) if constant[name] else math.nan,
            "binding": torch.cat(binding[name]).sum().item() / rollouts if rollouts else math.nan,
            "weight": torch.cat(weight[name]).sum().item() / rollouts if rollouts else math.nan,
        }
    return stats


def credit(groups: "list[Group]") -> dict[str, float]:
    """{channel: correlation, within groups, of the advantages with its raw rewards}. Negative: this step's update works
    against it. A soft minimum of z-scores does so where too few of a group satisfy a channel against which others pull,
    see docs/sign.md. NaN where the channel never varies, or no advantage does."""
    pairs = {channel.name: [] for group in groups for channel in group.channels}
    for group in groups:
        for channel, values in zip(group.channels, group.rewards.T, strict=True):
            pair = torch.stack([values, group.advantages.to(values)])[:, ~values.isnan()]
            pairs[channel.name].append(pair - pair.mean(1, keepdim=True))
    out = {}
    for name, found in pairs.items():
        rewards, advantages = torch.cat(found, 1)
        size = (rewards.norm() * advantages.norm()).item()
        out[name] = (rewards @ advantages).item() / size if size > 1e-9 else math.nan
    return out


def shown(mean: float) -> str:
    return "missing" if math.isnan(mean) else f"{mean:.2f}"


def scored(name: str, scores: list[dict[str, float]]) -> list[float]:
    """The scores of that name that are not missing."""
    return [row[name] for row in scores if not math.isnan(row.get(name, math.nan))]


class Log:
    """What the loop says of a step. Whoever runs the loop elsewhere replaces the three that write."""

    def metrics(self, record: dict) -> None:
        raise NotImplementedError

    def samples(self, records: list[dict]) -> None:
        raise NotImplementedError

    def say(self, line: str) -> None:
        raise NotImplementedError

    def groups(self, step: int, groups: "list[Group]") -> None:
        """Every response of a step, its rewards and its advantage."""
        records = []
        for group in groups:
            example = group.prompt.example
            names = [f"{k} {c.text}" for k, c in enumerate(example.criteria, 1)] or [
                c.name for c in group.channels
            ]
            for response, rewards, advantage in zip(
                group.responses, group.rewards.tolist(), group.advantages.tolist(), strict=True
            ):
                records.append(
                    {
                        "step": step,
                        "prompt": example.messages,
                        "response": response.text,
                        "finish": response.finish,
                        "rewards": dict(zip(names, rewards, strict=True)),
                        "advantage": advantage,
                    }
                )
        self.samples(records)

    def evaluation(
        self,
        step: int,
        scores: list[dict[str, float]],
        report: dict,
        full: dict[str, float] | None = None,
    ) -> None:
        """Mean and standard error over prompts of every channel and of the joint rate (all channels
        satisfied), NaN if all are missing. scores: of each prompt, by name, NaN if missing. report:
        the judge's. full: the value that satisfies a channel, by its name."""
        result = {}
        for name in sorted(
            dict.fromkeys(name for row in scores for name in row), key=lambda name: name == "joint"
        ):
            x = scored(name, scores)
            error = np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
            result[name] = (np.mean(x) if x else math.nan), error
        self.metrics({"step": step, "eval": result, **({"judge": report} if report else {})})
        means = [f"{name} {shown(mean)}" for name, (mean, _) in result.items()]
        self.say(f"held out, {step} steps: {' '.join(means)}")

    def step(self, step: int, groups: "list[Group]", metrics: dict) -> None:
        """A step's metrics, with what can be said of its groups. metrics: with beta, and the seconds of its phases."""
        responses, seconds = (
            [response for group in groups for response in group.responses],
            metrics["seconds"],
        )
        lengths = [len(response.tokens) for response in responses]
        joint = np.concatenate(
            [satisfied(group.channels, group.rewards.numpy()) for group in groups]
        )
        advantages = torch.stack([group.advantages for group in groups])
        total = sum(seconds.values()) - seconds["save"]
        credits = credit(groups)
        metrics |= {
            "joint": torch.from_numpy(joint).nanmean().item(),
            "advantage_std": advantages.std().item(),
            "no_signal": 1
            - torch.cat([has_signal(group) for group in groups]).double().mean().item(),
            "truncated": np.mean([response.finish == "length" for response in responses]),
            "length_mean": np.mean(lengths),
            "length_max": max(lengths),
            "tokens_per_second": sum(lengths) / total,
            "channels": {
                name: {**stats, "credit": credits[name]}
                for name, stats in channel_stats(groups, metrics["beta"]).items()
            },
        }
        if judge := metrics.get("judge"):
            judge["share_of_step"] = judge["seconds"] / total
        self.metrics({"step": step, **metrics})
        self.say(
            f"step {step}: joint {shown(metrics['joint'])} | "
            + " ".join(
                f"{name} {shown(stats['mean'])}" for name, stats in metrics["channels"].items()
            )
            + "".join(f" | works against {name} ({x:.2f})" for name, x in credits.items() if x < 0)
            + f" | grad {metrics['grad_norm']:.2f} entropy {metrics['entropy']:.2f}"
            + f" length {np.mean(lengths):.0f} | "
            + " ".join(f"{phase} {t:.1f}s" for phase, t in seconds.items() if t >= 0.05)
            + (
                f" | judge {judge['requests']} requests {judge['seconds']:.1f}s, yes to "
                f"{judge['yes'] / max(1, judge['verdicts']):.0%}"
                if judge
                else ""
            )
        )
        if metrics["bad_updates"]:
            self.say(
                f"step {step}: a loss or gradient is not finite; updates left out: {metrics['bad_updates']}"
            )


def open_tracker(run: Path, config: dict, resumed: bool):
    """Of a run with --track, on rank 0, before the model is loaded; else None. Raises InputError on
    all ranks."""
    opened = []

    def begin() -> None:
        from local.track import Tracker

        opened.append(Tracker(config["track"], run.name, config, resumed))

    if config["track"]:
        on_rank_0(begin)
    return opened[0] if opened else None


class RunLog(Log):
    """Into runs/NAME/ and onto the terminal, from rank 0. All ranks must call it. steps, begun: of the progress bar.
    write_policy: writes the policy into a directory; each evaluation's is then kept, in runs/NAME/policies/step-N.
    tracker: what `open_tracker` returned."""

    def __init__(
        self,
        run: Path,
        steps: int = 0,
        begun: int = 0,
        write_policy: Callable | None = None,
        tracker=None,
    ):
        self.write_policy, self.tracker = write_policy, tracker
        self.run, self.bar = (
            run,
            tqdm(
                total=steps,
                initial=begun,
                disable=RANK > 0 or not steps,
                unit="step",
                dynamic_ncols=True,
            ),
        )
        # What `watch` has seen: steps of this process, the judge's verdicts, each channel's least
        # and largest value of each step. Then the channels that were pointed out.
        self.steps = self.yes = self.verdicts = 0
        self.extremes: dict[str, list[float]] = {}
        self.pointed_out: set[str] = set()

    def say(self, line: str) -> None:
        if RANK == 0:
            self.bar.write(line)

    def metrics(self, record: dict) -> None:
        self._write("metrics.jsonl", [record])
        if self.tracker:
            self.tracker.metrics(record)

    def samples(self, records: list[dict]) -> None:
        self._write("samples.jsonl", records)
        if self.tracker:
            self.tracker.samples(records)

    def _write(self, name: str, records: list[dict]) -> None:
        """Appends JSON lines. NaN and infinity, which are no JSON, become null. Raises InputError on all ranks."""

        def plain(value):
            if isinstance(value, dict):
                return {key: plain(x) for key, x in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(x) for x in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        def append() -> None:
            with (self.run / name).open("a") as out:
                out.writelines(json.dumps(plain(record)) + "\n" for record in records)

        try:
            on_rank_0(append)
        except OSError as error:
            raise InputError(f"{self.run / name} cannot be written: {error}") from error

    def evaluation(
        self,
        step: int,
        scores: list[dict[str, float]],
        report: dict,
        full: dict[str, float] | None = None,
    ) -> None:
        super().evaluation(step, scores, report, full)
        if step == 0 and full and len(scores) > 1:
            values = {name: [row.get(name) for row in scores] for name in full}
            # An item of a rubric is not in every prompt's: the rest say little of it.
            values = {name: found for name, found in values.items() if None not in found}
            self.point_out(values, full, f"on all of the {len(scores)} held-out prompts")
        if self.write_policy:
            self.write_policy(self.run / "policies" / f"step-{step}")

    def step(self, step: int, groups: "list[Group]", metrics: dict) -> None:
        super().step(step, groups, metrics)
        self.bar.set_postfix(
            joint=f"{metrics['joint']:.2f}", grad=f"{metrics['grad_norm']:.2f}", refresh=False
        )
        self.bar.update()
        if self.steps < CONSTANT:
            self.watch(groups, metrics)

    def watch(self, groups: "list[Group]", metrics: dict) -> None:
        """Warns of rewards, and of a judge, from which nothing can be learned."""
        self.steps += 1
        for name, stats in metrics["channels"].items():
            self.extremes.setdefault(name, []).extend([stats["min"], stats["max"]])
        judge = metrics.get("judge", {})
        self.yes += judge.get("yes", 0)
        self.verdicts += judge.get("verdicts", 0)
        if self.steps in (UNHIT, CONSTANT):
            full = {channel.name: channel.full for group in groups for channel in group.channels}
            in_all_steps = [name for name in full if len(self.extremes[name]) == 2 * self.steps]
            values = {name: self.extremes[name] for name in in_all_steps}
            when = f"for every response of {self.steps} steps"
            self.point_out(values, full, when, even_full=self.steps == CONSTANT)
        share = self.yes / max(1, self.verdicts)
        one_sided = self.verdicts > 0 and not ONE_SIDED < share < 1 - ONE_SIDED
        if self.steps == CONSTANT and one_sided:
            self.say(
                f"warning: the judge said yes to {self.yes} of {self.verdicts} questions in "
                f"{CONSTANT} steps: it may not be grading at all, see docs/rubrics.md"
            )

    def point_out(
        self,
        values: dict[str, list[float]],
        full: dict[str, float],
        when: str,
        even_full: bool = False,
    ) -> None:
        """Says, once, of each reward with only one value, or none, that it teaches nothing. values:
        of each, NaN if missing. even_full: also of one that was always full."""
        for name, found in values.items():
            different = {value for value in found if not math.isnan(value)}
            if name in self.pointed_out or len(different) > 1:
                continue
            value = max(different, default=math.nan)
            if math.isnan(value):
                advice = "; see why its function or its judge gives NaN"
            elif value < full[name] - 1e-6:
                advice = (
                    " until a response does better; show one in the prompt, pay for a part of "
                    "what it asks, or begin with an easier task"
                )
            elif even_full:
                advice = ""
            else:
                continue
            self.pointed_out.add(name)
            was = "missing" if math.isnan(value) else f"{value:g}"
            self.say(f"warning: reward '{name}' was {was} {when}: it teaches nothing{advice}")

    def begin(self, lengths: dict[str, int], config: dict) -> None:
        """Cuts the logs back to what they were at a checkpoint, and writes config.json. Raises InputError."""
        try:
            on_rank_0(lambda: self._truncate(lengths))
            on_rank_0(lambda: write_json(self.run / "config.json", config))
        except OSError as error:
            raise InputError(f"{self.run}: {error}") from error

    def lengths(self) -> dict[str, int]:
        """Bytes of the run's logs."""
        return {
            name: (self.run / name).stat().st_size if (self.run / name).exists() else 0
            for name in LOGS
        }

    def _truncate(self, lengths: dict[str, int]) -> None:
        for name in LOGS:
            file, size = self.run / name, lengths.get(name, 0)
            bytes_now = file.stat().st_size if file.exists() else 0
            if bytes_now < size:
                raise OSError(
                    f"{name} has {bytes_now} bytes, at the checkpoint it had {size}: it was changed since"
                )
            if bytes_now > size:
                os.truncate(file, size)
