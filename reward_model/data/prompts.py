"""Read prompts for PPO from any source; a row's prompt is found as for training a reward model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from reward_model.data.files import DataError, data_suffix
from reward_model.data.layouts.base import are_objects, prepend_system_message, prompt_columns, system_messages
from reward_model.data.rows import checked_row, with_lower_names
from reward_model.data.sources import prompt_lines, read_rows
from rlhf_ppo.chat.cells import parse_cell

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
    checked = [checked_row(row, where) for where, row in located]
    has_system = any(map(system_messages, checked))  # then all prompts are conversations
    rows = [_with_prompt(row, has_system=has_system) for row in checked]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    try:
        return Dataset.from_dict(columns)
    except (ValueError, TypeError, OverflowError):
        for name, values in columns.items():
            _check_column(name, values, source)
        raise


def _with_prompt(row: Mapping[str, Any], *, has_system: bool) -> dict[str, Any]:
    """`row` with its system message in the prompt; without a column of our names, the prompt is a comparison's."""
    if own := next((name for name in _OWN_NAMES if row.get(name) is not None), None):
        prompt = parse_cell(row[own], own)
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not has_system or not are_objects(prompt):  # no objects: token ids
            return dict(row)
        return {**row, own: prepend_system_message(system_messages(row) or [], prompt)}
    for names in (row, with_lower_names(row) or {}):
        prompt, used = prompt_columns(names)
        if used:
            is_text = has_system and isinstance(prompt, str)
            return {**row, "prompt": [{"role": "user", "content": prompt}] if is_text else prompt}
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
