"""The command `rlhf-ppo completion`, which prints the words that a shell completes."""

import sys

from rlhf_ppo.cli import COMMANDS
from rlhf_ppo.cli.ppo import option_names

HELP = """usage: rlhf-ppo completion

Prints the commands and the options of `rlhf-ppo ppo`, one a line, for the completion of the shell:
  bash  complete -o default -W "$(rlhf-ppo completion)" rlhf-ppo
  zsh   the same, after: autoload -U bashcompinit && bashcompinit
"""


def main(arguments: list[str]) -> int:
    """Print the words, or the help."""
    words = dict.fromkeys([*" ".join(COMMANDS).split(), *option_names()])
    sys.stdout.write(HELP if arguments else "\n".join(words) + "\n")
    return 0
