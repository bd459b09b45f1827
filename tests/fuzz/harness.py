"""Runs numbered batches of generated cases against one entry point and judges what comes back.

A case may be accepted or refused. Refused means: an exception of a kind that users are told about, whose message is
ours, and nothing has changed. Everything else is a finding: another exception, Python's own words, a hang.
"""

import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.support.patience import PATIENCE

REFUSALS = (ValueError, TypeError, FloatingPointError)
HANG = PATIENCE
"""Seconds after which a case hangs."""
PYTHONS_OWN_WORDS = re.compile(
    r"not supported between|has no len\(\)|object is not|has no attribute|unsupported operand|not subscriptable"
    r"|unhashable|not iterable|positional argument|could not convert|invalid literal|only one element tensors"
    r"|Expected all tensors|must be real number|cannot unpack|not enough values|cannot be interpreted"
)


class Hang(BaseException):
    """A case took longer than `HANG`."""


class StateChanged(AssertionError):
    """A refused call left something changed."""


@dataclass(kw_only=True)
class Tally:
    """What became of the cases."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """What accepted cases led to, where the target says so -> how often."""
    seconds: float = 0.0
    """Of the processor."""
    longest_ms: float = 0.0
    """Longest case, of the processor."""
    findings: Counter[str] = field(default_factory=Counter)
    """What went wrong -> how often."""
    examples: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """An entry point under test."""

    cases: st.SearchStrategy[Any]
    attempt: Callable[[Any], str | None]
    """Hand a case to the entry point; raises what that raises. May say what came of it."""
    unchanged: Callable[[], bool] = lambda: True
    """Whether everything is as before the refused call."""


def run_batch(target: Target, number: int, size: int) -> Tally:
    """Batch `number` of `size` cases; the same number gives the same cases."""
    tally = Tally()

    @seed(number)
    @settings(
        max_examples=size, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.cases)
    def each(case: Any) -> None:
        _judge(target, case, tally)

    each()
    return tally


def _judge(target: Target, case: Any, tally: Tally) -> None:
    tally.cases += 1
    start = time.process_time()
    previous = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = target.attempt(case)
        tally.accepted += 1
        if outcome is not None:
            tally.outcomes[outcome] += 1
    except REFUSALS as error:
        tally.refused += 1
        if PYTHONS_OWN_WORDS.search(str(error)) or len(str(error)) < 20:
            _note(tally, "not our words", error, case)
        elif not target.unchanged():
            _note(tally, "changed by a refused call", error, case)
    except (Exception, Hang) as error:
        _note(tally, "unexpected", error, case)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    spent = time.process_time() - start
    tally.seconds += spent
    tally.longest_ms = max(tally.longest_ms, 1000 * spent)


def _note(tally: Tally, kind: str, error: BaseException, case: Any) -> None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f"{frames[-1].filename.rsplit('/', 2)[-1]}:{frames[-1].name}" if frames else "?"
    name = f"{kind}: {type(error).__name__} in {where}"
    tally.findings[name] += 1
    tally.examples.setdefault(name, f"{error!s:.300} <- {case!r:.600}")


def _hang(*_: object) -> None:
    raise Hang(f"no end within {HANG:g} s")
