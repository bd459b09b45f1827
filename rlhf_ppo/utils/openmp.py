"""For `rlhf-ppo`, `python -m rlhf_ppo...` and `python -m reward_model...`: waiting threads spin only shortly.

OpenMP reads this from the environment once, while torch is loaded, so the packages import this module before torch.
A program that imports them keeps its environment as it is.
"""

import os
import sys
from pathlib import Path

SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""GNU's libgomp: rounds of waiting before a thread sleeps; LLVM's and Intel's libomp: milliseconds."""


def spin_shortly() -> None:
    """Set `SHORT_SPIN` unless the user has chosen how threads wait."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", *SHORT_SPIN}:
        os.environ.update(SHORT_SPIN)


def is_command(arguments: list[str]) -> bool:
    """Whether these arguments of the interpreter run the command `rlhf-ppo`, or a module of ours with `-m`."""
    module = arguments[arguments.index("-m") + 1 :][:1] if "-m" in arguments else []
    scripts = (Path(name).stem for name in arguments[1:2])
    return "rlhf-ppo" in scripts or any(name.split(".")[0] in ("rlhf_ppo", "reward_model") for name in module)


if is_command(sys.orig_argv):
    spin_shortly()
