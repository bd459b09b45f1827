"""Settings of the wrong type, found when a configuration is built and not in the middle of a run."""

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def check_fields(config: Any) -> None:
    """Refuse a dataclass whose fields do not hold what their annotations say; unknown kinds of annotation pass.

    Raises:
        TypeError: A value of another type; names the field, what it takes and what it got.
        ValueError: A number that is nan.
    """
    kind: Any = type(config)
    hints = _hints(kind)
    for item in fields(config):
        value, wanted = getattr(config, item.name), hints[item.name]
        if not _fits(value, wanted):
            expected = " or ".join(_described(wanted))
            chosen = isinstance(value, str) and any(get_origin(option) is Literal for option in _options(wanted))
            raise (ValueError if chosen else TypeError)(
                f"{kind.__name__}.{item.name} must be {expected}, got {value!r:.80} of type {type(value).__name__}: a "
                "run would fail on it later, or mean something else. Look the setting up in the docstring of "
                f"{kind.__name__}."
            )
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(
                f"{kind.__name__}.{item.name} must be a number, got nan: every result would be nan. Set it to a number."
            )


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _options(wanted: Any) -> Iterator[Any]:
    if get_origin(wanted) in (Union, types.UnionType):
        for option in get_args(wanted):
            yield from _options(option)
    else:
        yield wanted


def _fits(value: object, wanted: Any) -> bool:
    return any(_is(value, option) for option in _options(wanted))


def _is(value: object, wanted: Any) -> bool:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return True
    if wanted is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if wanted in (int, float):
        return isinstance(value, Integral if wanted is int else Real) and not isinstance(value, bool)
    if isinstance(origin or wanted, type):
        return isinstance(value, origin or wanted)
    return True


def _described(wanted: Any) -> Iterator[str]:
    for option in _options(wanted):
        if option is type(None):
            yield "None"
        elif get_origin(option) is Literal:
            yield "one of " + ", ".join(map(repr, get_args(option)))
        else:
            yield _WORDS.get(option, str(getattr(option, "__name__", option)))
