"""A process that holds a run folder, as a second run would."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ppo.checkpoints.lock import LOCK_FILE

HOLD = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"


@contextmanager
def another_run_in(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock until it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder.resolve() / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()
