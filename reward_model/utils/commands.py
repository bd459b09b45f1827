"""Parse the flags and configuration file of a command, and print errors in one line."""

import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from textwrap import fill
from typing import Any

from rlhf_ppo.utils.flags import COLUMNS, FlagParser, add_flags, read_settings

PAGE = "docs/reward-models.md"


def parse(
    types: Sequence[Any],
    arguments: Sequence[str] | None,
    *,
    program: str,
    description: str,
    examples: str,
    further: Collection[str] = (),
) -> tuple[Any, ...]:
    """Parse dataclasses from the command line; `--config FILE.yaml` gives defaults that flags override.

    Args:
        types: Dataclasses with documented fields.
        arguments: The command line; None: `sys.argv`.
        program: Shown in the usage line.
        description: First lines of the help.
        examples: Last lines of the help.
        further: Fields that the help names without a description.

    Raises:
        ValueError: An unreadable configuration file, an unknown key, or a value that a dataclass refuses.
    """
    line = list(sys.argv[1:] if arguments is None else arguments)
    names = ", ".join(f"--{name}" for name in further)
    rest = fill(f"further options ({PAGE}): {names}", COLUMNS, break_on_hyphens=False) + "\n" if further else ""
    parser = FlagParser(program, description, epilog=f"{rest}examples:\n{examples}")
    for kind in types:
        add_flags(parser, kind, hidden=further)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names; flags override it")
    settings = _config_file(line)
    known = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"The configuration file has unknown keys {unknown}. --help lists the known ones.")
    for name, value in settings.items():
        known[name].required = False
        if known[name].nargs == "+" and isinstance(value, dict):
            settings[name] = [f"{ours}={theirs}" for ours, theirs in value.items()]
        elif known[name].nargs == "+" and not isinstance(value, list):
            settings[name] = [value]
    parser.set_defaults(**settings)
    values = vars(parser.parse_args(line))
    parsed = tuple(kind(**{item.name: values[item.name] for item in fields(kind)}) for kind in types)
    _silence_progress_bars()
    return parsed


def run(
    main: Callable[[Sequence[str] | None], object], arguments: Sequence[str] | None = None, *, alone: bool = False
) -> None:
    """Call a command; an error that the user can fix is printed in one line on stderr, with exit status 2.

    Args:
        arguments: The command line; None: `sys.argv`.
        alone: Of several processes that a launcher has started, only the first one works.
    """
    if alone and os.environ.get("RANK", "0") != "0":
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        main(arguments)
    except KeyboardInterrupt:
        sys.exit("Interrupted: nothing was saved but the checkpoints.")
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  a command's answer
        sys.exit(2)


def _silence_progress_bars() -> None:
    """Of loading; the libraries are imported here, because a help does without them."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


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
    paths = [after for flag, after in pairwise(line) if flag == "--config"]
    paths += [flag.removeprefix("--config=") for flag in line if flag.startswith("--config=")]
    return read_settings(paths[-1]) if paths else {}
