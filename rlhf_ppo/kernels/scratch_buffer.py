"""Results that live for one turn of a loop, where those of the turn before have stood.

A heap seldom gives a block the place of one of the same size that has just gone: the edges have been given away, and a
loop over blocks then walks through ever new memory.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes by which a tensor begins, as torch's own do."""


class ScratchBuffer:
    """Memory for one turn, as large as the largest turn so far.

    Args:
        device: Where results are.
        reuse: False: each result has memory of its own, because torch's allocator finds it the same place (on a GPU).
    """

    def __init__(self, device: torch.device, *, reuse: bool = True) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.used, self.reuse = 0, reuse

    def reset(self) -> None:
        """Start a turn: what came of the turn before is overwritten."""
        if self.reuse and self.used > len(self.memory):
            self.memory = self.memory.new_empty(self.used)
        self.used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor for this turn."""
        size = math.prod(shape) * dtype.itemsize
        start, self.used = self.used, self.used + math.ceil(size / ALIGNMENT) * ALIGNMENT
        if start + size > len(self.memory):
            return self.memory.new_empty(shape, dtype=dtype)
        return self.memory[start : start + size].view(dtype).view(*shape)
