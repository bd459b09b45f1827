"""Start a script on several processes, with a hard end: a hang is a failure with its output, never a stuck suite."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def free_port() -> str:
    """One that nobody on this machine listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(processes: int, script: Path, *arguments: str, timeout: float = PATIENCE) -> str:
    """Run `script` under torchrun; returns its output.

    Args:
        processes: How many.
        script: A Python file.
        arguments: Of the script.
        timeout: Seconds until all processes are killed.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    return launch((*launcher, str(script), *arguments), timeout=timeout)


def launch_file(
    name: str,
    script: Path,
    *arguments: str,
    processes: int = 2,
    mixed_precision: str = "no",
    expect: int = 0,
) -> str:
    """Run `script` under `accelerate launch` with a file of recipes/launch, for this many CPU processes; its output.

    Args:
        name: Of the file, without its ending.
        script: A Python file.
        arguments: Of the script.
        processes: How many.
        mixed_precision: Instead of the file's.
        expect: 0, or anything else for a failure.
    """
    launcher = ("-m", "accelerate.commands.launch", "--main_process_port", "0")  # 0: any that is free
    file = ("--config_file", str(ROOT / "recipes" / "launch" / f"{name}.yaml"))
    size = ("--num_processes", str(processes), "--mixed_precision", mixed_precision)
    use_cpu = not name.startswith("zero")  # under DeepSpeed that would be refused
    return launch((*launcher, *file, *size, str(script), *arguments), use_cpu=use_cpu, expect=expect)


def launch(command: Sequence[str], *, timeout: float = PATIENCE, use_cpu: bool = True, expect: int = 0) -> str:
    """Run `python` with these arguments in a process group of its own; returns what it printed.

    Raises:
        AssertionError: If it does not end in time, or ends with another status than `expect`.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "recipes")))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("ACCELERATE_USE_CPU", None)
    if use_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{output[-6000:]}") from None
    assert (process.returncode == 0) == (expect == 0), f"status {process.returncode}:\n{output[-6000:]}"
    return output
