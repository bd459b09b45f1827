"""Read conversations that a table holds as text, as JSON or as Python writes a list, or as one list for each field."""

import ast
import io
import itertools
import json
import re
import tokenize
import warnings
from collections.abc import Mapping
from typing import Any

from rlhf_ppo.chat.nested import UnreadableText

_CONVERSATION = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")

_ADJACENT = re.compile(r"""['"]\s+['"]""")


def parse_cell(value: Any, field: str) -> Any:
    """The messages of a text that looks like a conversation (an UnreadableText if it is malformed); else `value`."""
    if not isinstance(value, str) or not _CONVERSATION.match(value):
        return as_turns(value)
    parsed = parse_literal(value)
    if parsed is None:
        raise UnreadableText(
            f"field {field!r} looks like a conversation written as text, which neither JSON nor Python reads: "
            f"{value[:60]!r}. Write the messages as JSON (json.dumps), or save the data as .jsonl or .parquet."
        )
    return parsed


def as_turns(value: Any) -> Any:
    """The messages of `{"role": [...], "content": [...]}`, as `datasets` stores a `Sequence` of them; else `value`."""
    if not isinstance(value, Mapping) or not ({"role", "from"} & value.keys() and {"content", "value"} & value.keys()):
        return value
    columns = list(value.values())
    if not all(isinstance(column, list | tuple) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]


def parse_literal(text: str) -> Any:
    """The list or object that `text` holds, as JSON or as Python writes it; None if it holds none.

    NumPy separates the texts of a list by spaces, which Python would join to one text: that is None, too.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                value = None if _ADJACENT.search(text) and _joins_texts(text) else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list | tuple | dict) else None


def _joins_texts(text: str) -> bool:
    """Whether two quoted texts of a Python literal have nothing but space between them."""
    try:
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(f"({text.strip()})").readline)]
    except (tokenize.TokenError, SyntaxError):
        return False
    is_text = [kind == tokenize.STRING for kind in kinds if kind != tokenize.NL]
    return any(both == (True, True) for both in itertools.pairwise(is_text))
