"""Read conversations that a table holds as text: as JSON, or as Python writes a list."""

import ast
import json
import re
import warnings
from typing import Any

from rlhf_ppo.chat.nested import UnreadableText

_CONVERSATION = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")


def parse_cell(value: Any, field: str) -> Any:
    """The messages that a text holds, if it looks like a conversation; else `value`.

    Raises:
        UnreadableText: It looks like a conversation and cannot be read as one.
    """
    if not isinstance(value, str) or not _CONVERSATION.match(value):
        return value
    parsed = parse_literal(value)
    if parsed is None:
        raise UnreadableText(
            f"field {field!r} looks like a conversation written as text, which neither JSON nor Python reads: "
            f"{value[:60]!r}. Write the messages as JSON (json.dumps), or save the data as .jsonl or .parquet."
        )
    return parsed


def parse_literal(text: str) -> Any:
    """The list or object that `text` holds, as JSON or as Python writes it; None if it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list | tuple | dict) else None
