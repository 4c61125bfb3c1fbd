"""The experiments' files."""

import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.toml"))


def read(name: str) -> dict:
    """experiments/NAME.toml. One that is `like` another has that one's tables, and those options in them, that it does
    not have itself; its models and methods are its own."""
    found = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    if "like" in found:
        base = read(found["like"])
        found = (
            base
            | found
            | {part: base[part] | found.get(part, {}) for part in ("train", "eval", "table")}
        )
    return found
