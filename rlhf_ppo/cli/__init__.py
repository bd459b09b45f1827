"""The command `rlhf-ppo`: one subcommand per line of `COMMANDS`; its module is imported when it is called."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("rlhf_ppo.cli.run", "run a script written for TRL's classic PPOTrainer (TRL <= 0.11), unchanged"),
}
"""Subcommand -> (module with `main(arguments: list[str]) -> int`, what it does)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments begin with; return its exit status.

    Args:
        arguments: Those after the command's name; None: of this process.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in COMMANDS:
        return int(import_module(COMMANDS[name][0]).main(rest[:-1]))
    is_help = name in ("-h", "--help", "")
    stream = sys.stdout if is_help else sys.stderr
    if not is_help:
        stream.write(f"rlhf-ppo: there is no command {name!r}.\n")
    stream.write("usage: rlhf-ppo COMMAND ...\n\n")
    stream.writelines(f"  {command:<10} {text}\n" for command, (_, text) in COMMANDS.items())
    return 0 if is_help else 2
