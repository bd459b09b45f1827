"""One run a folder: two would replace each other's checkpoints and mix their metrics."""

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_ppo.checkpoints.folders import read_json, write_json

LOCK, HOLDER = ".run.lock", ".run.json"
"""The file that is locked, which stays and says nothing; and who has locked it, for the message alone."""


class FolderInUseError(OSError):
    """Another run writes into the folder; the message says which."""


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Inside, no other process that asks runs in `folder`. The same process may ask again.

    The operating system holds the lock (flock, or its like on Windows) for as long as the process lives: one that was
    killed leaves nothing that blocks. Between machines it holds where the file system passes locks on, as NFS does with
    its lock service; where it knows none, a warning says so and the run goes on without.

    Raises:
        FolderInUseError: Another process is inside.
    """
    lock = FileLock(folder.resolve() / LOCK, timeout=0, thread_local=False, is_singleton=True)
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
            f"{folder} cannot be locked ({error}): nothing keeps a second run out of it. Start none.", stacklevel=3
        )
        yield
        return
    try:
        with suppress(OSError):
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_json(folder / HOLDER, {"process": os.getpid(), "machine": platform.node(), "since": now})
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        known = read_json(folder / HOLDER)
        return f"process {known['process']} on {known['machine']} since {known['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has not said its name"
