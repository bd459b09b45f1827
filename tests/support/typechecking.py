"""The type checker that `--jaxtyping-packages` applies to our modules while tests run."""

from importlib.machinery import SourceFileLoader
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import _import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Beartype where an int may stand for a float, as in PEP 484 and in everybody's code."""


class _SeparateBytecode(_import_hook._JaxtypingLoader):
    """A module that `runpy` runs is compiled with checks too, but its bytecode would land where plain Python looks."""

    def set_data(self, path: str, data: Any, **kwargs: Any) -> None:
        if "opt-jaxtyping" in path:
            SourceFileLoader.set_data(self, path, data, **kwargs)


_import_hook._JaxtypingLoader = _SeparateBytecode  # type: ignore[misc]
