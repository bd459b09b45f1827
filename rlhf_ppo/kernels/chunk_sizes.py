"""How many bytes of logits and probabilities the LM head may hold at once, on a CPU and on a GPU."""

from dataclasses import dataclass

import torch

MIN_EXTRA_ROWS = 64
"""Fewest rows of a chunk beyond those that share the gradient's memory. Each chunk reads the head and its gradient
once, in the time of the products of ten rows or more: with few rows in a chunk the time of a token would grow with the
square of the vocabulary."""

MIN_BLOCK = 1024
"""Fewest tokens of the vocabulary in a block of training, whatever its logits take."""


@dataclass(frozen=True)
class ChunkSizes:
    """Limits in bytes, and the largest block of the vocabulary."""

    probabilities: int
    """Bytes of probabilities beyond the gradient's memory, in training."""
    block_logits: int
    """Bytes of a block's logits in training, by which the block is cut, down to `MIN_BLOCK`."""
    scoring_logits: int
    """Bytes of a block's logits without a gradient, by which the rows are cut."""
    whole_logits: int
    """Bytes of logits of a head that is not computed by blocks."""
    block: int
    """Tokens of the vocabulary in a block, at most."""
    in_place: bool
    """Whether probabilities overwrite logits, and a block's results those of the block before. On a GPU torch's own
    allocator does as well."""


CPU_SIZES = ChunkSizes(
    probabilities=31 * 2**20,
    block_logits=8 * 2**20,
    scoring_logits=4 * 2**20,
    whole_logits=31 * 2**20,
    block=4096,
    in_place=True,
)
"""A block's logits and both sides of its products stay in the processor's cache."""
GPU_SIZES = ChunkSizes(
    probabilities=496 * 2**20,
    block_logits=496 * 2**20,
    scoring_logits=496 * 2**20,
    whole_logits=496 * 2**20,
    block=2**16,
    in_place=False,
)


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """The limits of a device."""
    return CPU_SIZES if device.type == "cpu" else GPU_SIZES


def rows_per_chunk(chunk_size: int, vocab: int, device: torch.device) -> int:
    """Tokens whose whole logits live at once: `chunk_size`, or fewer where they take too many bytes."""
    return min(chunk_size, max(1, chunk_sizes(device).whole_logits // (4 * max(vocab, 1))))
