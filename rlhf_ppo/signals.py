"""Ctrl-C, SIGTERM and SIGUSR1 ask for a stop after the phase that runs; a second one leaves at once."""

import os
import signal
import threading
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
        os.write(2, b"\nStopping after this phase, with a checkpoint. Once more: at once, without.\n")

    # SIGUSR1 is what `sbatch --signal=USR1@120` sends before the time of a job is up; Windows does not have it.
    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    before = {known: signal.signal(known, note) for name in names if (known := getattr(signal, name, None)) is not None}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
