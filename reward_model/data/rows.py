"""The rows of preference data, and the error of a malformed one."""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from rlhf_ppo.chat.cells import as_turns

Row = Mapping[str, Any]
OnBadRow = Literal["stop", "skip"]

_DECIMAL_COMMA = re.compile(r"\s*[+-]?(0,\d+|\d+,(\d{1,2}|\d{4,}))\s*")


class ClassNumber(int):
    """The number of a class in a column of `datasets.ClassLabel`, with the name of the class."""

    name: str

    def __new__(cls, number: int, name: str) -> "ClassNumber":
        """Attach `name` to `number`."""
        value = super().__new__(cls, number)
        value.name = name
        return value


def with_class_names(row: Row) -> Row:
    """`row` with names in place of class numbers, whose order may be any: positive, negative."""
    return {name: value.name if isinstance(value, ClassNumber) else value for name, value in row.items()}


class BadRow(ValueError):
    """A malformed row; the message names its location, the field, what was expected and what was found."""


def checked_row(row: Any, where: str) -> Row:
    """A row as it was read; a BadRow if it could not be read, or has no named fields."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        hint = " A list of rows belongs in a file that ends in .json." if isinstance(row, list) else ""
        raise BadRow(f"{where}: expected an object with named fields, got {type(row).__name__}.{hint}")
    return {name: as_turns(value) for name, value in row.items()}


def set_aside(error: BadRow, where: str, row: Any, on_bad_row: OnBadRow) -> dict[str, Any]:
    """Location, reason and content of a bad row that is skipped; with on_bad_row="stop", it is raised."""
    if on_bad_row == "stop":
        raise BadRow(
            f"{error} Repair the row, leave a column out by --columns NAME=, or pass --on_bad_row skip to set such "
            "rows aside."
        ) from error
    return {"where": where, "error": str(error), "row": row}


def read_number(value: Any) -> float:
    """A number, which tables hold as text; nan if it is none.

    A comma is a decimal one, as in spreadsheets of many countries, unless three digits follow it: those may be
    thousands.
    """
    if isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value):
        value = value.replace(",", ".")
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def with_lower_names(row: Row) -> Row | None:
    """`row` with lower-case names, where a spreadsheet has `Prompt`; None if all are, or two become one."""
    lower = {str(name).strip().lower(): value for name, value in row.items()}
    return lower if lower.keys() != row.keys() and len(lower) == len(row) else None


def check_mapping(columns: Mapping[str, str], names: Collection[str]) -> None:
    """Raise a ValueError for columns of the source that `columns` maps or leaves out and that are not in `names`."""
    missing = sorted({theirs or ours for ours, theirs in columns.items()} - set(names))
    if missing:
        raise ValueError(f"columns names {missing}, which no row has; the rows have {sorted(map(str, names))}.")


def json_line(value: Any) -> str:
    """`value` as one line of JSON that any UTF-8 file takes: half a character stays escaped."""
    line = json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
    return line.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """`row` with the fields that `columns` maps (ours -> theirs) under our names; a field mapped to "" is left out."""
    if not columns:
        return row
    gone = {*columns.values(), *(ours for ours, theirs in columns.items() if not theirs)}
    kept = {name: value for name, value in row.items() if name not in gone}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
