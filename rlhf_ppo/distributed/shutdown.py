"""Wait for gloo's threads before the interpreter exits."""

import atexit
import re
import time
from pathlib import Path

WORKER_NAME = "pt_gloo_runloop"
"""Linux thread name of gloo's collective workers."""

_THREADS = Path("/proc/self/task")
_STATUS = re.compile(
    rf"^Name:\t{WORKER_NAME}$.*^State:\t(?P<state>\w).*^voluntary_ctxt_switches:\t(?P<sleeps>\d+)$",
    re.MULTILINE | re.DOTALL,
)


def wait_for_gloo_threads() -> None:
    """Register an exit handler that waits until gloo's threads have released their last tensor.

    `all_reduce` returns as soon as the result is there; the thread that computed it may still hold the tensors. If it
    releases one while Python shuts down, it cannot get the GIL any more, and the process aborts with "terminate called
    without an active exception": rarely, on a busy machine, after all work is done. Destroying the process group does
    not help while anything else refers to it, and modules of torch itself do.
    """
    atexit.unregister(_wait_until_asleep)
    atexit.register(_wait_until_asleep)


def _wait_until_asleep(limit: float = 60.0, pause: float = 0.02) -> bool:
    """Wait until all of gloo's threads sleep through one pause; return False after `limit` seconds.

    During a pause the GIL is free: a thread that wants it is runnable or has run, and /proc shows both. `pause`
    (seconds) must exceed the 5 ms after which such a thread asks again. Without /proc there is no wait.
    """
    deadline = time.monotonic() + limit
    previous = _worker_states()
    while previous:
        time.sleep(pause)
        current = _worker_states()
        if current == previous and all(state == "S" for state, _ in current.values()):
            return True
        if time.monotonic() > deadline:
            return False
        previous = current
    return True


def _worker_states() -> dict[str, tuple[str, int]]:
    """Thread id -> (state, number of voluntary context switches) of each gloo thread."""
    states = {}
    for status in _THREADS.glob("*/status"):
        try:
            match = _STATUS.search(status.read_text())
        except OSError:  # the thread has just ended
            continue
        if match:
            states[status.parent.name] = match["state"], int(match["sleeps"])
    return states
