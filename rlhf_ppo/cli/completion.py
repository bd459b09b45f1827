"""The command `rlhf-ppo completion`, which prints what a shell needs to complete `rlhf-ppo`."""

import sys

from rlhf_ppo.cli import COMMANDS
from rlhf_ppo.cli.ppo import option_names

COMPLETE = 'complete -o default -W "$(rlhf-ppo completion)" rlhf-ppo'
ZSH = (
    "(( $+functions[compdef] )) || { autoload -U +X compinit && compinit }\n"  # which bashcompinit needs
    f"autoload -U +X bashcompinit && bashcompinit\n{COMPLETE}"
)
SHELLS = {"bash": COMPLETE, "zsh": ZSH}
"""What each shell has to run."""
HELP = """usage: rlhf-ppo completion [bash|zsh]

Prints what a shell needs to complete the commands and the options of `rlhf-ppo ppo`.
Add one of these lines to the startup file of your shell:
  bash  eval "$(rlhf-ppo completion bash)"
  zsh   eval "$(rlhf-ppo completion zsh)"
Without a shell, it prints the words that are completed, one a line.
"""


def main(arguments: list[str]) -> int:
    """Print the words, the line of a shell, or the help."""
    if not arguments:
        words = dict.fromkeys([*" ".join(COMMANDS).split(), *option_names()])
        sys.stdout.write("\n".join(words) + "\n")
    elif arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
    elif len(arguments) == 1 and arguments[0] in SHELLS:
        sys.stdout.write(SHELLS[arguments[0]] + "\n")
    else:
        sys.stderr.write(f"rlhf-ppo completion: expected bash or zsh, got {' '.join(arguments)!r}.\n{HELP}")
        return 2
    return 0
