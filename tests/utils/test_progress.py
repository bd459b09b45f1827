"""Progress bars on terminals of two widths, and where there is none."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios
from typing import Any

import pytest

from rlhf_ppo.utils import progress
from rlhf_ppo.utils.progress import ProgressBar

NUMBERS = {"reward": "-0.12", "kl": "10.5", "length": "24"}


def on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a terminal of this width was sent, split at the returns to its first column."""
    monkeypatch.setenv("COLUMNS", str(columns))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as file:
        with ProgressBar(total=50, desc="PPO", unit="it", file=file, mininterval=0) as bar:
            bar.set_postfix(NUMBERS, refresh=False)
            bar.update(25)
    sent = b""
    with contextlib.suppress(OSError):  # all is read, and the other side closed
        while True:
            sent += os.read(ours, 100_000)
    os.close(ours)
    return [line for line in sent.decode().replace("\n", "\r").split("\r") if line]


@pytest.mark.parametrize("columns", [60, 120])
def test_a_bar_fits_its_terminal_with_its_numbers_and_without_color(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = on_a_terminal(columns, monkeypatch)
    assert all(len(line) <= columns for line in lines) and "\x1b" not in "".join(lines)
    assert "25/50" in lines[-1] and "reward=-0.12, kl=10.5, length=24" in lines[-1]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_without_a_terminal_it_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    options: dict[str, Any] = {"total": 50, "desc": "PPO", "unit": "it", "file": file, "mininterval": 0}
    with ProgressBar(**options) as bar:
        for step in range(50):
            clock.now += progress.SECONDS_BETWEEN_LINES / 16  # exact in binary
            bar.update()
            bar.set_postfix(step=step)
    lines = file.getvalue().split("\n")
    assert [line.partition(" it in ")[0] for line in lines] == [
        *(f"PPO: {done} of 50" for done in (16, 32, 48, 50)),
        "",
    ]
    assert "\r" not in file.getvalue() and lines[0].endswith(", step=14") and lines[3].endswith(", step=49")


def test_a_bar_that_is_off_says_nothing() -> None:
    file = io.StringIO()
    with ProgressBar(total=3, desc="PPO", file=file, disable=True) as bar:
        bar.update(3)
        bar.set_postfix(step=1)
    assert file.getvalue() == ""
