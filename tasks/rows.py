"""Rows of data files: which of them train and which are held out, and reading them."""

import csv
import http.client
import io
import json
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from infra.ranks import InputError
from rewards import Example

FromRow = Callable[[dict, str], Example]  # of a row and where it is, for InputErrors


def prompts(config, public: str | None, from_row: FromRow) -> Callable:
    """A Task's `prompts`, from the files that the configuration names, or else the public data.

    public: a path with {split}, train or test. If there is only training data, its last n_test rows
    are held out. All others train, whatever n_train is, for the steps draw from all of them; with
    n_train 0 they are not read.
    """
    train_data = config.data if config.trains else None

    def load(n_train: int | None, n_test: int | None) -> tuple[list[Example], list[Example]]:
        if not public and not train_data and (n_train != 0 or not config.eval_data):
            needed = "--data" if config.trains else "--eval-data"
            raise InputError(
                f"--task {config.task} needs {needed} FILE, see docs/rubrics.md for its schema"
            )
        train_path = train_data or (public and public.format(split="train"))
        if train_data and not config.eval_data:
            examples = read(train_path, from_row)
            cut = max(0, len(examples) - n_test)
            train, held_out = examples[:cut], examples[cut:]
        else:
            test_path = config.eval_data or public.format(split="test")
            held_out = read(test_path, from_row)[:n_test]
            if not held_out and n_test != 0:
                raise InputError(f"{test_path} has no rows to evaluate on")
            train = read(train_path, from_row) if n_train != 0 else []
        if not train and n_train != 0:
            raise InputError(
                f"{train_path}: no rows are left for training after {len(held_out)} were held "
                "out; give more rows, or lower --eval-prompts"
            )
        return train, held_out

    return load


def only_evaluated(load: Callable[[int | None], list[Example]]) -> Callable:
    """A benchmark's `prompts`. load: n_test -> examples."""

    def held_out(n_train: int, n_test: int | None) -> tuple[list[Example], list[Example]]:
        return [], load(n_test)

    return held_out


def check_ids(ids: Sequence[str], path: str) -> None:
    """Raises InputError unless each row has an id of its own."""
    if len({*ids}) < len(ids):
        raise InputError(f"{path}: two rows have the same id, and results go by it")


def read(path: str, from_row: FromRow) -> list[Example]:
    """The prompts in a file, URL or hub path. Rows are counted from 0."""
    return [from_row(row, f"{path}: row {i}") for i, row in enumerate(read_rows(path))]


def read_rows(path: str) -> list[dict]:
    """The rows of a .parquet, .jsonl, .json (a list of objects) or .csv file.

    An URL, or a data set of the hub (hf://OWNER/NAME/SPLIT), is downloaded. Raises InputError.
    """
    rows = [row for content in _contents(path) for row in _parse(content, path)]
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {i} is no object")
    return rows


def _contents(path: str) -> list[bytes]:
    """What is in the file, or in each file of a split on the hub. Raises InputError."""
    import httpx

    try:
        if path.startswith("hf://"):
            return [file.read_bytes() for file in _hub_split(path)]
        if path.startswith(("http://", "https://")):
            with urllib.request.urlopen(path, timeout=60) as reply:
                return [reply.read()]
        return [Path(path).read_bytes()]
    except (OSError, ValueError, http.client.HTTPException, httpx.HTTPError) as error:
        if "://" in path:
            raise InputError(
                f"{path} could not be downloaded ({_reason(error)}): name a local copy with --data"
            ) from error
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error


def _hub_split(path: str) -> list[Path]:
    """The parquet files of hf://OWNER/NAME/SPLIT.

    They are in a branch into which the hub converts every data set.
    """
    from huggingface_hub import snapshot_download

    owner, name, split = path.removeprefix("hf://").split("/")
    pattern = f"*/{split}/*.parquet"
    folder = snapshot_download(
        f"{owner}/{name}",
        repo_type="dataset",
        revision="refs/convert/parquet",
        allow_patterns=pattern,
    )
    files = sorted(Path(folder).glob(pattern), key=str)
    if not files:
        raise OSError(f"the data set has no split '{split}'")
    return files


def _parse(content: bytes, path: str) -> list:
    """Raises InputError."""
    import pyarrow.parquet

    where = path
    try:
        if content[:4] == b"PAR1":
            return _without_none(pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist())
        text = content.decode("utf-8-sig")
        if _is_csv(text, path):
            return list(csv.DictReader(io.StringIO(text), strict=True))
        if text.lstrip().startswith("["):
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{path}, line {number}"
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except (OSError, ValueError, RecursionError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(
            f"{where} cannot be read as parquet, JSON (a list), JSONL or CSV: {_reason(error)}"
        ) from error


def _is_csv(text: str, path: str) -> bool:
    """By the name, an URL's query aside; by the first line where the name does not tell."""
    name = urllib.parse.urlsplit(path).path if "://" in path else path
    suffix = Path(name).suffix.lower()
    if suffix in (".csv", ".json", ".jsonl", ".parquet"):
        return suffix == ".csv"
    first, _, _ = text.lstrip().partition("\n")
    return "," in first and not first.startswith(("{", "["))


def _without_none(value: object) -> object:
    """Without the keys that an object has in a parquet file only because others have them."""
    if isinstance(value, dict):
        return {name: _without_none(x) for name, x in value.items() if x is not None}
    if isinstance(value, list):
        return [_without_none(x) for x in value]
    return value


def _reason(error: Exception) -> str:
    """Its first line."""
    first, *_ = (str(error).strip() or type(error).__name__).splitlines()
    return first
