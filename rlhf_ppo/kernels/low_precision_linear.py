"""Linear layers whose products run in a lower precision than their weights.

Kept for the backward pass is what a plain layer keeps: the input itself, which layers beside it keep as well, and the
weight. Copies of both in the lower precision are made again there; kept, they would be a tensor a layer each.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def low_linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "m k"] | Float[Tensor, "k m"],
    bias: Float[Tensor, " m"] | None,
    *,
    dtype: torch.dtype,
    kept: Tensor | None = None,
    transposed: bool = False,
) -> Float[Tensor, "*batch m"]:
    """X W^T + b, or x W + b where `transposed`, with products in `dtype`; what goes in and comes out is float32.

    Args:
        x: Inputs.
        weight: The master weights.
        bias: Added in float32.
        dtype: Of the three products, e.g. bfloat16.
        kept: `weight` in `dtype`, where somebody knows that it has not moved since.
        transposed: Whether the weight is GPT-2's Conv1D's.
    """
    result: Tensor = _LowLinear.apply(x, weight, bias, kept, dtype, transposed)  # type: ignore[no-untyped-call]
    return result


class _LowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor | None,
        dtype: torch.dtype,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.transposed = dtype, transposed
        low = weight.to(dtype) if kept is None else kept
        flat = (_rows(x).to(dtype) @ (low if transposed else low.t())).to(x.dtype)
        if bias is not None:
            flat += bias
        return flat.view(*x.shape[:-1], flat.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = _rows(grad)
        of_x = of_weight = None
        of_bias = flat.sum(dim=0) if ctx.needs_input_grad[2] else None
        flat = flat.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            low = weight.to(ctx.dtype)
            of_x = (flat @ (low.t() if ctx.transposed else low)).to(grad.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            inputs = _rows(x).to(ctx.dtype)
            of_weight = (inputs.t() @ flat if ctx.transposed else flat.t() @ inputs).to(grad.dtype)
        return of_x, of_weight, of_bias, None, None, None


def _rows(x: Float[Tensor, "*batch k"]) -> Float[Tensor, "n k"]:
    return x.reshape(-1, x.shape[-1])
