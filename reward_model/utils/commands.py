"""Parse the flags and configuration file of a command, and print errors in one line."""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import datasets
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging


def parse(types: Sequence[Any], arguments: Sequence[str] | None, *, program: str, description: str) -> tuple[Any, ...]:
    """Parse dataclasses from the command line; `--config FILE.yaml` gives defaults that flags override.

    Args:
        types: Dataclasses with documented fields.
        arguments: The command line; None: `sys.argv`.
        program: Shown in the usage line.
        description: First lines of the help.

    Raises:
        ValueError: An unreadable configuration file, an unknown key, or a value that a dataclass refuses.
    """
    line = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(list(types), prog=program, description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names; flags override it")
    for action in parser._actions:
        if action.help is None and action.dest != "help":
            action.help = " "
    settings = _config_file(line)
    unknown = sorted(set(settings) - {action.dest for action in parser._actions})
    if unknown:
        raise ValueError(f"The configuration file has unknown keys {unknown}. --help lists the known ones.")
    for action in parser._actions:
        if action.dest in settings:
            action.required = False
            if isinstance(action, _Repeatable) and not isinstance(settings[action.dest], list):
                settings[action.dest] = [settings[action.dest]]
    parser.set_defaults(**settings)
    *parsed, _ = parser.parse_args_into_dataclasses(line, look_for_args_file=False)
    return tuple(parsed)


class _Repeatable(argparse.Action):
    """Values of a flag that takes several: `--data a b` and `--data a --data b` are the same."""

    def __call__(self, _parser: Any, namespace: Any, values: Any, _option: str | None = None) -> None:
        self.given = [*getattr(self, "given", []), *values]
        setattr(namespace, self.dest, self.given)


class _Parser(HfArgumentParser):
    """Argument parser with errors in one line, without the usage of forty flags."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add an argument; one that takes several values may also be repeated."""
        if options.get("nargs") in ("+", "*"):
            options.setdefault("action", _Repeatable)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. {self.prog} --help lists the flags.\n")


def run(main: Callable[[Sequence[str] | None], object], arguments: Sequence[str] | None = None) -> None:
    """Call a command; an error that the user can fix is printed in one line on stderr, with exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        main(arguments)
    except KeyboardInterrupt:
        sys.exit("Interrupted: nothing was saved but the checkpoints.")
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  a command's answer
        sys.exit(2)


def model_as_option(arguments: Sequence[str] | None) -> list[str]:
    """Rewrite `MODEL --data ...` to `--model MODEL --data ...`."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    return ["--model", *line] if line and not line[0].startswith("-") else line


def column_names(pairs: Sequence[str] | None) -> dict[str, str]:
    """Parse `["chosen=better", "tie="]` into a mapping from our column names to the source's; "" leaves one out."""
    mapping = {}
    for pair in pairs or []:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals):
            raise ValueError(
                f"--columns takes ours=theirs, such as chosen=better, or a column and = to leave it out, got {pair!r}."
            )
        mapping[ours] = theirs
    return mapping


def table(rows: Mapping[str, str]) -> str:
    """Two columns of text, aligned."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _config_file(line: Sequence[str]) -> dict[str, Any]:
    import yaml

    paths = [after for flag, after in pairwise(line) if flag == "--config"]
    paths += [flag.removeprefix("--config=") for flag in line if flag.startswith("--config=")]
    if not paths:
        return {}
    path = Path(paths[-1])
    if not path.is_file():
        raise ValueError(f"There is no configuration file {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names and values, got {type(content).__name__}.")
    return {str(name).replace("-", "_"): value for name, value in content.items()}
