"""Seconds and memory around the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def timed(timing: dict[str, float], name: str) -> Iterator[None]:
    """Write the seconds of the block into `timing[name]`."""
    start = time.perf_counter()
    yield
    timing[name] = time.perf_counter() - start


@contextmanager
def empty_cache_after(wanted: bool) -> Iterator[None]:
    """Give the device's unused memory back after the block, where that is wanted."""
    yield
    if wanted and torch.cuda.is_available():
        torch.cuda.empty_cache()
