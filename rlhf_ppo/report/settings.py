"""Settings of a run as table rows."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def setting_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flatten settings to (dotted name, value)."""
    return list(_flatten(config, ""))


def base_model(config: Mapping[str, Any]) -> str:
    """Name of the model that the policy started from; "" if the settings have none."""
    for key in ("model", "model_name", "base_model"):
        value = config.get(key)
        if isinstance(value, str) and value:
            return value
    return ""


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form "owner/model" and is not a path."""
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith((".", "~"))


def _flatten(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, _text(value)


def _text(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)
