"""Random float64 batches with junk outside the mask."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

JUNK = (math.nan, math.inf, -math.inf, 1e30)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6))
seeds = st.integers(0, 2**31)


def numbers(seed: int, *shape: int) -> Tensor:
    """Standard normal draws, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(seed: int, batch: int, time: int) -> Tensor:
    """Any pattern of actions, with gaps, at least one in each row."""
    generator = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(batch, time, generator=generator) < 0.6
    mask[torch.arange(batch), torch.randint(time, (batch,), generator=generator)] = True
    return mask


def spoil(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with nan, inf, -inf and a huge number in turn wherever the mask is False."""
    junk = torch.tensor(JUNK, dtype=x.dtype).repeat(-(-x.numel() // len(JUNK)))[: x.numel()].view_as(x)
    return torch.where(mask, x, junk)


def steps(mask: Tensor) -> list[tuple[int, int]]:
    """The (row, step) pairs where the mask is True."""
    return [(row, step) for row, line in enumerate(mask.tolist()) for step, ours in enumerate(line) if ours]
