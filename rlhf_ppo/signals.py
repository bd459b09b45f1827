"""Ctrl-C and SIGTERM ask for a stop at the end of the iteration; a second one leaves at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


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
    """Note the first SIGINT or SIGTERM, raise KeyboardInterrupt on the second; restore the handlers afterwards."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signal handlers belong to the main thread
        return

    def note(number: int, _: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name
        os.write(2, b"\nStopping after this iteration, with a checkpoint. Once more: at once, without.\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
