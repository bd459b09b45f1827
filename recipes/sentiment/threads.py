"""How many threads PyTorch should compute with on this machine, now."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

_WORTHWHILE = 0.8  # more threads must take at most this part of the time
_LONG_ENOUGH = 0.3  # seconds for one number of threads, on a machine so busy that every repeat is slow


def choose_threads(
    *, requested: int | None = None, processes: int | None = None, measure: Callable[[int], float] | None = None
) -> int:
    """The number of threads that makes small matrix products fastest, measured in about half a second.

    More is not always faster: when another job holds one of two cores, threads that wait for each other at every
    product can be twenty times slower than one thread. `OMP_NUM_THREADS` is not asked, because `accelerate launch` sets
    it to 1 by itself. It only returns the number: `torch.set_num_threads(choose_threads())` uses it.

    Args:
        requested: Returned as it is, if given.
        processes: How many processes share this machine; `LOCAL_WORLD_SIZE` or `WORLD_SIZE` by default. With more than
            one, each gets one thread.
        measure: Seconds that the products take with so many threads; for tests.

    Raises:
        ValueError: When fewer than one thread is requested.
    """
    if requested is not None:
        if requested < 1:
            raise ValueError(
                f"At least one thread is needed, got {requested}. Leave the number out to have it measured."
            )
        return requested
    if processes is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        return 1
    measure = measure or _product_seconds
    best, best_seconds = 1, measure(1)
    count = 2
    while count <= _available_cores():
        seconds = measure(count)
        if seconds > _WORTHWHILE * best_seconds:
            break
        best, best_seconds = count, seconds
        count *= 2
    return best


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _product_seconds(threads: int, *, repeats: int = 15, products: int = 12) -> float:
    """Median seconds of a dozen dependent products of the size that a small language model is made of."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w = torch.ones(512, 256), torch.full((256, 256), 1 / 256)
        seconds: list[float] = []
        while len(seconds) < repeats and (len(seconds) < 3 or sum(seconds) < _LONG_ENOUGH):
            start = time.perf_counter()
            for _ in range(products):
                x = x @ w
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)
    finally:
        torch.set_num_threads(before)
