"""Progress bars that stay readable on narrow terminals and where there is no terminal."""

import shutil
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
NARROW = 80
"""Columns below which the bar itself is left out, so that the numbers fit."""


class ProgressBar(tqdm):  # type: ignore[misc]
    """A bar on a terminal; in a file or a pipe, such as the log of a CI job, a line now and then."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        options.setdefault("dynamic_ncols", True)
        if shutil.get_terminal_size().columns < NARROW:
            options["bar_format"] = "{desc} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or write a line where it is time for one and at the end."""
        if self.fp.isatty():
            return bool(super().display(msg, pos))
        if msg is None and (self.disable or time.monotonic() >= self._next_line):  # disabled: it is being closed
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            facts = self.format_dict
            numbers = f", {facts['postfix']}" if facts["postfix"] else ""
            seconds = self.format_interval(facts["elapsed"])
            line = f"{self.desc.removesuffix(': ')}: {self.n} of {self.total} {self.unit} in {seconds}{numbers}"
            self.fp.write(line if self.disable else f"{line}\n")  # tqdm ends the last line itself
        return False
