"""Secrets stay out of files, trackers and messages: tokens by the name of their setting, passwords in addresses."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAME = re.compile(
    r"(^|[_/\-.])(token|secret|password|passwd|api[_-]?key|access[_-]?key|credentials?|authorization)$", re.I
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redacted(value: Any, name: str = "") -> Any:
    """The value without secrets: nested settings by their names, addresses without user and password.

    Args:
        value: Settings, a text, or anything else, which comes back as it is.
        name: Of the setting that holds the value.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item, name) for item in value)
    if isinstance(value, str):
        return HIDDEN if value and _NAME.search(name) else _IN_ADDRESS.sub(HIDDEN, value)
    return value
