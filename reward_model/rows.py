"""Rows of preference data, and the error of a malformed one."""

from collections.abc import Mapping
from typing import Any, Literal

Row = Mapping[str, Any]
OnBadRow = Literal["stop", "skip"]


class BadRow(ValueError):
    """A malformed row; the message names its location, the field, what was expected and what was found."""


def set_aside(error: BadRow, where: str, row: Any, on_bad_row: OnBadRow) -> dict[str, Any]:
    """What is kept of a bad row that is skipped: location, reason and content.

    Raises:
        BadRow: `on_bad_row` is "stop".
    """
    if on_bad_row == "stop":
        raise BadRow(f"{error} Repair the row, or pass --on_bad_row skip to set such rows aside.") from error
    return {"where": where, "error": str(error), "row": row}


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """`row` with the fields that `columns` maps (ours -> theirs) under our names; a field mapped to "" is left out."""
    if not columns:
        return row
    gone = {*columns.values(), *(ours for ours, theirs in columns.items() if not theirs)}
    kept = {name: value for name, value in row.items() if name not in gone}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
