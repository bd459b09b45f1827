"""Use the docstring under each field of a configuration as command-line help."""

import ast
import inspect
import textwrap
from dataclasses import fields
from types import MappingProxyType
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def documented(cls: Class) -> Class:
    """Put the docstring under each field of a dataclass into the field's metadata as `help`."""
    texts = _field_docstrings(cls)
    for item in fields(cls):
        if item.name in texts:
            # argparse formats help with %, so a literal one is doubled
            item.metadata = MappingProxyType({**item.metadata, "help": texts[item.name].replace("%", "%%")})
    return cls


def _field_docstrings(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # no source at hand (a frozen application): no help texts
        return {}
    (definition,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    texts: dict[str, str] = {}
    for node, after in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            texts[node.target.id] = " ".join(after.value.value.split())
    return texts
