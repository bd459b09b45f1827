"""Read prompts for PPO from any source; a row's prompt is found as for training a reward model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from reward_model.data.files import DataError, data_suffix
from reward_model.data.layouts.base import prompt_columns
from reward_model.data.rows import checked_row, with_lower_names
from reward_model.data.sources import prompt_lines, read_rows

_OWN_NAMES = ("input_ids", "prompt", "query")
"""Columns that `PromptDataset` reads itself."""


def read_prompts(source: str, encoding: str | None = None) -> Dataset:
    """The rows of a file, folder or hub dataset with a column of prompts; a text file holds one a line.

    Raises:
        BadRow: A row cannot be read, or has no prompt.
        DataError: The source cannot be read, or a column holds values of several kinds.
    """
    is_text = data_suffix(Path(source)) == ".txt"
    located = prompt_lines(Path(source), encoding) if is_text else read_rows(source, encoding=encoding)
    rows = [_with_prompt(checked_row(row, where)) for where, row in located]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    try:
        return Dataset.from_dict(columns)
    except (ValueError, TypeError, OverflowError):
        for name, values in columns.items():
            _check_column(name, values, source)
        raise


def _with_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row`; where no column has one of our names, the prompt is read as that of a comparison."""
    if any(row.get(name) is not None for name in _OWN_NAMES):
        return dict(row)
    for names in (row, with_lower_names(row) or {}):
        prompt, used = prompt_columns(names)
        if used:
            return {**row, "prompt": prompt}
    return dict(row)


def _check_column(name: str, values: list[Any], source: str) -> None:
    try:
        Dataset.from_dict({name: values})
    except (ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source}: column {name!r} holds values that no table has in one column ({reason:.120}): it could not be "
            "handed to a reward. Write all its values alike, or take the column out."
        ) from error
