"""`rlhf-ppo run SCRIPT ...`: run a script for TRL's classic trainer, beside the installed `trl`, without a change."""

import runpy
import sys
from pathlib import Path

USAGE = """usage: rlhf-ppo run SCRIPT [arguments of the script ...]
       rlhf-ppo run -m MODULE [arguments of the module ...]

Runs a script, or a module, that was written for TRL <= 0.11: the names that `trl` has lost are lent
to it (`import rlhf_ppo.compat`). On several processes: accelerate launch -m rlhf_ppo run SCRIPT ...
"""


def main(arguments: list[str]) -> int:
    """Run the script or module as `python` would; return the exit status of a wrong call, else 0."""
    name, *rest = [*arguments, ""]
    rest = rest[:-1]
    is_module = name == "-m" and bool(rest)
    if name in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if not is_module and not Path(name).is_file():
        problem = "name a script" if name in ("", "-m") else f"there is no script {name!r}"
        sys.stderr.write(f"rlhf-ppo run: {problem}.\n{USAGE}")
        return 2
    import rlhf_ppo.compat  # noqa: F401  # torch comes with it

    if is_module:
        sys.argv = rest
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [name, *rest]
        sys.path.insert(0, str(Path(name).resolve().parent))
        runpy.run_path(name, run_name="__main__")
    return 0
