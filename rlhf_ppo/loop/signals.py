"""Reasons to stop from outside: signals and a time limit.

Ctrl-C, SIGTERM and SIGUSR1 ask for a stop after the phase that runs; a second one leaves at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_FINISHED, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
EXIT_RESUMABLE = 75
"""Stopped by a signal or the time limit, checkpoint written: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
EXIT_AT_ONCE = 130
"""Left at once, by a second signal or by Ctrl-C outside of training."""


@dataclass
class StopRequest:
    """Whether somebody asked to stop, and by which signal."""

    name: str | None = None

    @property
    def asked(self) -> bool:
        """True once a signal has come."""
        return self.name is not None


class TimeLimit:
    """Says when one more iteration, as long as the longest so far, would end after the limit.

    An iteration lasts from one question to the next: its evaluation and its checkpoint count.

    Args:
        seconds: From now; None: without a limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._asked = time.monotonic()
        self._end = None if seconds is None else self._asked + seconds
        self._longest = 0.0

    def is_near(self) -> bool:
        """Asked once after each iteration."""
        now = time.monotonic()
        self._longest, self._asked = max(self._longest, now - self._asked), now
        return self._end is not None and now + self._longest > self._end


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the first SIGINT, SIGTERM or SIGUSR1, raise KeyboardInterrupt on the second; restore the handlers."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signal handlers belong to the main thread
        return

    def note(number: int, _: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name
        os.write(2, b"\nStopping soon, with a checkpoint. Once more: at once, without.\n")

    # SIGUSR1 is what `sbatch --signal=USR1@120` sends before the time of a job is up; Windows does not have it.
    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    before = {known: signal.signal(known, note) for name in names if (known := getattr(signal, name, None)) is not None}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
