"""Check nested values as JSON has them, and take out the nulls that `datasets` adds to fill a column's schema."""

import datetime
import math
from collections.abc import Mapping
from typing import Any

DEEPEST = 64
"""Levels of nesting above which a value is taken for a mistake."""


class UnreadableText(ValueError):
    """A text or conversation that cannot be read; the message names the field, what was expected and what came."""


def check_characters(text: str, place: str) -> None:
    """Raise an UnreadableText that names the position of half of a surrogate pair, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UnreadableText(
            f"{place} holds {half!a} at character {error.start}, half of a character (a lone surrogate), which no "
            "tokenizer can encode. It was cut in two, as emoji are by a cut at a number of UTF-16 units: cut the text "
            "at whole characters."
        ) from error


def without_nulls(value: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """`value` without fields that are null, at every depth; dates become text.

    Raises:
        UnreadableText: A key that is no text, a value that JSON does not have, or too many levels.
    """
    return _mapping(value, place, DEEPEST)


def _mapping(value: Mapping[Any, Any], place: str, levels: int) -> dict[str, Any]:
    cleaned = {}
    for name, part in value.items():
        if not isinstance(name, str):
            raise UnreadableText(f"{place} has a field named {name!r:.40}, expected names that are text.")
        check_characters(name, f"{place}: a field's name")
        if not _is_null(part):
            cleaned[name] = _value(part, f"{place}: {name!r:.40}", levels - 1)
    return cleaned


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _value(value: object, place: str, levels: int) -> Any:
    if isinstance(value, str):
        check_characters(value, place)
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if levels <= 0:
        raise UnreadableText(f"{place} is nested more than {DEEPEST} levels deep: it is no conversation.")
    if isinstance(value, Mapping):
        return _mapping(value, place, levels)
    if isinstance(value, list | tuple):
        return [_value(part, place, levels - 1) for part in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise UnreadableText(f"{place} must be text, a number, a list or named fields, got {type(value).__name__}.")
