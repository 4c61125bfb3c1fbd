"""Warns of rewards, and of a judge, from which nothing can be learned."""

import math

from rollout import Group

UNHIT = 3  # after this many steps, warn of a reward that was always the same and not full
CONSTANT = 10  # after this many steps, warn of one that was always full, and of a one-sided judge
ONE_SIDED = 0.02  # a judge is one-sided if at most this share of its answers differ from the rest


class Watch:
    """Sees the first evaluation and the first steps of a process. Returns warnings, each once."""

    def __init__(self):
        self.steps = 0  # seen so far
        self.yes = 0  # the judge's verdicts in these steps
        self.verdicts = 0
        self.extremes: dict[str, list[float]] = {}  # each channel's min and max of every step
        self.warned_of: set[str] = set()  # channels
        self.without_gradient = 0  # steps whose gradient was 0

    def evaluation(self, scores: list[dict], full: dict[str, float]) -> list[str]:
        """Of the evaluation before the run. scores: by channel, of each prompt. full: the value
        that satisfies a channel."""
        if len(scores) < 2:
            return []
        values = {}
        for name in full:
            # An item of a rubric that some prompts do not have says little: it has few values.
            if all(name in row for row in scores):
                values[name] = [row[name] for row in scores]
        return self._same(values, full, f"on all of the {len(scores)} held-out prompts")

    def step(self, groups: list[Group], record: dict) -> list[str]:
        """Of a step. record: its line of metrics.jsonl."""
        if self.steps == CONSTANT:
            return []
        self.steps += 1
        for name, stats in record["channels"].items():
            self.extremes.setdefault(name, []).extend([stats["min"], stats["max"]])
        self.without_gradient += record["grad_norm"] == 0
        judge = record.get("judge", {})
        self.yes += judge.get("yes", 0)
        self.verdicts += judge.get("verdicts", 0)

        warnings = []
        if self.steps == UNHIT == self.without_gradient:
            warnings.append(
                f"warning: the gradient was 0 in each of the first {UNHIT} steps, so nothing was "
                "learned: no reward varies within a group, or all responses were left out; read "
                "samples.jsonl (cut-off responses: raise --max-tokens)"
            )
        if self.steps in (UNHIT, CONSTANT):
            full = {channel.name: channel.full for group in groups for channel in group.channels}
            in_all_steps = [name for name in full if len(self.extremes[name]) == 2 * self.steps]
            values = {name: self.extremes[name] for name in in_all_steps}
            when = f"for every response of {self.steps} steps"
            warnings += self._same(values, full, when, even_full=self.steps == CONSTANT)
        if self.steps == CONSTANT:
            warnings += self._one_sided()
        return warnings

    def _same(
        self,
        values: dict[str, list[float]],
        full: dict[str, float],
        when: str,
        even_full: bool = False,
    ) -> list[str]:
        """A warning of each channel that had one value only, or none (NaN). even_full: also of one
        that was always full."""
        warnings = []
        for name, column in values.items():
            different = {value for value in column if not math.isnan(value)}
            if name in self.warned_of or len(different) > 1:
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
            self.warned_of.add(name)
            was = "missing" if math.isnan(value) else f"{value:g}"
            warnings.append(
                f"warning: reward '{name}' was {was} {when}: it teaches nothing{advice}"
            )
        return warnings

    def _one_sided(self) -> list[str]:
        if self.verdicts == 0 or ONE_SIDED < self.yes / self.verdicts < 1 - ONE_SIDED:
            return []
        return [
            f"warning: the judge said yes to {self.yes} of {self.verdicts} questions in "
            f"{CONSTANT} steps: it may not be grading at all, see docs/rubrics.md"
        ]
