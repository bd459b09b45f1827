"""Configurations from the plain values of YAML files and flags."""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Union, get_args, get_origin, get_type_hints

from rlhf_ppo.cli.run_config import refuse_unknown


def build(start: Any, values: Mapping[str, Any], section: str) -> Any:
    """Make a configuration; lists become tuples, and mappings the configurations that their fields take.

    Args:
        start: The class of the configuration, or one whose other fields stay.
        section: Its name in errors.

    Raises:
        ValueError: An unknown name, with the nearest one, or a value that a configuration refuses.
    """
    hints = get_type_hints(start if isinstance(start, type) else type(start))
    refuse_unknown(values, [item.name for item in fields(start)], f"field of `{section}`")
    given = {
        name: _convert(value, hints[name], getattr(start, name, None), f"{section}.{name}")
        for name, value in values.items()
    }
    try:
        return start(**given) if isinstance(start, type) else replace(start, **given)
    except TypeError as error:
        raise ValueError(f"`{section}` does not fit: {error}") from error


def _convert(value: Any, hint: Any, present: Any, section: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = {option.__name__: option for option in options if isinstance(option, type) and is_dataclass(option)}
    if isinstance(value, list) and any(get_origin(option) is tuple for option in options):
        return tuple(value)
    if not (isinstance(value, dict) and kinds):
        return value
    values = dict(value)
    name = values.pop("type", None) if len(kinds) > 1 else next(iter(kinds))
    if name not in kinds:
        raise ValueError(f"`{section}` needs `type`, one of {', '.join(kinds)}, got {name!r}.")
    return build(present if type(present) is kinds[name] else kinds[name], values, section)
