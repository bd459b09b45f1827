"""One buffer for a chunk's probabilities and for the LM head's gradient, which overwrites them block by block.

The gradient of a block of the vocabulary is [block, hidden]; until it is known, the block's probabilities are
[rows, block]. The probabilities of all blocks end where the buffer ends, at or behind the end of the gradient. So a
block's gradient covers its own probabilities at most, which its product has read by then. Plain twin: two tensors.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.kernels import memory


class LogitsBuffer:
    """The memory of the head's gradient and of a chunk's probabilities."""

    def __init__(self, head: Float[Tensor, "vocab hidden"], block: int, grad_dtype: torch.dtype | None) -> None:
        """Plan the layout; `allocate` takes the memory.

        Args:
            head: In the dtype of the matrix products, which is that of the probabilities.
            block: Tokens of the vocabulary in a block; the last may have fewer.
            grad_dtype: Of the head's gradient; None where none is computed.
        """
        self.head, self.block, self.dtype = head, block, grad_dtype
        self.blocks = math.ceil(len(head) / block)
        self.gradient: Tensor | None = None
        self.memory = head.new_empty(0)

    @property
    def shared_rows(self) -> int:
        """Rows whose probabilities take no more memory than the gradient; 0 where the two cannot share it."""
        if self.dtype is None or self.dtype.itemsize % self.head.element_size() != 0:
            return 0
        return self.head.shape[1] * self.dtype.itemsize // self.head.element_size()

    def allocate(self, chunks: list[slice], capacity: int = 0) -> None:
        """Allocate for these chunks, which use the buffer one after the other; the first overlaps the gradient.

        `capacity`: elements that another minibatch may need, which then gets the same pages.
        """
        sizes, width = [rows.stop - rows.start for rows in chunks], self.shared_rows
        if self.dtype is None or width == 0 or not chunks:
            self.memory = self.head.new_empty(self.blocks * self.block * max(sizes, default=0))
            self.gradient = None if self.dtype is None else torch.zeros_like(self.head, dtype=self.dtype)
            return
        rows = max(sizes[0], width + max(sizes[1:], default=0))
        size = self.blocks * self.block * rows
        self.memory = memory.empty((size,), like=self.head, capacity=capacity)
        self.gradient = self.memory[: len(self.head) * width].view(self.dtype).view(self.head.shape)

    def overlaps_gradient(self, rows: slice) -> bool:
        """Whether the gradient overwrites this chunk's probabilities: it is then written, not added to."""
        return rows.start == 0 and self.shared_rows > 0

    def probabilities(self, rows: slice) -> Float[Tensor, "blocks rows size"]:
        """View of a chunk's probabilities, at the end of the buffer; the last block may fill only a part of its own."""
        shape = (self.blocks, rows.stop - rows.start, self.block)
        return self.memory[len(self.memory) - math.prod(shape) :].view(shape)
