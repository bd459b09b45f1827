"""Where probabilities wait for the loss: where the head's gradient will stand, as far as it has room, else beside it.

The gradient of a block of the vocabulary is [block, hidden]. Until it is known, that place holds the block's
probabilities of as many tokens as a state is wide, or of twice as many where they are half as precise.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


class Room:
    """The head's gradient, and the place beside it."""

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
        self.beside = head.new_empty(0)

    @property
    def rows(self) -> int:
        """Tokens whose probabilities the gradient has room for: those of its last block, the smallest."""
        if self.dtype is None or self.dtype.itemsize % self.head.element_size() != 0:
            return 0
        smallest = len(self.head) - (self.blocks - 1) * self.block
        return smallest * self._width // self.block

    @property
    def _width(self) -> int:
        """Of a row of the gradient, in probabilities."""
        return self.head.shape[1] * (self.dtype or self.head.dtype).itemsize // self.head.element_size()

    def make(self, chunks: list[slice]) -> None:
        """Take the memory: the gradient's, then that of the most probabilities that stand beside it.

        In this order, and in sizes that differ as little as can be: in the holes that they leave in memory, those of
        the next minibatch find their place, and nothing that stays stands between them.
        """
        if self.dtype is not None:
            # A chunk that stood in the gradient writes all of it; otherwise every chunk adds to it.
            written = any(self.is_in_gradient(rows) for rows in chunks)
            self.gradient = (torch.empty_like if written else torch.zeros_like)(self.head, dtype=self.dtype)
        outside = (rows.stop - rows.start for rows in chunks if not self.is_in_gradient(rows))
        self.beside = self.head.new_empty(self.blocks * max(outside, default=0) * self.block)

    def is_in_gradient(self, rows: slice) -> bool:
        """Whether this chunk's probabilities wait there: those of the first do, for the place is then taken."""
        return bool(rows.start == 0 and rows.stop <= self.rows)

    def of(self, rows: slice) -> Float[Tensor, "blocks rows size"]:
        """The place of a chunk's probabilities; the last block may fill a part of its own."""
        shape = (self.blocks, rows.stop - rows.start, self.block)
        if self.gradient is None or not self.is_in_gradient(rows):
            return self.beside[: math.prod(shape)].view(shape)
        flat = self.gradient.view(-1).view(self.head.dtype)
        return flat.as_strided(shape, (self.block * self._width, self.block, 1))
