"""Causal attention within each of many rows that stand side by side, those of one length in one call.

Through autograd each call would bring cuts, transpositions and copies of its own, forward and backward. Here the rows
are views of what came in, and one concatenation puts results together.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.kernels.matmul import fits_onednn

Runs: TypeAlias = Sequence[tuple[int, int]]
"""(rows, length) of rows that stand side by side, all those of one length together."""

KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
"""Of torch's own operations, with `_backward` for its gradient: what `scaled_dot_product_attention` calls on CPUs."""


def fits_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch would hand these to `KERNEL`; it has no second derivative, so whoever wants one forbids it."""
    return (
        hasattr(torch.ops.aten, KERNEL)
        and hasattr(torch.ops.aten, f"{KERNEL}_backward")
        and torch.backends.cuda.flash_sdp_enabled()  # what `sdpa_kernel` sets, for all devices
        and fits_onednn(query, key, value)
        and query.shape[-1] == value.shape[-1]
    )


def run_attention(
    query: Float[Tensor, "heads positions width"],
    key: Float[Tensor, "kv_heads positions width"],
    value: Float[Tensor, "kv_heads positions width"],
    runs: Runs,
    *,
    scale: float | None = None,
) -> Float[Tensor, "positions heads width"]:
    """softmax(scale Q K^T) V, where a token sees its own row up to itself.

    Args:
        query: Of all rows, one after the other.
        key: Likewise; heads may be fewer, each then serves a group of queries.
        value: Likewise.
        runs: How positions fall into rows.
        scale: None: 1 / sqrt(width).
    """
    result: Tensor = _RunAttention.apply(query, key, value, runs, scale)  # type: ignore[no-untyped-call]
    return result


class _RunAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
        kernel = getattr(torch.ops.aten, KERNEL)
        parts = zip(*(_rows(tensor, runs) for tensor in (query, key, value)), strict=True)
        outputs, sums = zip(*(kernel(*part, 0.0, True, scale=scale) for part in parts), strict=True)
        output = _side_by_side(outputs)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.runs, ctx.scale = runs, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = getattr(torch.ops.aten, f"{KERNEL}_backward")
        query, key, value, output, *sums = ctx.saved_tensors
        tensors = (grad.transpose(0, 1), query, key, value, output.transpose(0, 1))
        parts = zip(*(_rows(tensor, ctx.runs) for tensor in tensors), strict=True)
        pairs = zip(parts, sums, strict=True)
        found = zip(*(kernel(*part, summed, 0.0, True, scale=ctx.scale) for part, summed in pairs), strict=True)
        return *(_side_by_side(of_rows).transpose(0, 1) for of_rows in found), None, None


def _rows(tensor: Float[Tensor, "heads positions width"], runs: Runs) -> Iterator[Float[Tensor, "_ heads _ width"]]:
    """Views of the rows of each run."""
    sizes = [count * length for count, length in runs]
    for (count, length), part in zip(runs, tensor.split(sizes, dim=1), strict=True):
        yield part.unflatten(1, (count, length)).transpose(0, 1)


def _side_by_side(
    of_rows: Sequence[Float[Tensor, "_ heads _ width"]],
) -> Float[Tensor, "positions heads width"]:
    """The kernel lays a token's heads next to each other, so that nothing but the rows themselves is copied."""
    parts = [part.transpose(1, 2).flatten(0, 1) for part in of_rows]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
