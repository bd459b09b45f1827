"""The command `rlhf-ppo`: one subcommand per line of `COMMANDS`; its module is imported when it is called."""

import runpy
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

COMMANDS: dict[str, tuple[str, str]] = {
    "ppo": ("rlhf_ppo.cli.ppo", "train a policy, from a YAML file and flags"),
    "reward train": ("reward_model.train", "train a reward model from preferences"),
    "reward evaluate": ("reward_model.evaluate", "report card of a reward model on held-out comparisons"),
    "reward score": ("reward_model.score", "score texts with a reward model"),
    "reward serve": ("reward_model.serve", "serve a reward model over HTTP"),
    "plan": ("rlhf_ppo.plan", "memory and time of a run, before it is started"),
    "doctor": ("rlhf_ppo.cli.doctor", "check that a model is scored as it samples, and which fast paths it takes"),
    "report": ("rlhf_ppo.report", "write the report of a run folder, or serve it while the run trains"),
    "replay": ("rlhf_ppo.replay", "compute a dumped update again"),
    "merge": ("rlhf_ppo.merge", "add LoRA adapters to the weights of their model"),
    "run": ("rlhf_ppo.cli.run", "run a script written for TRL's classic PPOTrainer (TRL <= 0.11), unchanged"),
    "completion": ("rlhf_ppo.cli.completion", "what bash or zsh needs to complete this command"),
}
"""Subcommand -> (module, what it does). Modules of `rlhf_ppo.cli` have `main(arguments) -> int`; the other commands are
`python -m MODULE ...`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments begin with; return its exit status.

    Args:
        arguments: Those after the command's name; None: of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for words in (2, 1):
        if (name := " ".join(given[:words])) in COMMANDS:
            return _run(COMMANDS[name][0], given[words:])
    is_help = not given or given[0] in ("-h", "--help") or given in (["reward"], ["reward", "--help"])
    stream = sys.stdout if is_help else sys.stderr
    if not is_help:
        stream.write(f"rlhf-ppo: there is no command {' '.join(given[:2])!r}.\n")
    stream.write("usage: rlhf-ppo COMMAND ...\n\n")
    stream.writelines(f"  {command:<16} {text}\n" for command, (_, text) in COMMANDS.items())
    stream.write(
        "\nrlhf-ppo COMMAND --help says more. On several processes: accelerate launch -m rlhf_ppo COMMAND ...\n"
    )
    return 0 if is_help else 2


def _run(module: str, arguments: list[str]) -> int:
    if module.startswith("rlhf_ppo.cli."):
        return int(import_module(module).main(arguments))
    before = sys.argv
    sys.argv = [f"python -m {module}", *arguments]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)  # harmless
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    return 0
