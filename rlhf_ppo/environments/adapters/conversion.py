"""What adapters share: observations for chat models, numbers to log, and random numbers of one's own."""

import math
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_ppo.environments.base import RESERVED, Observation


def as_observation(text: str, *, chat: bool) -> Observation:
    """A text as it is, or as the message of a user."""
    return [{"role": "user", "content": text}] if chat else text


def finite_numbers(info: Mapping[str, Any] | None) -> dict[str, float]:
    """The entries that can be logged: finite numbers and truth values; `reported_` before names of the trainer's."""
    numbers = {name: value for name, value in (info or {}).items() if isinstance(value, bool | int | float)}
    named = {f"reported_{name}" if name in RESERVED else str(name): float(value) for name, value in numbers.items()}
    return {name: value for name, value in named.items() if math.isfinite(value)}


_GLOBAL_GENERATORS = threading.RLock()


@dataclass
class IsolatedRandomState:
    """A stream of Python's and NumPy's global generators that belongs to one environment.

    Libraries that call `random.seed(seed)` change the numbers of the whole process, and environments that run at the
    same time disturb each other. Calls inside `active()` run one at a time, go on with the environment's own stream,
    and leave the global generators as they were.
    """

    seed: int
    _state: tuple[Any, Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context manager: while active, the global generators give the numbers of this stream."""
        with _GLOBAL_GENERATORS:
            before = random.getstate(), np.random.get_state()
            if self._state is None:
                random.seed(self.seed)
                np.random.seed(self.seed % 2**32)
            else:
                _set_state(self._state)
            try:
                yield
            finally:
                self._state = random.getstate(), np.random.get_state()
                _set_state(before)


def _set_state(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
