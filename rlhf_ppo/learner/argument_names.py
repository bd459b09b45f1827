"""`HfArgumentParser((ScriptArguments, PPOConfig))`: the two may have a field of one name.

The fields of TRL's classic `PPOConfig` were there when its scripts chose their names; those that this package adds were
not. Where both have a field, such as `output_dir`, the argument is the script's, and `PPOConfig` keeps its default.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields, is_dataclass
from functools import wraps
from typing import Any

from transformers import HfArgumentParser

LAST_CLASSIC_FIELD = "total_ppo_epochs"
"""The fields after it are not the classic's."""


def keep_argument_names_apart(config: Any) -> None:
    """Let parsers leave out those fields of `config` and its subclasses that another dataclass of the parser has."""
    names = [item.name for item in fields(config)]
    added = frozenset(names[names.index(LAST_CLASSIC_FIELD) + 1 :])
    for method in ("_add_dataclass_arguments", "parse_args_into_dataclasses"):
        setattr(HfArgumentParser, method, _without_taken_fields(getattr(HfArgumentParser, method), config, added))


def _without_taken_fields(method: Callable[..., Any], config: Any, added: frozenset[str]) -> Callable[..., Any]:
    @wraps(method)
    def wrapper(self: HfArgumentParser, *args: Any, **kwargs: Any) -> Any:
        types: list[Any] = [cls for cls in self.dataclass_types if is_dataclass(cls)]
        others = {item.name for cls in types if not issubclass(cls, config) for item in fields(cls)}
        hidden = [
            item for cls in types if issubclass(cls, config) for item in fields(cls) if item.name in added & others
        ]
        with _no_arguments(hidden):
            return method(self, *args, **kwargs)

    return wrapper


@contextmanager
def _no_arguments(hidden: list[Field[Any]]) -> Iterator[None]:
    """Context manager: while active, the parser takes these fields for fields that a constructor does not set."""
    for item in hidden:
        item.init = False
    try:
        yield
    finally:
        for item in hidden:
            item.init = True
