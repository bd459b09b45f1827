"""Redact secrets from files, trackers and messages: values of settings named like secrets, credentials in URLs."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(^|[_/\-.])(token|secret|password|passwd|api[_-]?key|access[_-]?key|credentials?|authorization)$", re.I
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redacted(value: Any, name: str = "") -> Any:
    """Replace secrets in `value` by `***`: settings with secret names (also nested), user and password in URLs.

    Args:
        value: Settings or a string; anything else is returned unchanged.
        name: Name of the setting that holds the value.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item, name) for item in value)
    if isinstance(value, str):
        return HIDDEN if value and _SECRET_NAME.search(name) else _URL_CREDENTIALS.sub(HIDDEN, value)
    return value
