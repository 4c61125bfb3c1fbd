"""The built-in tasks, a file each, and how a task is found by its name.

What a task is: rewards.Task.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

from infra.ranks import InputError
from rewards import Example, Task, check_example, users_code

# --task: the file of each here.
FILES = {
    "tools": "tools",
    "reply": "reply",
    "reply-25": "reply",
    "reply-capped": "reply",
    "rlla": "rlla",
    "rar-medicine": "rubrics",
    "rar-science": "rubrics",
    "rubric": "rubrics",
    "healthbench": "healthbench",
    "gpqa": "gpqa",
    "bfcl": "bfcl",
}
ABOUT = {
    "tools": "choose a tool and its arguments; prompts are made up, nothing is downloaded",
    "reply": "answer a customer in 35 words; made up, too: the demo's",
    "reply-25": "the same in 25 words",
    "reply-capped": "the same in 35 words, with capped rewards",
    "rlla": "tool calling with ToolRL's data and rewards",
    "rar-medicine": "Rubrics as Rewards, medicine; a judge",
    "rar-science": "Rubrics as Rewards, science; a judge",
    "rubric": "rubrics of your own (--data FILE.jsonl); a judge",
    "healthbench": "HealthBench; a judge",
    "gpqa": "GPQA-Diamond, four times",
    "bfcl": "BFCL v3, single turn",
}
BENCHMARKS = "healthbench", "gpqa", "bfcl"  # eval.py only


def task_module(name: str):
    """The module of a --task: of one in tasks/, or of a file of the user's. Raises InputError."""
    if name in FILES:
        return importlib.import_module(f"tasks.{FILES[name]}")
    path = Path(name)
    if path.suffix != ".py":
        raise InputError(
            f"--task {name}: choose one of {', '.join(FILES)}, or name a file such as mine.py"
        )
    if not path.is_file():
        raise InputError(f"--task {name}: there is no such file")
    # A name that no other module has, for the file may be called json.py or rewards.py.
    module_name = "rvpo_task_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look for theirs there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"--task {name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def load_task(config) -> Task:
    """The task that --task names, made for this configuration. Raises InputError."""
    if config.trains and config.task in BENCHMARKS:
        raise InputError(
            f"--task {config.task}: a benchmark is not for training; use eval.py --task "
            f"{config.task}, and train on another task"
        )
    make = getattr(task_module(config.task), "task", None)
    with users_code(f"--task {config.task}: task(config)"):
        task = make(config) if make else None
    if not isinstance(task, Task):
        raise InputError(
            f"--task {config.task}: its function `task(config)` must return a rewards.Task"
        )
    if config.trains and config.weights:
        task.weigh(config.weights)
    return task


def load_prompts(
    task: Task, name: str, n_train: int, n_test: int | None
) -> tuple[list[Example], list[Example]]:
    """What the task trains on and holds out, checked. name: its --task. Raises InputError."""
    call = f"--task {name}: prompts({n_train}, {n_test})"
    with users_code(call):
        made = task.prompts(n_train, n_test)
    two = isinstance(made, (list, tuple)) and len(made) == 2
    # One list of two examples has length 2, too.
    if not two or isinstance(made[0], Example):
        raise InputError(f"{call} must return two lists, of training and of held-out examples")
    train, held_out = made
    return _checked(train, name, call, "training"), _checked(held_out, name, call, "held-out")


def _checked(examples: object, name: str, call: str, part: str) -> list[Example]:
    if not isinstance(examples, (list, tuple)):
        raise InputError(
            f"{call}: the {part} examples must be a list of rewards.Example, and "
            f"not a {type(examples).__name__}"
        )
    where = f"--task {name}: {part} example"
    return [check_example(example, f"{where} {i}") for i, example in enumerate(examples)]
