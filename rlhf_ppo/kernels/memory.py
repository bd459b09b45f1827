"""Large tensors that come and go with every minibatch, in pages of their own.

On the heap such a tensor finds the place that it left only if nothing has settled there since; where something has, the
heap grows by as much again. Pages of its own go from one tensor to the next, and back to the kernel in the end.
"""

import math
import mmap
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

MIN_BYTES = 16 * 2**20
"""Bytes below which a tensor stays on the heap, where it finds a hole."""

_spare: list[mmap.mmap] | None = None
"""Pages whose tensor is gone; None where they are given back at once."""


@contextmanager
def reuse_memory() -> Iterator[None]:
    """Context manager: while active, freed pages are kept for the next tensor; the kernel need not clear them again."""
    global _spare
    before, _spare = _spare, [] if _spare is None else _spare
    try:
        yield
    finally:
        _spare = before


def empty(shape: Sequence[int], *, like: Tensor, capacity: int = 0) -> Tensor:
    """`like.new_empty(shape)`, in pages of its own where it is large and on a CPU.

    Args:
        shape: Of the tensor.
        like: Gives dtype and device.
        capacity: Elements that a later one may have: the pages are then enough for it. Untouched, they cost nothing.
    """
    count, size = math.prod(shape), like.element_size()
    plain = type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu"
    if count * size < MIN_BYTES or not plain or not sys.platform.startswith("linux"):
        return like.new_empty(shape)
    try:
        pages = _pages(max(count, capacity) * size)
    except OSError:  # no address space for what may come later
        return like.new_empty(shape)
    # The tensor keeps the view alive, and nothing else does: with its end the pages are free.
    view = memoryview(pages)
    weakref.finalize(view, _give_back, pages).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=count).view(*shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another dtype, in pages of its own where it is large and on a CPU; `x` itself where it has that dtype."""
    return x if x.dtype == dtype else empty(x.shape, like=x.detach().new_empty(0, dtype=dtype)).copy_(x)


def _pages(size: int) -> mmap.mmap:
    """Spare ones of just that size, or new ones: a small tensor must not take the place of a large one."""
    spare = _spare or []
    for pages in spare:
        if len(pages) == size:
            spare.remove(pages)
            return pages
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _give_back(pages: mmap.mmap) -> None:
    spare = _spare  # once: the last tensor may end on another thread
    if spare is not None:
        spare.append(pages)
