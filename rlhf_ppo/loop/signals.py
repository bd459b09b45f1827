"""Stop the managed loop by signals and by a time limit; exit codes of the recipes.

Ctrl-C, SIGTERM and SIGUSR1 request a stop after the current phase; a second one raises KeyboardInterrupt.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

EXIT_FINISHED, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
EXIT_RESUMABLE = 75
"""Stopped by a signal or the time limit, checkpoint written: the same command resumes (EX_TEMPFAIL of sysexits.h)."""
EXIT_ABORTED = 130
"""Aborted by a second signal, or by Ctrl-C outside of training."""


@dataclass
class StopRequest:
    """Whether a signal has requested a stop, and which."""

    signal_name: str | None = None

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None


class TimeLimit:
    """Predicts whether one more iteration, as long as the longest so far, would exceed a time limit.

    An iteration lasts from one call of `is_near` to the next, evaluation and checkpoint included.

    Args:
        seconds: Limit, from now; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._last_call = time.monotonic()
        self._end = None if seconds is None else self._last_call + seconds
        self._longest = 0.0

    def is_near(self) -> bool:
        """Whether one more iteration would exceed the limit; call it once after each iteration."""
        now = time.monotonic()
        self._longest, self._last_call = max(self._longest, now - self._last_call), now
        return self._end is not None and now + self._longest > self._end


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Context manager: while active, the first SIGINT, SIGTERM or SIGUSR1 sets the request, the second one raises.

    The second raises KeyboardInterrupt. The handlers are restored at the end; outside the main thread there are none.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signal handlers belong to the main thread
        return

    def handle(number: int, _: FrameType | None) -> None:
        if request.is_set:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name
        with suppress(OSError):  # such as EPIPE: `tee` of a pipeline got the signal, too, and has ended
            os.write(2, b"\nStopping soon, with a checkpoint. Once more: at once, without.\n")

    with handled_signals(handle):
        yield request


@contextmanager
def handled_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context manager: while active, `handle` gets SIGINT, SIGTERM and SIGUSR1; the handlers before are restored."""
    # SIGUSR1 is what `sbatch --signal=USR1@120` sends before the time of a job is up; Windows does not have it.
    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    numbers = [number for name in names if (number := getattr(signal, name, None)) is not None]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
