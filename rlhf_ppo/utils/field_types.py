"""Type checks of dataclass configurations, run when one is built."""

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_TYPE_WORDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def check_fields(config: Any) -> None:
    """Check that every field of a dataclass has the annotated type; unsupported annotations pass.

    Raises:
        TypeError: A value of another type; names the field, the expected and the given type.
        ValueError: A nan, or a string that is not one of the `Literal` choices.
    """
    cls: Any = type(config)
    hints = _type_hints(cls)
    for item in fields(config):
        value, annotation = getattr(config, item.name), hints[item.name]
        if not _matches_any(value, annotation):
            expected = " or ".join(_describe(annotation))
            has_choices = any(get_origin(option) is Literal for option in _union_members(annotation))
            raise (ValueError if has_choices and isinstance(value, str) else TypeError)(
                f"{cls.__name__}.{item.name} must be {expected}, got {value!r:.80} of type {type(value).__name__}: a "
                "run would fail later or compute something else. Look the setting up in the docstring of "
                f"{cls.__name__}."
            )
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(
                f"{cls.__name__}.{item.name} must be a number, got nan: every result would be nan. Set it to a number."
            )


@cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _union_members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _union_members(option)
    else:
        yield annotation


def _matches_any(value: object, annotation: Any) -> bool:
    return any(_matches(value, option) for option in _union_members(annotation))


def _matches(value: object, annotation: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if annotation is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        return isinstance(value, tuple) and all(_matches_any(item, arguments[0]) for item in value)
    if annotation in (int, float):
        return isinstance(value, Integral if annotation is int else Real) and not isinstance(value, bool)
    if isinstance(origin or annotation, type):
        return isinstance(value, origin or annotation)
    return True


def _describe(annotation: Any) -> Iterator[str]:
    for option in _union_members(annotation):
        if option is type(None):
            yield "None"
        elif get_origin(option) is Literal:
            yield "one of " + ", ".join(map(repr, get_args(option)))
        else:
            yield _TYPE_WORDS.get(option, str(getattr(option, "__name__", option)))
