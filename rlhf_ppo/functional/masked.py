"""Sums, means, variances and whitening over the steps where `mask` is True.

Entries outside the mask (padding, tool output, nan, inf) are replaced before any arithmetic, so they reach neither a
result nor a gradient.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; the identity on a single process."""

Count: TypeAlias = int | float | Tensor | None
"""The divisor of a sum over steps.

None: the number of True entries in the mask. A number or a 0-d tensor: that many steps, global in an optimizer step.
A tensor that broadcasts against the steps: one divisor per step (`sequence_mean_count`).
"""

HALF_PRECISION = (torch.float16, torch.bfloat16)
"""Dtypes that are converted to float32 before sums."""


def identity(x: Tensor) -> Tensor:
    """The `ReduceSum` of a single process."""
    return x


def zero_where_masked(x: Tensor, mask: Bool[Tensor, "*shape"]) -> Tensor:
    """`x` where the mask is True, 0 elsewhere, in results and gradients.

    Raises:
        TypeError: The mask is not boolean.
        ValueError: The shapes differ.
    """
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must have dtype torch.bool (True = an action of the policy), got {mask.dtype}: a numeric mask may "
            "be an attention mask or have the opposite polarity. Pass `mask.bool()` if it really marks actions."
        )
    if x.shape != mask.shape:
        raise ValueError(
            f"mask must have the shape of the masked tensor, {tuple(x.shape)}, got {tuple(mask.shape)}: broadcasting "
            "would count steps that do not exist. Trim both to the same [batch, time]."
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
        count: Divisor of the sum, see `Count`. Given the count of a whole optimizer step, the results of its
            micro-batches and processes add up to the mean over the step. An empty mask has mean 0.
    """
    x = zero_where_masked(x, mask)
    if count is None:
        return x.sum() / mask.sum().clamp(min=1)
    if isinstance(count, Tensor) and count.ndim > 0:
        return (x / count).sum()
    return x.sum() / count


def sequence_mean_count(mask: Bool[Tensor, "batch time"], n_sequences: int | Tensor) -> Float[Tensor, "batch 1"]:
    """The `count` with which `masked_mean` is the mean over sequences of each sequence's mean.

    Args:
        mask: True = an action of the policy.
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
    """Whiten over the masked steps of all processes: zero mean, unit variance. Collective through `reduce_sum`.

        x' = (x - mean) / sqrt(var + eps)   [+ mean, where shift_mean is False]

    Positions outside the mask become 0. Equal values, such as a single step, become 0 (or keep their value, where the
    mean is kept), never nan. Half precision is converted to float32.

    Args:
        x: Advantages or rewards.
        mask: True = counts.
        shift_mean: False keeps the mean, which is meaningful for rewards (Ziegler et al. 2019).
        unbiased: Divide the sum of squares by n - 1; the first TensorFlow implementations divided by n.
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
    scale_equal: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean and 1 / sqrt(var + eps) over the masked steps of all processes, which `whiten` applies. Collective.

    Where all values are equal up to rounding, the second is 1: 1 / sqrt(eps) would enlarge whatever it multiplies.
    TRL's classic trainer did that (`scale_equal`).
    """
    x = at_least_float32(zero_where_masked(x, mask))
    total, count = reduce_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)])).unbind()
    mean = total / count.clamp(min=1)
    # Squares are summed around the global mean: E[x²] - E[x]² loses all digits where |mean| >> std.
    squares = reduce_sum(zero_where_masked(x - mean, mask).square().sum())
    variance = squares / (count - int(unbiased)).clamp(min=1)
    scale = torch.rsqrt(variance + eps)
    is_equal = variance <= (8 * torch.finfo(x.dtype).eps * mean).square()
    return mean, scale if scale_equal else scale.masked_fill(is_equal, 1.0)


def last_action_index(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, " batch"]:
    """Index of the last True of each row: the step that a score per response is assigned to.

    Raises:
        ValueError: A row has no action.
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, steps, -1).amax(1) if mask.shape[1] else mask.new_full((len(mask),), -1, dtype=torch.long)
    if bool((last < 0).any()):
        rows = (last < 0).nonzero().flatten().tolist()
        raise ValueError(
            f"every row of mask needs at least one action, got none in row(s) {rows}: a score has no step to go "
            "to. Drop these samples, or let the sampler emit at least one token (min_new_tokens=1)."
        )
    return last


def next_action_index(
    mask: Bool[Tensor, "batch time"],
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Index of the first True after each step (`time` if there is none), and whether there is none."""
    time = mask.shape[1]
    index = torch.where(mask, torch.arange(time, device=mask.device), time)
    this_or_later = index.flip(1).cummin(1).values.flip(1)
    later = torch.cat([this_or_later[:, 1:], torch.full_like(this_or_later[:, :1], time)], dim=1)
    return later, later == time


def at_least_float32(x: Tensor) -> Tensor:
    """`x` converted to float32 from half precision; float32 and float64 unchanged."""
    return x.float() if x.dtype in HALF_PRECISION else x
