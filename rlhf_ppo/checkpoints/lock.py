"""Lock a run folder for one run: two would replace each other's checkpoints and mix their metrics."""

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_ppo.checkpoints.folders import read_json, write_json

LOCK_FILE, HOLDER_FILE = ".run.lock", ".run.json"
"""The locked file, which is empty and stays; and a description of the process that locked it, for error messages."""


class FolderInUseError(OSError):
    """Another run uses the folder; the message names its process."""


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Context manager: while active, `folder` is locked against other processes. The same process may lock it again.

    The operating system holds the lock (flock, or its like on Windows) while the process lives: a killed process leaves
    no lock. Between machines it works where the file system supports it, as NFS does with its lock service; where it
    does not, a warning says so and the run continues without a lock.

    Raises:
        FolderInUseError: Another process holds the lock.
    """
    lock = FileLock(folder.resolve() / LOCK_FILE, timeout=0, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(
            f"expected {folder} for this run alone, found another in it, {_holder(folder)}: each would replace the "
            "other's checkpoints and mix its metrics with its own. Wait for that run, stop it, or choose another "
            "output_dir."
        ) from None
    except (NotImplementedError, OSError) as error:
        warnings.warn(
            f"{folder} cannot be locked ({error}): a second run in it would not be refused. Do not start one.",
            stacklevel=3,
        )
        yield
        return
    try:
        with suppress(OSError):
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_json(folder / HOLDER_FILE, {"process": os.getpid(), "machine": platform.node(), "since": now})
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                (folder / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        known = read_json(folder / HOLDER_FILE)
        return f"process {known['process']} on {known['machine']} since {known['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"
