"""The experiments' files, which have one table for each kind of option."""

import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.toml"))


def read(name: str) -> dict:
    """experiments/NAME.toml.

    One that is `like` another takes from it the tables that it lacks, and the options that its
    tables `train`, `eval` and `table` lack.
    """
    experiment = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    if "like" not in experiment:
        return experiment
    base = read(experiment["like"])
    merged = base | experiment
    for part in ("train", "eval", "table"):
        merged[part] = base[part] | experiment.get(part, {})
    return merged
