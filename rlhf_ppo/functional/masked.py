"""Sums, means, variances and whitening over the steps where `mask` is True.

Whatever lies outside the mask (padding, tool output, nan, inf) is replaced before any arithmetic, so it reaches
neither a result nor a gradient.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; the identity where there is one process."""

Count: TypeAlias = int | float | Tensor | None
"""What a sum over steps is divided by.

None: the number of True entries in the mask. A number or a 0-d tensor: that many steps, global in an optimizer step.
A tensor that broadcasts against the steps: each step's own divisor (`sequence_mean_count`).
"""


HALF_PRECISION = (torch.float16, torch.bfloat16)
"""What is raised to float32 where numbers are added up."""


def identity(x: Tensor) -> Tensor:
    """The `ReduceSum` of a single process."""
    return x


def zero_where_masked(x: Tensor, mask: Bool[Tensor, "*shape"]) -> Tensor:
    """`x` where the mask is True and 0 elsewhere, for results and gradients alike.

    Raises:
        TypeError: The mask is not boolean.
        ValueError: The shapes differ.
    """
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must have dtype torch.bool (True = an action of ours), got {mask.dtype}: a mask of numbers may be "
            "an attention mask or have the opposite polarity. Pass `mask.bool()` if it really marks actions."
        )
    if x.shape != mask.shape:
        raise ValueError(
            f"mask must have the shape of what it masks, {tuple(x.shape)}, got {tuple(mask.shape)}: broadcasting would "
            "count steps that do not exist. Trim both to the same [batch, time]."
        )
    return x.masked_fill(~mask, 0)


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of `x` over the steps where the mask is True."""
    return zero_where_masked(x, mask).sum()


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], count: Count = None) -> Float[Tensor, ""]:
    """Mean of `x` over the steps where the mask is True: sum / count.

    Args:
        x: Any values, junk allowed outside the mask.
        mask: True = counts.
        count: What the sum is divided by, see `Count`. Given the count of a whole optimizer step, the results of its
            micro-batches and processes add up to the mean over the step. An empty mask has mean 0.
    """
    kept = zero_where_masked(x, mask)
    if count is None:
        return kept.sum() / mask.sum().clamp(min=1)
    if isinstance(count, Tensor) and count.ndim > 0:
        return (kept / count).sum()
    return kept.sum() / count


def sequence_mean_count(mask: Bool[Tensor, "batch time"], n_sequences: int | Tensor) -> Float[Tensor, "batch 1"]:
    """The `count` under which `masked_mean` is the mean over sequences of each sequence's own mean.

    Args:
        mask: True = an action of ours.
        n_sequences: Sequences in the whole optimizer step, over micro-batches and processes.
    """
    return mask.sum(1, keepdim=True).clamp(min=1).float() * n_sequences


def masked_var(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, unbiased: bool = True) -> Float[Tensor, ""]:
    """Variance of `x` over the steps where the mask is True; 0 where there are fewer than two.

    Args:
        x: Any values, junk allowed outside the mask.
        mask: True = counts.
        unbiased: Divide by n - 1 (Bessel) instead of n.
    """
    count = mask.sum()
    deviation = zero_where_masked(x - masked_mean(x, mask), mask)
    return deviation.square().sum() / (count - int(unbiased)).clamp(min=1)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    reduce_sum: ReduceSum = identity,
) -> Float[Tensor, "*shape"]:
    """Scale to unit variance and shift to zero mean over the masked steps of all processes.

        x' = (x - mean) / sqrt(var + eps)   [+ mean, where shift_mean is False]

    Positions outside the mask become 0. A single step has variance 0 and becomes 0 (or keeps its value, where the
    mean is kept): never nan. Half precision is raised to float32.

    Args:
        x: Advantages or rewards.
        mask: True = counts.
        shift_mean: False keeps the mean, which for rewards carries the task (Ziegler et al. 2019).
        unbiased: Divide the squares by n - 1; the first implementations in TensorFlow divided by n.
        eps: Added to the variance, inside the root.
        reduce_sum: Sums over processes, so that every process whitens by the same two numbers.
    """
    mean, scale = whitening_statistics(x, mask, unbiased=unbiased, eps=eps, reduce_sum=reduce_sum)
    shifted = (zero_where_masked(x, mask).to(mean.dtype) - mean) * scale
    return zero_where_masked(shifted if shift_mean else shifted + mean, mask)


def whitening_statistics(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
    reduce_sum: ReduceSum = identity,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two numbers of `whiten`: mean and 1 / sqrt(var + eps) over the masked steps of all processes."""
    kept = at_least_float32(zero_where_masked(x, mask))
    total, count = reduce_sum(torch.stack([kept.sum(), mask.sum().to(kept.dtype)])).unbind()
    mean = total / count.clamp(min=1)
    # Squares are summed around the global mean: E[x²] - E[x]² loses all digits where |mean| >> std.
    squares = reduce_sum(zero_where_masked(kept - mean, mask).square().sum())
    return mean, torch.rsqrt(squares / (count - int(unbiased)).clamp(min=1) + eps)


def last_action_index(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, " batch"]:
    """Index of the last True of each row, where a score per response belongs.

    Raises:
        ValueError: A row has no action.
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, steps, -1).amax(1) if mask.shape[1] else mask.new_full((len(mask),), -1, dtype=torch.long)
    if bool((last < 0).any()):
        rows = (last < 0).nonzero().flatten().tolist()
        raise ValueError(
            f"every row of mask needs at least one action, got none in row(s) {rows}: a score has no step to belong "
            "to. Drop these samples, or let the sampler emit at least one token (min_new_tokens=1)."
        )
    return last


def next_action_index(
    mask: Bool[Tensor, "batch time"],
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Index of the first True after each step (time where there is none), and whether there is none."""
    time = mask.shape[1]
    index = torch.where(mask, torch.arange(time, device=mask.device), time)
    from_here = index.flip(1).cummin(1).values.flip(1)
    following = torch.cat([from_here[:, 1:], torch.full_like(from_here[:, :1], time)], dim=1)
    return following, following == time


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself in float32 or float64, raised to float32 from half precision."""
    return x.float() if x.dtype in HALF_PRECISION else x
