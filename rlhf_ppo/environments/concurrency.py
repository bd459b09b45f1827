"""Run calls of environments at the same time, each with a time limit, and return results in the order of the calls."""

import asyncio
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from rlhf_ppo.rewards.calls import background_loop


def run_concurrently(
    calls: Sequence[Callable[[], Any]], *, workers: int, timeout: float | None
) -> list[Any | BaseException]:
    """Results of `calls` in their order; the exception in place of the result of a call that raised or timed out.

    A call that exceeds the time limit is abandoned in its daemon thread, and another thread takes its place.

    Args:
        calls: Functions without arguments; they may use `resolve_awaitable` on awaitables.
        workers: Maximum number of calls at the same time.
        timeout: Seconds per call, from its start; None: no limit.
    """
    if workers == 1 and timeout is None:
        return [_result_or_error(call) for call in calls]
    tasks = [_Task(call) for call in calls]
    queue = deque(tasks)
    for _ in range(min(workers, len(tasks))):
        _start_worker(queue)
    for task in tasks:
        if not task.wait(timeout):
            _start_worker(queue)
    return [task.outcome(timeout) for task in tasks]


def resolve_awaitable(result: Any) -> Any:
    """Wait for an awaitable on the process's event loop; return anything else unchanged."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    return asyncio.run_coroutine_threadsafe(wait(), background_loop()).result()


def _result_or_error(call: Callable[[], Any]) -> Any | BaseException:
    try:
        return call()
    except (Exception, SystemExit) as error:  # but not KeyboardInterrupt, which is the user's
        return error


class _Task:
    """One call, its result, and whether it was abandoned."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.future: Future[Any] = Future()
        self.started = threading.Event()
        self.start = 0.0
        self.is_abandoned = False

    def run(self) -> None:
        self.start = time.monotonic()
        self.started.set()
        try:
            self.future.set_result(_result_or_error(self.call))
        except BaseException as error:  # nobody else would hear of it: this is a thread
            self.future.set_result(error)

    def wait(self, timeout: float | None) -> bool:
        """Wait until the call is done; False if it exceeded its time limit and was abandoned."""
        self.started.wait()
        try:
            self.future.result(None if timeout is None else max(0.0, self.start + timeout - time.monotonic()))
        except FutureTimeoutError:
            self.is_abandoned = True
        return not self.is_abandoned

    def outcome(self, timeout: float | None) -> Any | BaseException:
        if self.is_abandoned:
            return TimeoutError(f"no answer within {timeout:g} s")
        return self.future.result()


def _start_worker(queue: deque[_Task]) -> None:
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
