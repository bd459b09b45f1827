"""Context managers around the phases of a step: wall time and CUDA cache."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def timed(timing: dict[str, float], name: str) -> Iterator[None]:
    """Context manager: write the block's wall time in seconds to `timing[name]`; on a GPU its work is waited for."""
    _wait_for_gpu()
    start = time.perf_counter()
    yield
    _wait_for_gpu()
    timing[name] = time.perf_counter() - start


def _wait_for_gpu() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def empty_cache_after(enabled: bool) -> Iterator[None]:
    """Context manager: call `torch.cuda.empty_cache` after the block, if `enabled`."""
    yield
    if enabled and torch.cuda.is_available():
        torch.cuda.empty_cache()
