"""Read rows from files, folders, the hub or memory, each with its location: file and line, or row number."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from reward_model.rows import BadRow, Row

LocatedRow = tuple[str, Row | BadRow]
"""(Location, row); a `BadRow` if the row cannot be read."""


class DataError(ValueError):
    """A source that cannot be read; the message has reason and remedy."""


def read_rows(source: str | Dataset, *, split: str = "train") -> Iterator[LocatedRow]:
    """Read the rows of `source`, in order.

    Args:
        source: A .jsonl, .json, .csv, .tsv or .parquet file, a folder (saved by `save_to_disk` or holding such files),
            a hub name, or a `datasets.Dataset`.
        split: Split of a folder or hub dataset.

    Raises:
        DataError: The source is missing, empty, or of no known kind.
    """
    if isinstance(source, Dataset):
        yield from _dataset_rows(source, "row")
        return
    path = Path(source)
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if path.suffix in readers:
        if not path.is_file():
            raise DataError(f"There is no file {source}. Check the path; relative ones start at {Path.cwd().name}/.")
        yield from _not_empty(readers[path.suffix](path), source)
    elif path.is_file():
        raise DataError(f"{source}: unknown kind of file {path.suffix!r}. Expected one of {sorted(readers)}.")
    else:
        yield from _not_empty(_dataset_rows(_load(source, split), f"{source} [{split}] row"), source)


def _load(source: str, split: str) -> Dataset:
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            data = load_from_disk(source)
        else:
            data = load_dataset(source, split=split)
    except Exception as error:  # datasets raises many types, from pyarrow's to the hub's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"The data {source!r} (split {split!r}) could not be loaded: {reason} Expected a file, a folder, or a hub "
            "name within reach."
        ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise DataError(f"{source} has no split {split!r}, only {sorted(data)}. Choose one of them with --split.")
        return data[split]
    return data


def _dataset_rows(data: Iterable[Any], location: str) -> Iterator[LocatedRow]:
    for number, row in enumerate(data):
        yield f"{location} {number}", row


def _not_empty(rows: Iterator[LocatedRow], source: str) -> Iterator[LocatedRow]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source} holds no rows.")


def _lines(path: Path) -> Iterator[tuple[str, str | BadRow]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            try:
                yield where, line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield where, BadRow(f"{where}: not UTF-8 text ({error.reason}): is the file binary or compressed?")


def _jsonl_rows(path: Path) -> Iterator[LocatedRow]:
    for where, line in _lines(path):
        if isinstance(line, BadRow):
            yield where, line
        elif line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                yield where, BadRow(f"{where}: not a JSON object ({error}): the line is cut off or malformed.")


def _json_rows(path: Path) -> Iterator[LocatedRow]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 text ({error.reason}): is the file binary or compressed?") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}: not valid JSON ({error}). One object per line belongs in a file that ends in .jsonl."
        ) from error
    if not isinstance(content, list):
        raise DataError(f"{path.name} must hold a JSON list of objects, got {type(content).__name__}.")
    yield from _dataset_rows(content, f"{path.name} item")


def _csv_rows(path: Path) -> Iterator[LocatedRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            for row in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in row or None in row.values():
                    yield where, BadRow(f"{where}: the line has more or fewer fields than the header names.")
                else:
                    yield where, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 text ({error.reason}): is the file binary or compressed?") from error
    except csv.Error as error:
        raise DataError(f"{path.name}: not a table of comma-separated values ({error}).") from error


def _parquet_rows(path: Path) -> Iterator[LocatedRow]:
    try:
        data = Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow's errors have no common base that datasets keeps
        raise DataError(f"{path.name} cannot be read as Parquet: {str(error).strip().splitlines()[0]}") from error
    yield from _dataset_rows(data, f"{path.name} row")
