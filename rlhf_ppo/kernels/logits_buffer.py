"""Where probabilities wait for the loss: in the room of the head's gradient, a step ahead of it, and as far beyond as
the rest needs.

The gradient of a block of the vocabulary is [block, hidden]; until it is known, the block's probabilities are
[rows, block]. Both go through one piece of memory from the front to the back: a block's gradient is written where only
probabilities of blocks before it have stood.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.kernels import memory


class Room:
    """One piece of memory for the head's gradient and for a chunk's probabilities."""

    def __init__(self, head: Float[Tensor, "vocab hidden"], block: int, gradient: torch.dtype | None) -> None:
        """Plan, and take no memory yet.

        Args:
            head: In the products' dtype, which is that of the probabilities.
            block: Tokens of the vocabulary in a block; the last may have fewer.
            gradient: Dtype of the head's gradient; None where none is taken.
        """
        self.head, self.block, self.dtype = head, block, gradient
        self.blocks = math.ceil(len(head) / block)
        self.gradient: Tensor | None = None
        self.memory = head.new_empty(0)

    @property
    def rows(self) -> int:
        """Tokens whose probabilities take no more memory than the gradient; 0 where the two can not share it."""
        if self.dtype is None or self.dtype.itemsize % self.head.element_size() != 0:
            return 0
        return self.head.shape[1] * self.dtype.itemsize // self.head.element_size()

    def make(self, chunks: list[slice], room_for: int = 0) -> None:
        """Take the memory that these chunks need one after the other; the first stands in the gradient's way.

        All in one piece, whose pages go to the next minibatch. `room_for`: elements that any other one may need.
        """
        sizes, width = [rows.stop - rows.start for rows in chunks], self.rows
        if self.dtype is None or width == 0 or not chunks:
            self.memory = self.head.new_empty(self.blocks * self.block * max(sizes, default=0))
            self.gradient = None if self.dtype is None else torch.zeros_like(self.head, dtype=self.dtype)
            return
        first, later = sizes[0], max(sizes[1:], default=0)
        # What begins later than the gradient by one block of it ends later, too, the more so the more rows there are.
        ahead = self.blocks * max(width, first) + min(width, first)
        size = self.block * max(ahead, self.blocks * (width + later))
        self.memory = memory.empty((size,), like=self.head, room_for=room_for)
        self.gradient = self.memory[: len(self.head) * width].view(self.dtype).view(self.head.shape)

    def is_ahead(self, rows: slice) -> bool:
        """Whether this chunk's probabilities stand in the gradient's way: it is then written, not added to."""
        return rows.start == 0 and self.rows > 0

    def of(self, rows: slice) -> Float[Tensor, "blocks rows size"]:
        """The place of a chunk's probabilities, at the end; the last block may fill a part of its own."""
        shape = (self.blocks, rows.stop - rows.start, self.block)
        return self.memory[len(self.memory) - math.prod(shape) :].view(shape)
