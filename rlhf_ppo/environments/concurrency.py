"""Run calls of environments at the same time, each with a time limit, and return results in the order of the calls."""

import asyncio
import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

from rlhf_ppo.rewards.calls import background_loop


def run_concurrently(
    calls: Sequence[Callable[[], Any]],
    *,
    workers: int,
    timeout: float | None,
    after_late: Sequence[Callable[[], Any]] | None = None,
) -> list[Any | BaseException]:
    """Results of `calls` in their order; the exception in place of the result of a call that raised or timed out.

    A call that exceeds the time limit is abandoned in its daemon thread, and another thread takes its place. The time
    in which it waits for others (`running_call().waiting()`) does not count.

    Args:
        calls: Functions without arguments; they may use `resolve_awaitable` on awaitables.
        workers: Maximum number of calls at the same time.
        timeout: Seconds per call, from its start; None: no limit.
        after_late: For each call, what is called in its thread when it ends after it was abandoned; None: nothing.
    """
    if workers == 1 and timeout is None:
        return [_result_or_error(call) for call in calls]
    tasks = [Task(call, timeout) for call in calls]
    queue = deque(tasks)
    for _ in range(min(workers, len(tasks))):
        _start_worker(queue)
    for index, task in enumerate(tasks):
        if not task.wait():
            _start_worker(queue)
            if after_late is not None:  # at once, if the call has ended meanwhile
                task.future.add_done_callback(partial(_ignore_result, after_late[index]))
    return [task.outcome() for task in tasks]


def running_call() -> "Task | None":
    """The call that `run_concurrently` runs in this thread; None outside."""
    return getattr(_THREAD, "task", None)


_THREAD = threading.local()


def resolve_awaitable(result: Any) -> Any:
    """Wait for an awaitable on the process's event loop; return anything else unchanged."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    return asyncio.run_coroutine_threadsafe(wait(), background_loop()).result()


def _ignore_result(call: Callable[[], Any], _: Future[Any]) -> None:
    call()


def _result_or_error(call: Callable[[], Any]) -> Any | BaseException:
    try:
        return call()
    except (Exception, SystemExit) as error:  # but not KeyboardInterrupt, which is the user's
        return error


class Task:
    """One call, its time limit in seconds, its result, and whether it was abandoned."""

    def __init__(self, call: Callable[[], Any], timeout: float | None) -> None:
        self.call = call
        self.timeout = math.inf if timeout is None else timeout
        self.future: Future[Any] = Future()
        self.started = threading.Event()
        self.start = 0.0
        self.is_abandoned = False

    def run(self) -> None:
        self.start = time.monotonic()
        _THREAD.task = self
        self.started.set()
        try:
            self.future.set_result(_result_or_error(self.call))
        except BaseException as error:  # nobody else would hear of it: this is a thread
            self.future.set_result(error)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager: while active, the time of the call stands still."""
        before, self.start = time.monotonic() - self.start, math.inf
        try:
            yield
        finally:
            self.start = time.monotonic() - before

    def is_overdue(self) -> bool:
        """Whether the call has used more time than it may."""
        return time.monotonic() > self.start + self.timeout

    def wait(self) -> bool:
        """Wait until the call is done; False if it exceeded its time limit and was abandoned."""
        self.started.wait()
        while not (self.future.done() or self.is_overdue()):
            seconds = self.start + self.timeout - time.monotonic()
            wait([self.future], None if self.timeout == math.inf else min(max(0.0, seconds), 1.0))  # it may start later
        self.is_abandoned = not self.future.done()
        return not self.is_abandoned

    def outcome(self) -> Any | BaseException:
        if self.is_abandoned:
            return TimeoutError(f"no answer within {self.timeout:g} s")
        return self.future.result()


def _start_worker(queue: deque[Task]) -> None:
    def work() -> None:
        while True:
            try:
                task = queue.popleft()
            except IndexError:
                return
            task.run()
            if task.is_abandoned:
                return  # another thread has taken its place

    threading.Thread(target=work, name="environment", daemon=True).start()
