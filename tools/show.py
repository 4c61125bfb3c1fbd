"""The best and the worst of what a run sampled, in a terminal.

    python tools/show.py runs/A [runs/B] [--step N] [--fails CHANNEL]

Of the last step, or of step N, it shows the prompt of the best response and that of the worst, and
each run's best and worst response to it. Best is the highest advantage; in an evaluation, which has
none, the highest mean of the rewards. --fails: only responses that do not satisfy the channel.

Each reward stands in brackets: [+ satisfied], [- not], [? missing]. tools/report.py shows all
responses in a browser.
"""

import argparse
import shutil
import signal
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

from infra.ranks import InputError, run_program
from tools import runs
from tools.runs import Batch, Group, Response, Run

BEGINNING = 700  # characters of a longer text that are shown
END = 200
UNBROKEN = "\xa0"  # a space at which no line ends
JOINERS = "\u200c\u200d"  # they have no shape, and letters and emoji need them


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs or evaluations")
    parser.add_argument("--step", type=int, help="(default: the last one)")
    parser.add_argument("--fails", metavar="CHANNEL", help="a reward that is not satisfied")
    args = parser.parse_args(argv)
    compared = [runs.read(path) for path in args.runs]
    print(show(compared, args.step, args.fails))


def show(compared: list[Run], step: int | None = None, fails: str | None = None) -> str:
    """What is printed. Raises InputError."""
    batches = [choose_batch(run, step) for run in compared]
    sampled = []  # by each run: (the run, its groups)
    headings = []
    for run, batch in zip(compared, batches, strict=True):
        groups = runs.groups_of(run, batch)
        if fails:
            groups = failing(run, groups, channel_named(fails, groups))
        sampled.append((run, groups))
        what = counted(sum(len(group.responses) for group in groups), "response")
        if fails:
            what += f" that fail {fails}"
        headings.append(f"{run.path} ({run.method()}), {batch.label()}: {what}")
    blocks = [of_prompt(prompt, sampled) for prompt in notable(sampled)]
    return "\n\n".join(["\n".join(headings), *blocks])


def choose_batch(run: Run, step: int | None) -> Batch:
    """Raises InputError if there is none."""
    if not run.batches:
        raise InputError(f"{run.path} has no samples: its samples.jsonl is empty, or not there")
    if step is None:
        return run.batches[-1]
    for batch in run.batches:
        if batch.step == step:
            return batch
    first, *_ = run.batches
    *_, last = run.batches
    ends = dict.fromkeys([first.label(), last.label()])
    raise InputError(f"--step {step}: {run.path} has the samples of {' to '.join(ends)}")


def channel_named(text: str, groups: list[Group]) -> str:
    """The reward that --fails names; part of a name is enough if no other has it.

    Raises InputError."""
    rewards = [response.rewards for group in groups for response in group.responses]
    names = list(dict.fromkeys(name for values in rewards for name in values))
    if text in names:
        return text
    found = [name for name in names if text.lower() in name.lower()]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(repr(name) for name in found or names)
    raise InputError(f"--fails {text}: name one reward of these: {listed}")


def failing(run: Run, groups: list[Group], channel: str) -> list[Group]:
    """The same groups, with the responses that have the reward and do not satisfy it."""
    kept = []
    for group in groups:
        responses = []
        for response in group.responses:
            value = response.rewards.get(channel)
            if value is not None and not run.channel(channel).is_satisfied(value):
                responses.append(response)
        if responses:
            kept.append(group._replace(responses=responses))
    return kept


Sampled = list[tuple[Run, list[Group]]]


def notable(sampled: Sampled) -> list[Group]:
    """The prompts of the first run's best and worst response; of the next run's if it has none."""
    for _, groups in sampled:
        if groups:
            best = max(groups, key=lambda group: max(map(Response.worth, group.responses)))
            worst = min(groups, key=lambda group: min(map(Response.worth, group.responses)))
            return [best] if best is worst else [best, worst]
    return []


def of_prompt(prompt: Group, sampled: Sampled) -> str:
    """A prompt, and each run's best and worst response to it. prompt: a group that has it."""
    width = min(100, shutil.get_terminal_size().columns)
    asked = [message for message in prompt.prompt if message["role"] != "assistant"]
    parts = ["-" * width]
    if prompt.title:
        parts.append(printable(prompt.title))
    if asked:
        *_, last = asked
        parts.append(wrapped(f"{last['role']}: {last['content']}", width, ""))
    else:
        parts.append("the prompt was not written down")
    for run, groups in sampled:
        for group in groups:
            if (group.prompt, group.title) == (prompt.prompt, prompt.title):
                parts += of_group(run, group, width)
                break
    return "\n".join(parts)


def of_group(run: Run, group: Group, width: int) -> list[str]:
    best = max(group.responses, key=Response.worth)
    worst = min(group.responses, key=Response.worth)
    if best is worst:
        return [of_response(run, best, "", width)]
    return [of_response(run, best, ", best", width), of_response(run, worst, ", worst", width)]


def of_response(run: Run, response: Response, place: str, width: int) -> str:
    """What it is, its text, and its rewards."""
    heading = f"\n{run.path.name} ({run.method()}){place}"
    if response.advantage is not None:
        heading += f": advantage {response.advantage:+.2f}"
    heading += f", {counted(len(response.text.split()), 'word')}"
    if response.finish == "length":
        heading += ", truncated"
    return "\n".join(
        [heading, wrapped(response.text, width, "  "), chips(run, response.rewards, width)]
    )


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def chips(run: Run, rewards: dict[str, float | None], width: int) -> str:
    """Lines of rewards in brackets, each unbroken unless it is a long criterion."""
    shown = []
    for name, value in rewards.items():
        text = chip(run, name, value)
        shown.append(text.replace(" ", UNBROKEN) if len(text) <= 30 else text)
    return fill(" ".join(shown), width, "  ").replace(UNBROKEN, " ")


def chip(run: Run, name: str, value: float | None) -> str:
    """Such as [+ short 1]."""
    if value is None:
        return f"[? {printable(name)}]"
    sign = "+" if run.channel(name).is_satisfied(value) else "-"
    return f"[{sign} {printable(name)} {round(value, 2):g}]"


def wrapped(text: str, width: int, indent: str) -> str:
    """Lines that fit. Of a long text the beginning and the end."""
    if len(text) > BEGINNING + 2 * END:
        left_out = len(text) - BEGINNING - END
        text = f"{text[:BEGINNING]} [... {left_out} characters ...] {text[-END:]}"
    return "\n".join(fill(line, width, indent) for line in printable(text).split("\n"))


def fill(line: str, width: int, indent: str) -> str:
    return textwrap.fill(
        line, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def printable(text: str) -> str:
    """Characters that would steer the terminal, or that have no shape, as their escapes."""
    shown = []
    for letter in text:
        if letter.isprintable() or letter in "\n" + JOINERS:
            shown.append(letter)
        else:
            shown.append(" " if letter == "\t" else ascii(letter).strip("'"))
    return "".join(shown)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that is closed ends this program
    run_program(main, sys.argv[1:])
