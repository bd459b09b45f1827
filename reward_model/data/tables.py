"""Read the rows of CSV and TSV files; an unclosed quote costs its own line alone."""

import csv
import re
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from reward_model.data.files import DataError, data_suffix, encoding_problem, open_text
from reward_model.data.rows import BadRow, Row

_LONGEST_RECORD = 2_000_000
"""Characters after which a quote counts as not closed."""
_SWALLOWED_LINES = 3
"""Inner lines of a quoted field that must all look like rows before it counts as not closed."""


def table_rows(path: Path, name: str, encoding: str | None = None) -> Iterator[tuple[str, Row | BadRow]]:
    """Yield (location, row) of a CSV or TSV file with a header.

    Raises:
        DataError: The file is damaged or its header names a column twice.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_text(path, name, newline="", encoding=encoding) as file:
        records = _Records(file, "\t" if data_suffix(path) == ".tsv" else ",", encoding)
        header = next(iter(records), None)
        if header is None:
            return
        names = _header(header[1], name)
        for number, fields in records:
            where = f"{name}:{number}"
            if not any(fields):  # as spreadsheets end their tables
                continue
            if isinstance(fields, str):
                yield where, BadRow(f"{where}: {fields}")
            elif len(fields) != len(names):
                yield (
                    where,
                    BadRow(
                        f"{where}: the line has more or fewer fields than the header names: {len(fields)}, expected "
                        f"{len(names)}. Quote fields that hold the separator."
                    ),
                )
            else:
                yield where, dict(zip(names, fields, strict=True))


def _header(fields: list[str] | str, name: str) -> list[str]:
    if isinstance(fields, str):
        raise DataError(f"{name}: the header cannot be read: {fields}")
    names = [field.strip() for field in fields]
    twice = sorted({field for field in names if names.count(field) > 1})
    if twice:
        raise DataError(f"{name}: the header names {twice} more than once: it is unknown which column is meant.")
    return names


class _Records:
    """The records of a table as (number of the first line, fields or what is wrong with them)."""

    def __init__(self, lines: Iterator[str], delimiter: str, encoding: str | None) -> None:
        self.lines = lines
        self.encoding = encoding
        self.delimiter = delimiter
        self.ahead: deque[str] = deque()
        self.number = 0
        self.columns = 0

    def __iter__(self) -> Iterator[tuple[int, list[str] | str]]:
        while True:
            taken: list[str] = []
            if self.columns == 0:
                self._choose_delimiter()
            fields = self._record(taken)
            if not taken:
                return
            start = self.number + 1
            if isinstance(fields, str):  # the lines after the first are read again, on their own
                self.ahead.extendleft(reversed(taken[1:]))
                self.number += 1
                yield start, fields
                continue
            self.number += len(taken)
            self.columns = self.columns or len(fields)
            if fields:
                yield start, encoding_problem("".join(fields), self.encoding) or fields

    def _record(self, taken: list[str]) -> list[str] | str:
        """The fields of the next record, whose lines are put into `taken`."""
        try:
            fields = next(csv.reader(self._feed(taken), delimiter=self.delimiter, strict=True), [])
        except csv.Error as error:
            if "unexpected end" in str(error):
                return (
                    f"the quote that opens in this line is not closed: it would take in {len(taken) - 1} more lines. "
                    "Close it, or double the quotes inside a field."
                )
            return (
                f"a quoted field goes on after its closing quote ({error}), {len(taken)} lines from here. Double the "
                'quotes inside a field ("" for "), or give the data as .jsonl.'
            )
        return self._swallowed(fields, taken) or fields

    def _swallowed(self, fields: list[str], taken: list[str]) -> str:
        """What is wrong with a record whose quoted field looks as if it took in other rows; "" if nothing is."""
        inner = taken[1:-1]
        as_rows = sum(line.count(self.delimiter) == self.columns - 1 for line in inner)
        in_tsv = self.delimiter == "\t" and any("\t" in field and "\n" in field for field in fields)
        if not in_tsv and not (self.columns > 1 and as_rows == len(inner) >= _SWALLOWED_LINES):
            return ""
        return (
            f"the quote that opens in this line takes in {len(taken) - 1} more lines, {as_rows} of which look like "
            "rows of their own. Close it, double the quotes inside a field, or give the data as .jsonl."
        )

    def _feed(self, taken: list[str]) -> Iterator[str]:
        size = 0
        while size <= _LONGEST_RECORD:
            line = self.ahead.popleft() if self.ahead else next(self.lines, "")
            if not line:
                return
            taken.append(line)
            size += len(line)
            yield line

    def _choose_delimiter(self) -> None:
        """Spreadsheets of some countries separate by semicolons; the header tells."""
        header = next(self.lines, "")
        if said := re.fullmatch(r"sep=(.)\s*", header):  # Excel's own line
            self.delimiter, self.number, header = said[1], 1, next(self.lines, "")
        if header:
            self.ahead.append(header)
        candidates = dict.fromkeys((self.delimiter, "\t", ";", "|", ","))
        self.delimiter = max(candidates, key=lambda one: len(next(csv.reader([header], delimiter=one), [])))
