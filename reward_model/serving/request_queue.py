"""Run the server's requests one at a time; equal ones share a run, abandoned ones are dropped."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

KEPT_ANSWERS = 64
"""Last answers that are kept: a client that timed out and asks again gets its answer at once."""

GRACE = 0.01
"""Seconds before a request may run, in which the departure of a client that closed after sending is noticed."""


class QueueFullError(RuntimeError):
    """More requests wait than the server accepts."""


@dataclass(kw_only=True)
class _Job:
    task: "asyncio.Task[list[float]]"
    clients: int = 0
    running: bool = False


class RequestQueue:
    """Runs requests one at a time, in the order of their arrival.

    A request whose clients have all left while it waited is dropped. Requests with the same key share one run, and its
    answer is kept for the next request with that key: the server cannot know whether a client that left had read it.
    """

    def __init__(self, *, max_waiting: int) -> None:
        """Set up an empty queue.

        Args:
            max_waiting: Most requests that wait or run.
        """
        self.max_waiting = max_waiting
        self._turn = asyncio.Lock()
        self._jobs: dict[str, _Job] = {}

    async def answer(self, key: str, run: Callable[[], list[float]]) -> list[float]:
        """Wait for the answer to the request `key`; `run` computes it, in a thread.

        Raises:
            QueueFullError: `max_waiting` other requests wait or run.
        """
        job = self._jobs.get(key)
        if job is None:
            if sum(not job.task.done() for job in self._jobs.values()) >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already. Ask again later.")
            job = _Job(task=asyncio.create_task(self._run(key, run)))
            self._jobs[key] = job
        job.clients += 1
        try:
            return await asyncio.shield(job.task)
        finally:
            job.clients -= 1
            if not job.clients:
                self._leave(key, job)

    async def _run(self, key: str, run: Callable[[], list[float]]) -> list[float]:
        await asyncio.sleep(GRACE)
        async with self._turn:
            await asyncio.sleep(0)  # clients that left while the last request ran are noticed before this one runs
            self._jobs[key].running = True
            return await asyncio.to_thread(run)

    def _leave(self, key: str, job: _Job) -> None:
        """After its last client: drop a job that waits; keep the answer of one that ran: it may not have been read."""
        if job.running:
            job.task.add_done_callback(lambda task: self._keep(key, job))
            return
        job.task.cancel()
        self._forget(key, job)

    def _keep(self, key: str, job: _Job) -> None:
        """Keep the answer; forget the oldest ones, and failures."""
        if job.task.cancelled() or job.task.exception() is not None:
            self._forget(key, job)
        kept = [(name, other) for name, other in self._jobs.items() if other.task.done() and not other.clients]
        for name, other in kept[:-KEPT_ANSWERS]:
            self._forget(name, other)

    def _forget(self, key: str, job: _Job) -> None:
        if self._jobs.get(key) is job:
            del self._jobs[key]
