"""Command-line flags made from the fields of a dataclass, whose docstrings are the help; settings files in YAML."""

import argparse
import ast
import difflib
import inspect
import os
import re
import textwrap
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

COLUMNS = 100
"""Widest line of a help."""
_END_OF_POINT = re.compile(r"; |\. |\.?$")
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _FlagHelp(argparse.RawDescriptionHelpFormatter):
    """Help with one spelling of each flag and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(COLUMNS, int(os.environ.get("COLUMNS", COLUMNS))))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = f"{{{','.join(action.choices)}}}" if action.choices else str(action.metavar or action.dest.upper())
        values = {0: "", "?": "", "+": f"{values} ..."}.get(action.nargs, values)
        return f"{action.option_strings[0]} {values}".rstrip()


class FlagParser(argparse.ArgumentParser):
    """Parser whose help fits a screen, and whose errors are one line."""

    def __init__(
        self, program: str, description: str | None, *, usage: str = "%(prog)s [options]", epilog: str
    ) -> None:
        super().__init__(
            prog=program, usage=usage, description=description, epilog=epilog, formatter_class=_FlagHelp,
            allow_abbrev=False,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """End the program with the message; a flag that is not known is answered with the nearest one."""
        if message.startswith("unrecognized arguments: "):
            near = difflib.get_close_matches(message.split()[2], self._option_string_actions, 1)
            message += f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"error: {message}. {self.prog} --help lists the flags.\n")


def add_flags(
    parser: argparse.ArgumentParser,
    config: type,
    *,
    hidden: Collection[str] = (),
    left_out: Collection[str] = (),
    overriding: bool = False,
) -> None:
    """Add a flag for each field of a dataclass, which may be spelled with `_` or `-`.

    Args:
        config: The dataclass, with a docstring under each field.
        hidden: Fields whose flags the help leaves out.
        left_out: Fields without a flag.
        overriding: The flags override a file: those that are not given are left out of the namespace. They are shown
            with `-`, and `--flag` takes no value; otherwise with `_`, and `--flag true` is understood, too.
    """
    texts, hints = _field_docstrings(config), get_type_hints(config)
    for item in (item for item in fields(config) if item.name not in left_out):
        options = _options(item, hints[item.name], takes_booleans=not overriding)
        text = texts.get(item.name, "")
        if options.get("default") not in (None, "", False, []):
            text += f" ({options['default']})"
        if overriding:
            options |= {"default": argparse.SUPPRESS, "required": False}
        options["help"] = argparse.SUPPRESS if item.name in hidden else text.replace("%", "%%")
        parser.add_argument(*_spellings(item.name, overriding), **options)
        if hints[item.name] in (bool, bool | None):
            parser.add_argument(
                *_spellings(f"no_{item.name}", overriding), dest=item.name, action="store_false",
                default=argparse.SUPPRESS, help=argparse.SUPPRESS,
            )  # fmt: skip


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Reads numbers as YAML 1.2 does: 1e-5 is one."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def read_value(text: str) -> Any:
    """A value as YAML reads it, or a yaml.YAMLError."""
    return yaml.load(text, _Loader)  # a safe loader


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML or JSON file, by name; a ValueError if it cannot be read or holds no names and values."""
    try:
        content = read_value(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold names and values, `model: gpt2` and so on, got {type(content).__name__}: no setting can "
            "be read from it. Write one setting a line."
        )
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def _spellings(name: str, dashes: bool) -> list[str]:
    return sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=not dashes)  # "-" is before "_"


class _Repeatable(argparse.Action):
    """Values of a flag that takes several: `--data a b` and `--data a --data b` are the same."""

    def __call__(self, _parser: Any, namespace: Any, values: Any, _option: str | None = None) -> None:
        self.given = [*getattr(self, "given", []), *values]
        setattr(namespace, self.dest, self.given)


def _options(item: "Field[Any]", kind: Any, *, takes_booleans: bool) -> dict[str, Any]:
    """Arguments of `add_argument` for a field of type int, float, str, bool, a list of one, or a choice."""
    factory = None if item.default_factory is MISSING else item.default_factory
    default = factory() if factory else item.default
    options: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
    kinds = [part for part in get_args(kind) if part is not type(None)] if type(None) in get_args(kind) else [kind]
    if get_origin(kinds[0]) is list:
        return options | {"action": _Repeatable, "nargs": "+", "metavar": "STR"}
    if get_origin(kinds[0]) is Literal:
        return options | {"choices": get_args(kinds[0])}
    if kinds[0] is not bool:
        return options | {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
    return options | ({"type": _boolean, "nargs": "?", "const": True} if takes_booleans else {"action": "store_true"})


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return _BOOLEANS[text.lower()]


def _field_docstrings(config: type) -> dict[str, str]:
    """The first point of the docstring under each field, base classes included; none without their source."""
    texts: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except OSError:  # a frozen application
            continue
        body = getattr(definition, "body", [])
        for node, after in pairwise(body):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(text, str):
                words = " ".join(text.split())
                texts[node.target.id] = words[: _END_OF_POINT.search(words).start()]  # type: ignore[union-attr]
    return texts
