"""A buffer for the temporary tensors of a loop: those of each iteration reuse the memory of the previous iteration.

A heap seldom gives a tensor the place of a freed one of the same size, because small objects take the edges of the
hole. A loop over blocks would then use ever new memory.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes by which a tensor begins, as torch's own do."""


class ScratchBuffer:
    """Memory for the tensors of one iteration, as large as the largest iteration so far.

    Args:
        device: Where results are.
        reuse: False: each result has memory of its own, because torch's allocator finds it the same place (on a GPU).
    """

    def __init__(self, device: torch.device, *, reuse: bool = True) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.used, self.reuse = 0, reuse

    def reset(self) -> None:
        """Start an iteration: the tensors of the previous one are overwritten."""
        if self.reuse and (needed := self.used) > len(self.memory):
            self.release()  # before the larger memory comes
            self.memory = self.memory.new_empty(needed)
        self.used = 0

    def release(self) -> None:
        """Give the memory back; the next loop starts with none."""
        self.memory, self.used = self.memory.new_empty(0), 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor for this iteration."""
        size = math.prod(shape) * dtype.itemsize
        start, self.used = self.used, self.used + math.ceil(size / ALIGNMENT) * ALIGNMENT
        if start + size > len(self.memory):
            return self.memory.new_empty(shape, dtype=dtype)
        return self.memory[start : start + size].view(dtype).view(*shape)
