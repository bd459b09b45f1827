"""How several processes leave without an accident."""

import atexit
import re
import time
from pathlib import Path

WORKER_NAME = "pt_gloo_runloop"
"""How Linux shows a thread that runs gloo's collectives."""

_THREADS = Path("/proc/self/task")
_STATUS = re.compile(
    rf"^Name:\t{WORKER_NAME}$.*^State:\t(?P<state>\w).*^voluntary_ctxt_switches:\t(?P<sleeps>\d+)$",
    re.MULTILINE | re.DOTALL,
)


def wait_for_gloo_threads() -> None:
    """From now on, Python ends only after gloo's threads have put their last tensor down.

    `all_reduce` returns as soon as the result is there; the thread that computed it may still hold the tensors. If it
    lets go of one while Python is ending, it needs the interpreter's lock, is refused it for ever, and the process dies
    of "terminate called without an active exception": rarely, on a busy machine, after all work is done. Ending the
    process group does not help where anything else refers to it, and modules of torch itself do.
    """
    atexit.unregister(_wait_for_workers)
    atexit.register(_wait_for_workers)


def _wait_for_workers(limit: float = 60.0, pause: float = 0.02) -> bool:
    """Whether all of gloo's threads are asleep between two looks; a thread that waits for Python's lock is not.

    During each pause the lock is free: a thread that wants it is runnable or has run, and both can be seen. `pause`
    must exceed the 5 ms after which such a thread asks again. Where there is no /proc, nothing is known or awaited.
    """
    end = time.monotonic() + limit
    before = _workers()
    while before:
        time.sleep(pause)
        now = _workers()
        if now == before and all(state == "S" for state, _ in now.values()):
            return True
        if time.monotonic() > end:
            return False
        before = now
    return True


def _workers() -> dict[str, tuple[str, int]]:
    """State and number of sleeps of each of gloo's threads."""
    found = {}
    for status in _THREADS.glob("*/status"):
        try:
            match = _STATUS.search(status.read_text())
        except OSError:  # the thread has just ended
            continue
        if match:
            found[status.parent.name] = match["state"], int(match["sleeps"])
    return found
