"""Read rows from files, folders, the hub or memory, each with its location."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.table import pa as pyarrow

from reward_model.data.files import DataError, data_suffix, encoding_problem, open_text
from reward_model.data.rows import BadRow, ClassNumber, Row
from reward_model.data.tables import table_rows

__all__ = ["DataError", "LocatedRow", "prompt_lines", "read_rows"]

LocatedRow = tuple[str, Row | BadRow]
"""(Location, row); a `BadRow` if the row cannot be read."""
_SPLITS = {
    "train": "train|training", "test": "test|testing|eval|evaluation", "validation": "validation|valid|val|dev",
}  # fmt: skip


def read_rows(
    source: str | Dataset | Sequence[str], *, split: str = "train", encoding: str | None = None
) -> Iterator[LocatedRow]:
    """Read the rows of `source`, in order.

    Args:
        source: A .jsonl, .json, .csv, .tsv or .parquet file (also compressed: .gz, .zst, .bz2, .xz), a folder (saved by
            `save_to_disk` or holding such files), a hub name, a `datasets.Dataset`, or several names.
        split: Split of a folder or hub dataset.
        encoding: Encoding of text files; None: what a byte order mark says, or UTF-8.

    Raises:
        DataError: The source is missing, empty, of no known kind, or has no text that `encoding` could mean.
    """
    if isinstance(source, Dataset):
        _refuse_encoding(encoding, "a dataset")
        yield from _dataset_rows(source, "row")
        return
    if not isinstance(source, str | Path):
        if not isinstance(source, Sequence) or not all(isinstance(name, str | Path) for name in source):
            raise DataError(
                f"Expected a file, a folder, a hub name or a datasets.Dataset, got {type(source).__name__}. Choose one "
                "split of a DatasetDict; make a list of rows a dataset by Dataset.from_list."
            )
        yield from chain.from_iterable(read_rows(name, split=split, encoding=encoding) for name in source)
        return
    path = Path(source)
    if path.is_dir():
        rows = _folder_rows(path, split, encoding)
    elif path.is_file():
        if split not in _DEFAULT_SPLITS:
            raise DataError(
                f"Expected no split for {source}, got {split!r}: a file is read as a whole, whatever split was meant. "
                "Leave out --split, or give the folder of the files."
            )
        rows = _file_rows(path, path.name, encoding)
    elif data_suffix(path) in _READERS:
        raise DataError(f"There is no file {source}. Check the path; relative ones start at {Path.cwd().name}/.")
    else:
        _refuse_encoding(encoding, f"{source} is no file, so it")
        rows = _dataset_rows(_load(str(source), split), f"{source} [{split}] row")
    yield from _not_empty(rows, str(source))


def _file_rows(path: Path, name: str, encoding: str | None) -> Iterator[LocatedRow]:
    reader = _READERS.get(data_suffix(path))
    if reader is None:
        hint = _HINTS.get(path.suffix.lower(), "")
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}. Expected one of {sorted(_READERS)}.{hint}")
    yield from reader(path, name, encoding)


_DEFAULT_SPLITS = ("train", "test")
"""Of training and evaluation, where none is chosen."""
_UNPACK = " Unpack it, and give the folder or its files."
_SAVE = " Save the sheet as CSV (UTF-8); formulas are saved as their values."
_RENAME = " Rename it by what it holds: .tsv for a table, .jsonl for one object a line."
_HINTS = (
    dict.fromkeys((".zip", ".tar", ".tgz", ".gz"), _UNPACK)
    | dict.fromkeys((".xlsx", ".xls", ".ods"), _SAVE)
    | dict.fromkeys((".txt", ""), _RENAME)
)


def _folder_rows(folder: Path, split: str, encoding: str | None) -> Iterator[LocatedRow]:
    """Rows of a folder's data files, each read by itself: their columns may differ."""
    readme = folder / "README.md"
    has_configs = readme.is_file() and re.search(r"^configs:", readme.read_text("utf-8", "replace"), re.MULTILINE)
    if has_configs or any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        _refuse_encoding(encoding, str(folder))
        yield from _dataset_rows(_load(str(folder), split), f"{folder} [{split}] row")
        return
    names = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and data_suffix(path) in _READERS and not _is_metadata(path.relative_to(folder))
    )
    by_split: dict[str, list[Path]] = {}
    for name in names:
        by_split.setdefault(_split_of(name), []).append(name)
    if split not in by_split:
        raise DataError(
            f"The data {str(folder)!r} (split {split!r}) could not be loaded: the folder has "
            + (f"no such split, only {sorted(by_split)}. Choose one." if names else "no data files. Check the path.")
        )
    for name in by_split[split]:
        yield from _file_rows(folder / name, str(name), encoding)


def _split_of(name: Path) -> str:
    """The split that a file's path names, as the hub reads it; train if it names none."""
    if shard := re.search(r"([\w.]+)-\d+-of-\d+", name.name):
        return shard[1]
    for split, words in _SPLITS.items():
        if re.search(rf"(?:^|[^a-z])(?:{words})(?:$|[^a-z])", str(name).lower()):
            return split
    return "train"


def _is_metadata(name: Path) -> bool:
    return any(part.startswith((".", "_")) for part in name.parts) or name.name.startswith("dataset_info")


def _load(source: str, split: str) -> Dataset:
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            data = load_from_disk(source)
        else:
            data = load_dataset(source, split=split)
    except Exception as error:  # datasets raises many types, from pyarrow's to the hub's
        raise DataError(
            f"The data {source!r} (split {split!r}) could not be loaded: {_reason(error)} Expected a file, a folder, "
            "or a hub name within reach."
        ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise DataError(f"{source} has no split {split!r}, only {sorted(data)}. Choose one of them with --split.")
        return data[split]
    return data


def _dataset_rows(data: Iterable[Any], location: str) -> Iterator[LocatedRow]:
    rows, number = iter(data), 0
    features = data.features if isinstance(data, Dataset) else {}
    classes = {name: kind.names for name, kind in features.items() if isinstance(kind, ClassLabel)}
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a value that pyarrow cannot turn into Python's, such as bytes that are no UTF-8
            raise DataError(f"{location} {number} cannot be read: {_reason(error)} Write the data again.") from error
        if classes:
            row |= {name: _class_number(row[name], names) for name, names in classes.items()}
        yield f"{location} {number}", row
        number += 1


def _class_number(number: int | None, names: Sequence[str]) -> ClassNumber | None:
    """A class with its name; None if the row has none, which `datasets` also writes as -1."""
    return None if number is None or number < 0 else ClassNumber(number, names[number])


def _not_empty(rows: Iterator[LocatedRow], source: str) -> Iterator[LocatedRow]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source} holds no rows. Check the file, and the split of a folder.")


def _jsonl_rows(path: Path, name: str, encoding: str | None) -> Iterator[LocatedRow]:
    for where, line in _lines(path, name, encoding):
        yield where, line if isinstance(line, BadRow) else _parse_json_line(line, where)


def prompt_lines(path: Path, encoding: str | None = None) -> Iterator[LocatedRow]:
    """Rows of a text file that holds a prompt a line; a DataError if it is missing or damaged."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    for where, line in _lines(path, path.name, encoding):
        yield where, line if isinstance(line, BadRow) else {"prompt": line}


def _lines(path: Path, name: str, encoding: str | None) -> Iterator[tuple[str, str | BadRow]]:
    """The lines of a text file that are not blank, each with its location."""
    with open_text(path, name, newline=None, encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            where, text = f"{name}:{number}", line.strip("\ufeff\n")  # files put together keep their marks
            if problem := encoding_problem(line, encoding):
                yield where, BadRow(f"{where}: {problem}")
            elif text.strip():
                yield where, text


def _parse_json_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        hint = "the line is cut off or malformed (JSON has no comments, and no comma after the last item)"
        hint = "a list over several lines belongs in a file that ends in .json" if line.strip() in "[{" else hint
        return BadRow(f"{where}: not a JSON object ({error}): {hint}.")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets by the thousand
        return BadRow(f"{where}: not a JSON object ({_reason(error)}): the line is no row of preference data.")


def _json_rows(path: Path, name: str, encoding: str | None) -> Iterator[LocatedRow]:
    with open_text(path, name, newline=None, encoding=encoding) as file:
        text = file.read()
    if problem := encoding_problem(text, encoding):
        raise DataError(f"{name}: {problem}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "Extra data" in str(error):  # one object a line, as in .jsonl
            yield from _jsonl_rows(path, name, encoding)
            return
        raise DataError(
            f"{name}: not valid JSON ({error}). One object per line belongs in a file that ends in .jsonl."
        ) from error
    rows = content if isinstance(content, list) else _rows_of_object(content)
    if rows is None:
        raise DataError(
            f"{name} must hold a JSON list of objects (or an object with one such list, or columns), got "
            f"{type(content).__name__}: it is unknown which rows are meant. Save them as a list of their own, or as "
            ".jsonl."
        )
    yield from _dataset_rows(rows, f"{name} item")


def _rows_of_object(content: Any) -> list[Any] | None:
    """The rows of a JSON object that holds one list of objects, or columns as pandas writes them; None if neither."""
    values = list(content.values()) if isinstance(content, dict) else []
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists or len(values) < 2:
        return lists[0] if len(lists) == 1 else None
    is_indexed = all(isinstance(value, dict) and all(str(key).isdigit() for key in value) for value in values)
    columns = [list(value.values()) for value in values] if is_indexed else values
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return None
    return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]


def _arrow_rows(path: Path, name: str, encoding: str | None) -> Iterator[LocatedRow]:
    _refuse_encoding(encoding, name)
    try:
        is_parquet = data_suffix(path) == ".parquet"
        data = Dataset(pyarrow.parquet.read_table(path)) if is_parquet else Dataset.from_file(str(path))
    except Exception as error:  # pyarrow's errors have no common base that datasets keeps
        raise DataError(f"{name} cannot be read as {data_suffix(path)[1:].title()}: {_reason(error)}") from error
    yield from _dataset_rows(data, f"{name} row")


def _refuse_encoding(encoding: str | None, name: str) -> None:
    if encoding is not None:
        raise DataError(f"encoding={encoding} is for text files, but {name} has none to decode. Leave it out.")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else f"{type(error).__name__}."


_READERS = {
    ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": table_rows, ".tsv": table_rows,
    ".parquet": _arrow_rows, ".arrow": _arrow_rows,
}  # fmt: skip
