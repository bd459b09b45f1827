"""What adapters share: observations for chat models, numbers to log, and random numbers of one's own."""

import math
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_ppo.environments.base import RESERVED, Observation, single_item
from rlhf_ppo.environments.concurrency import Task, running_call


def as_observation(text: str, *, chat: bool) -> Observation:
    """A text as it is, or as the message of a user."""
    return [{"role": "user", "content": text}] if chat else text


def finite_numbers(info: Mapping[str, Any] | None) -> dict[str, float]:
    """The entries that can be logged: finite numbers and truth values; `reported_` before names of the trainer's."""
    items = {name: single_item(value) for name, value in (info or {}).items()}
    numbers = {name: value for name, value in items.items() if isinstance(value, bool | int | float)}
    named = {f"reported_{name}" if name in RESERVED else str(name): float(value) for name, value in numbers.items()}
    return {name: value for name, value in named.items() if math.isfinite(value)}


@dataclass(eq=False)
class _Loan:
    """The global generators in the hands of one call."""

    before: tuple[Any, Any]
    """State to put back."""
    outer: "_Loan | None"
    """The loan of the same thread that this one is within."""
    thread: int = field(default_factory=threading.get_ident)
    call: Task | None = field(default_factory=running_call)

    def is_own(self) -> bool:
        return self.thread == threading.get_ident()

    def has_lapsed(self) -> bool:
        return self.call is not None and self.call.is_overdue()

    def first_state(self) -> tuple[Any, Any]:
        return self.before if self.outer is None else self.outer.first_state()


class _GlobalGenerators:
    """Python's and NumPy's global generators, lent to one call at a time, and taken from one beyond its time limit."""

    def __init__(self) -> None:
        self._returned = threading.Condition()
        self._loan: _Loan | None = None

    def borrow(self) -> _Loan:
        """Wait for the generators; the time does not count as the call's."""
        call = running_call()
        with self._returned, nullcontext() if call is None else call.waiting():
            while (loan := self._loan) and not loan.is_own() and not loan.has_lapsed():
                self._returned.wait(0.1)  # a loan lapses without a sign
            if loan is None or loan.is_own():
                self._loan = _Loan(_state(), outer=loan)
            else:
                self._loan = _Loan(loan.first_state(), outer=None)
            return self._loan

    def give_back(self, loan: _Loan) -> None:
        """Put the former state back; a TimeoutError where another call has taken the generators meanwhile."""
        with self._returned:
            if self._loan is not loan:
                raise TimeoutError("no answer within the time limit, after which other calls drew random numbers")
            _set_state(loan.before)
            self._loan = loan.outer
            self._returned.notify()


_GENERATORS = _GlobalGenerators()


@dataclass
class IsolatedRandomState:
    """A stream of Python's and NumPy's global generators that belongs to one environment.

    Libraries that call `random.seed(seed)` change the numbers of the whole process, and environments that run at the
    same time disturb each other. Calls inside `active()` run one at a time, go on with the environment's own stream,
    and leave the global generators as they were. One that exceeds its time limit no longer keeps others waiting.
    """

    seed: int
    _state: tuple[Any, Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context manager: while active, the global generators give the numbers of this stream."""
        loan = _GENERATORS.borrow()
        if self._state is None:
            random.seed(self.seed)
            np.random.seed(self.seed % 2**32)
        else:
            _set_state(self._state)
        try:
            yield
        finally:
            self._state = _state()
            _GENERATORS.give_back(loan)


def _state() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_state(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
