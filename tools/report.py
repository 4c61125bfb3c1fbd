"""From one run or several to one HTML file: what they are, their curves, and their samples.

    python tools/report.py runs/A [runs/B ...] --out report.html

Runs are those of train.py, or of eval.py. The file needs no server and no network. What a model
wrote is data in it: it cannot run as a script. Of long runs the file has the samples of some steps,
and says of which. tools/show.py shows samples in a terminal.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

from infra.ranks import InputError, run_program
from tools import runs
from tools.runs import Batch, Group, Run
from tools.style import COLORS

TEMPLATE = Path(__file__).with_suffix(".html")
LIMIT = 25_000_000  # bytes that samples may take
CREDIT = (-1.0, 1.0)  # ranges of a panel's values
SHARE = (0.0, 1.0)
OF_STEPS = {  # panels beside the channels: what is logged, its title and its range
    "joint": ("all rewards satisfied (joint)", SHARE),
    "length_mean": ("mean length, tokens", None),
    "truncated": ("share that is truncated", SHARE),
    "grad_norm": ("norm of the gradient", None),
    "entropy": ("entropy", None),
    "no_signal": ("share without signal", SHARE),
}
OF_CHANNELS = {
    "mean": ("mean", SHARE),
    "credit": ("credit; below 0 the step worked against it", CREDIT),
    "binding": ("how often it binds", SHARE),
    "missing": ("share that is missing", SHARE),
}
UNCOMPARED = "name", "versions"  # options that are shown elsewhere, or differ always


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs or evaluations")
    parser.add_argument("--out", type=Path, default="report.html", help="(default %(default)s)")
    args = parser.parse_args(argv)
    print(write([runs.read(path) for path in args.runs], args.out))


def write(compared: list[Run], out: Path) -> str:
    """Writes the report. Returns a line that names it. Raises InputError."""
    content = page(compared)
    try:
        out.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}): name another file with --out"
        ) from error
    return f"{out}: {len(content) / 1e6:.1f} MB; open it in a browser"


def page(compared: list[Run]) -> bytes:
    """The HTML: the template with all that it shows, as JSON."""
    batches = choose_batches(compared)
    blocks, notes = samples_of(compared, batches)
    names = names_of(compared)
    data = {
        "title": ", ".join(names),
        "subtitle": f"{len(names)} runs side by side" if len(names) > 1 else "one run",
        "notes": notes_on(compared, names) + notes,
        "runs": about(compared, names),
        "facts": facts(compared),
        "results": results(compared, names),
        "options": same_options(compared),
        "panels": sections(compared),
        "batches": [{"label": batch.label(), "step": batch.step} for batch in batches],
        "footer": f"Made by tools/report.py on {time.strftime('%Y-%m-%d')}.",
    }
    scripts = [embed("data", data)]
    scripts += [embed(f"samples-{name}", groups) for name, groups in blocks.items()]
    template = TEMPLATE.read_text(encoding="utf-8")
    _, _, script = template.partition("<script>")
    script, _, _ = script.partition("</script>")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = template.replace("SCRIPT_HASH", digest)
    before, _, after = template.partition("<!-- DATA -->")
    return b"\n".join([before.encode(), *scripts, after.encode()])


def embed(name: str, data: object) -> bytes:
    """Data as a script element that is no script. No text in it can end the element.

    Lone surrogates, which UTF-8 does not know, become the escapes that JSON has for them.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    element = f'<script type="application/json" id="{name}">{text}</script>'
    return element.encode("utf-8", "backslashreplace")


# Samples


def choose_batches(compared: list[Run]) -> list[Batch]:
    """Of all runs, in their order: one for each step and each evaluation that has room."""
    found = {}
    sizes = {}
    for run in compared:
        for batch in run.batches:
            found.setdefault(batch.when(), batch)
            sizes[batch.when()] = sizes.get(batch.when(), 0) + batch.size
    order = sorted(found, key=in_time)
    every = interval([sizes[when] for when in order])
    return [found[when] for when in order[::-1][::every][::-1]]


def samples_of(
    compared: list[Run], batches: list[Batch]
) -> tuple[dict[str, list[dict]], list[str]]:
    """The groups of the batches, by "RUN-BATCH", and what to say of those that are left out."""
    places = {batch.when(): place for place, batch in enumerate(batches)}
    every = [batch for run in compared for batch in run.batches]
    chosen = [batch for batch in every if batch.when() in places]
    notes = []
    if len(chosen) < len(every):
        notes.append(
            f"This page has the samples of {len(batches)} of {len({b.when() for b in every})} "
            f"steps, because all would take {bytes_of(every) / 1e6:.0f} MB. To see another "
            "step: python tools/show.py runs/NAME --step N"
        )
    room = LIMIT // len(compared) if bytes_of(chosen) > LIMIT else LIMIT
    blocks = {}
    for number, run in enumerate(compared):
        for batch in run.batches:
            if batch.when() not in places:
                continue
            groups = [packed(group) for group in runs.groups_of(run, batch)]
            kept = groups[: fitting(groups, room)]
            if len(kept) < len(groups):
                notes.append(
                    f"Of {run.path}, {batch.label()}, the first {len(kept)} of {len(groups)} "
                    "prompts are in this page."
                )
            blocks[f"{number}-{places[batch.when()]}"] = kept
    return blocks, notes


def in_time(when: tuple[str, int | None]) -> tuple[bool, int]:
    """Steps stand before evaluations, each in their order."""
    kind, step = when
    return kind == "evaluation", -1 if step is None else step


def bytes_of(batches: list[Batch]) -> int:
    return sum(batch.size for batch in batches)


def interval(sizes: list[int]) -> int:
    """1 if all batches have room, 2 if every second one has, counted from the last, and so on."""
    every = 1
    while every < len(sizes) and sum(sizes[::-1][::every]) > LIMIT:
        every += 1
    return every


def fitting(groups: list[dict], room: int) -> int:
    """How many of the first groups have room, in bytes; one at least."""
    for count, group in enumerate(groups):
        room -= len(json.dumps(group))
        if room < 0:
            return max(1, count)
    return len(groups)


def packed(group: Group) -> dict:
    """As the page takes it: values by the place of their name."""
    criteria = runs.criteria_of(group)
    names = dict.fromkeys(name for response in group.responses for name in response.rewards)
    names = [name for name in names if name not in criteria]
    responses = []
    for text, finish, rewards, advantage in group.responses:
        responses.append(
            {
                "text": text,
                "finish": finish,
                "advantage": advantage,
                "values": [rewards.get(name) for name in names],
                "verdicts": [rewards.get(name) for name in criteria],
            }
        )
    texts = [name.partition(" ")[2] for name in criteria]
    return {**group._asdict(), "names": names, "criteria": texts, "responses": responses}


# What the runs are


def about(compared: list[Run], names: list[str]) -> list[dict]:
    """What is said of a run wherever it appears."""
    told = []
    others = short_names(compared, names), colors_of(compared)
    for run, name, short, color in zip(compared, names, *others, strict=True):
        channels = {channel: fields._asdict() for channel, fields in run.channels.items()}
        told.append(
            {
                "name": name,
                "short": short,
                "method": run.method(),
                "color": color,
                "best": run.best(),
                "channels": channels,
            }
        )
    return told


def names_of(compared: list[Run]) -> list[str]:
    """Names of directories; whole paths if two directories have one name."""
    names = [run.path.resolve().name for run in compared]
    return names if len({*names}) == len(names) else [str(run.path) for run in compared]


def short_names(compared: list[Run], names: list[str]) -> list[str]:
    """What stands at the ends of lines: the methods, if they differ and are short."""
    methods = [run.method() for run in compared]
    if len({*methods}) == len(methods) and max(map(len, methods)) <= 12:
        return methods
    return [name if len(name) <= 12 else f"{name[:11]}…" for name in names]


def colors_of(compared: list[Run]) -> list[str]:
    """Each run's method has the colour of the figures; a second run of a method another one."""
    colors = []
    for run in compared:
        own = COLORS.get(str(run.options.get("agg")))
        free = [color for color in (own, *COLORS.values()) if color and color not in colors]
        colors.append(free[0] if free else "#888888")
    return colors


def notes_on(compared: list[Run], names: list[str]) -> list[str]:
    """What a reader has to know of a run before its numbers."""
    notes = []
    silent = []  # runs that do not say which value satisfies a reward
    for run, name in zip(compared, names, strict=True):
        if run.trains() and steps_done(run) < run.options.get("steps", 0):
            notes.append(f"{name} was stopped, or is still running, after {steps_of(run)} steps.")
        if not any(line["eval"] for line in run.evals):
            notes.append(f"{name} has no evaluation: there are no points, and no best policy.")
        bad = [line for line in run.steps if line.get("bad_updates")]
        if bad:
            notes.append(
                f"{name}: in {len(bad)} of its steps a loss or gradient was not finite, and "
                "updates were left out."
            )
        if not run.channels and not run.options.get("judge_model"):
            silent.append(name)
    if silent:
        notes.append(
            f"1 is taken to satisfy a reward, because nothing else is written down: "
            f"{', '.join(silent)}."
        )
    return notes


def steps_done(run: Run) -> int:
    return run.steps[-1]["step"] if run.steps else 0


def steps_of(run: Run) -> str:
    """Such as "9 of 14"."""
    if not run.trains():
        return ""
    return f"{steps_done(run)} of {run.options.get('steps', '?')}"


def facts(compared: list[Run]) -> list[list[str]]:
    """Rows of the first table: a name, and a cell a run; then the options that differ."""
    tellers = {
        "method": Run.method,
        "model": model_of,
        "task": task_of,
        "steps": steps_of,
        "a step": batch_of,
        "time": time_of,
        "machine": machine_of,
        "software": software_of,
    }
    rows = [[name, *map(tell, compared)] for name, tell in tellers.items()]
    rows = [row for row in rows if any(row[1:])]
    told = {"agg", "beta", "model", "task", "steps", "prompts", "group", "device", "world_size"}
    for option in options_of(compared):
        cells = [shown(run, option) for run in compared]
        if len({*cells} - {""}) > 1 and option not in told:
            rows.append([option, *cells])
    return rows


def same_options(compared: list[Run]) -> list[list[str]]:
    """Options that do not differ between the runs that have them."""
    rows = []
    for option in options_of(compared):
        values = {shown(run, option) for run in compared} - {""}
        if len(values) == 1:
            rows.append([option, *values])
    return rows


def options_of(compared: list[Run]) -> list[str]:
    names = dict.fromkeys(name for run in compared for name in run.options)
    return [name for name in names if name not in UNCOMPARED]


def shown(run: Run, option: str) -> str:
    """Nothing if the run has no such option; of a hash the beginning."""
    if option not in run.options:
        return ""
    value = run.options[option]
    text = "–" if value is None else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text


def model_of(run: Run) -> str:
    return shown(run, "model")


def task_of(run: Run) -> str:
    return shown(run, "task")


def batch_of(run: Run) -> str:
    if not run.trains():
        return ""
    options = run.options
    return f"{options.get('prompts', '?')} prompts, {options.get('group', '?')} responses to each"


def time_of(run: Run) -> str:
    """Of all steps, and where it went."""
    phases = {}
    for line in run.steps:
        for phase, seconds in line.get("seconds", {}).items():
            phases[phase] = phases.get(phase, 0) + seconds
    total = sum(phases.values())
    if not total:
        return ""
    shares = [f"{phase} {t / total:.0%}" for phase, t in phases.items() if t >= 0.01 * total]
    return f"{duration(total)}, {total / len(run.steps):.1f} s a step: {', '.join(shares)}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def machine_of(run: Run) -> str:
    device = run.options.get("device", "")
    processes = run.options.get("world_size", 1)
    return f"{device}, {processes} processes" if device and processes > 1 else device


def software_of(run: Run) -> str:
    versions = run.options.get("versions") or {}
    named = [f"{name} {version}" for name, version in versions.items() if name != "git"]
    commit = versions.get("git")
    return ", ".join([*named, f"commit {commit[:8]}"] if commit else named)


def results(compared: list[Run], names: list[str]) -> dict:
    """A table of held-out metrics: of each run the first, the best and the final evaluation."""
    head = [""]
    columns = []
    for run, name in zip(compared, names, strict=True):
        for step, labels in told_evaluations(run).items():
            when = "" if step is None else f", {step} steps"
            head.append(f"{name}: {' and '.join(labels)}{when}" if labels else name)
            columns.append(next(line["eval"] for line in run.evals if line["step"] == step))
    metrics = dict.fromkeys(metric for column in columns for metric in column)
    rows = []
    for metric in metrics:
        rows.append([metric, *(cell(column.get(metric)) for column in columns)])
    return {"about": "mean ± standard error", "head": head, "rows": rows}


def told_evaluations(run: Run) -> dict[int | None, list[str]]:
    """{step of an evaluation: what it is}."""
    points = run.points(run.metric)
    if not points:
        return {}
    (first, _, _), *_ = points
    *_, (final, _, _) = points
    if first is None:  # the only one
        return {None: []}
    told = {first: ["first"]}
    told.setdefault(run.best(), []).append("best")
    told.setdefault(final, []).append("final")
    return dict(sorted(told.items()))


def cell(result: Iterable[float | None] | None) -> str:
    mean, error = result or (None, None)
    if mean is None:
        return "–"
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


# Curves


def sections(compared: list[Run]) -> list[dict]:
    """Rows of panels: what is logged of a step, then of each channel, then of benchmarks."""
    made = [section("Of each step", "", "", OF_STEPS, compared)]
    channels = dict.fromkeys(
        name for run in compared for line in run.steps for name in line.get("channels", {})
    )
    for channel in channels:
        made.append(section(channel, help_on(channel, compared), channel, OF_CHANNELS, compared))
    metrics = dict.fromkeys(name for run in compared for line in run.evals for name in line["eval"])
    others = {name: (name, SHARE) for name in metrics if name not in {"joint", *channels}}
    made.append(section("Of each evaluation", "", "", others, compared))
    return [row for row in made if row["panels"]]


def help_on(channel: str, compared: list[Run]) -> str:
    """What a channel pays for, in the words of the first run that wrote it down."""
    for run in compared:
        if channel in run.channels:
            told = run.channels[channel]
            satisfied = f"satisfied from {told.full:.3g}"
            return f"{told.help}; {satisfied}" if told.help else satisfied
    return ""


def section(title: str, help: str, channel: str, drawn: dict, compared: list[Run]) -> dict:
    """A row of panels. drawn: {what is logged: (its title, its range)}; of a channel, if named."""
    made = []
    for key, (name, limits) in drawn.items():
        lines, dots = [], []
        metric = channel if key == "mean" else "" if channel else key
        for number, run in enumerate(compared):
            if curve := curve_of(run, channel, key):
                lines.append({"run": number, "points": curve})
            points = [point for point in run.points(metric) if point[0] is not None]
            if points:
                dots.append({"run": number, "points": points})
        never = key == "missing" and not any(value for line in lines for _, value in line["points"])
        if (lines or dots) and not never:
            made.append(
                {
                    "title": name,
                    "range": limits,
                    "credit": key == "credit",
                    "lines": lines,
                    "dots": dots,
                }
            )
    return {"title": title, "help": help, "panels": made}


def curve_of(run: Run, channel: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of each step whose log has it: of a channel, or of the step itself."""
    curve = []
    for line in run.steps:
        logged = line.get("channels", {}).get(channel, {}) if channel else line
        if logged.get(key) is not None:
            curve.append((line["step"], logged[key]))
    return curve


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
