"""Causal attention within each of many packed rows, with one call of torch's kernel per row length.

Rows are views of the packed tensors, and one concatenation joins the results, in forward and backward. Plain twin:
`scaled_dot_product_attention` once a length, whose splits and transpositions autograd copies.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.kernels.matmul import is_eager_float32_on_cpu

RowGroups: TypeAlias = Sequence[tuple[int, int]]
"""(number of rows, their length) of packed rows, all those of one length side by side."""

KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
"""Of torch's own operations, with `_backward` for its gradient: what `scaled_dot_product_attention` calls on CPUs."""


def can_use_flash_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch would use `KERNEL`; callers that need a second derivative disable it with `sdpa_kernel`."""
    return (
        hasattr(torch.ops.aten, KERNEL)
        and hasattr(torch.ops.aten, f"{KERNEL}_backward")
        and torch.backends.cuda.flash_sdp_enabled()  # what `sdpa_kernel` sets, for all devices
        and is_eager_float32_on_cpu(query, key, value)
        and query.shape[-1] == value.shape[-1]
    )


def grouped_attention(
    query: Float[Tensor, "heads positions width"],
    key: Float[Tensor, "kv_heads positions width"],
    value: Float[Tensor, "kv_heads positions width"],
    groups: RowGroups,
    *,
    scale: float | None = None,
) -> Float[Tensor, "positions heads width"]:
    """softmax(scale Q K^T) V, where a token sees its own row up to itself.

    Args:
        query: Of all rows, one after the other.
        key: Likewise; heads may be fewer, each then serves a group of queries.
        value: Likewise.
        groups: How positions fall into rows.
        scale: None: 1 / sqrt(width).
    """
    result: Tensor = _GroupedAttention.apply(query, key, value, groups, scale)  # type: ignore[no-untyped-call]
    return result


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: RowGroups, scale: float | None) -> Tensor:
        kernel = getattr(torch.ops.aten, KERNEL)
        parts = zip(*(_rows(tensor, groups) for tensor in (query, key, value)), strict=True)
        outputs, sums = zip(*(kernel(*part, 0.0, True, scale=scale) for part in parts), strict=True)
        output = _side_by_side(outputs)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.groups, ctx.scale = groups, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = getattr(torch.ops.aten, f"{KERNEL}_backward")
        query, key, value, output, *sums = ctx.saved_tensors
        tensors = (grad.transpose(0, 1), query, key, value, output.transpose(0, 1))
        parts = zip(*(_rows(tensor, ctx.groups) for tensor in tensors), strict=True)
        pairs = zip(parts, sums, strict=True)
        found = zip(*(kernel(*part, summed, 0.0, True, scale=ctx.scale) for part, summed in pairs), strict=True)
        return *(_side_by_side(of_rows).transpose(0, 1) for of_rows in found), None, None


def _rows(
    tensor: Float[Tensor, "heads positions width"], groups: RowGroups
) -> Iterator[Float[Tensor, "_ heads _ width"]]:
    """Views of the rows of each group."""
    sizes = [count * length for count, length in groups]
    for (count, length), part in zip(groups, tensor.split(sizes, dim=1), strict=True):
        yield part.unflatten(1, (count, length)).transpose(0, 1)


def _side_by_side(
    of_rows: Sequence[Float[Tensor, "_ heads _ width"]],
) -> Float[Tensor, "positions heads width"]:
    """The kernel lays a token's heads next to each other, so that nothing but the rows themselves is copied."""
    parts = [part.transpose(1, 2).flatten(0, 1) for part in of_rows]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
