"""Choose arguments by what the installed version of a library takes."""

import inspect
from collections.abc import Callable
from typing import Any


def accepts_argument(call: Callable[..., Any], argument: str) -> bool:
    """Whether `call` has a parameter of this name; a catch-all `**kwargs` does not count."""
    return argument in inspect.signature(call).parameters


def parameter_name(call: Callable[..., Any], *spellings: str) -> str:
    """The first of an argument's names, newest first, that `call` takes; a TypeError if it takes none."""
    for name in spellings:
        if accepts_argument(call, name):
            return name
    raise TypeError(
        f"expected {call.__module__}.{call.__qualname__} to take one of {', '.join(spellings)}, got one that takes "
        f"{', '.join(inspect.signature(call).parameters)}: a setting could not be passed on. Install a version of "
        f"{call.__module__.split('.')[0]} inside the range of pyproject.toml."
    )
