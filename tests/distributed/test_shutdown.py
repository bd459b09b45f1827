"""Leaving: Python must not end while a gloo thread still wants it."""

import atexit
import itertools
import time

import pytest
import torch.distributed as dist

from rlhf_ppo.distributed import shutdown

ASLEEP, RUNNABLE, WOKEN = {"7": ("S", 3)}, {"7": ("R", 3)}, {"7": ("S", 4)}


def looks(monkeypatch: pytest.MonkeyPatch, *states: dict[str, tuple[str, int]]) -> list[int]:
    """Show these states one after the other, the last for ever; counts the looks."""
    shown, count = itertools.chain(states, itertools.repeat(states[-1])), [0]

    def look() -> dict[str, tuple[str, int]]:
        count[0] += 1
        return next(shown)

    monkeypatch.setattr(shutdown, "_worker_states", look)
    return count


def test_a_thread_that_is_runnable_or_has_woken_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits for Python's lock sleeps, too, but wakes between two looks."""
    count = looks(monkeypatch, ASLEEP, RUNNABLE, ASLEEP, WOKEN, WOKEN)
    assert shutdown._wait_until_asleep(pause=0)
    assert count == [5]


def test_a_thread_that_never_rests_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    looks(monkeypatch, RUNNABLE)
    assert not shutdown._wait_until_asleep(limit=0.0, pause=0)


def test_without_gloo_nothing_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    count = looks(monkeypatch, {})
    assert shutdown._wait_until_asleep()
    assert count == [1]


@pytest.mark.skipif(not shutdown._THREADS.is_dir(), reason="no /proc")
def test_gloos_threads_are_known_by_name() -> None:
    """Where torch renames them, nobody would be waited for: this test is to notice, by its time limit."""
    before = len(shutdown._worker_states())
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
    while len(shutdown._worker_states()) == before:  # a thread names itself, as soon as it runs
        time.sleep(0.01)
    del group


def test_asking_twice_registers_one_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(atexit, "register", lambda handler: calls.append("register"))
    monkeypatch.setattr(atexit, "unregister", lambda handler: calls.append("unregister"))
    shutdown.wait_for_gloo_threads()
    assert calls == ["unregister", "register"]
