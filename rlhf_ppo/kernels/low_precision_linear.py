"""Linear layers whose matrix products run in a lower precision than their weights, such as bfloat16.

For the backward pass they save what a plain layer saves: the input and the weight in float32. Both are cast again
there. Plain twin: `torch.autocast`, which saves the casts too.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def low_precision_linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "m k"] | Float[Tensor, "k m"],
    bias: Float[Tensor, " m"] | None,
    *,
    dtype: torch.dtype,
    low_precision_weight: Tensor | None = None,
    transposed: bool = False,
) -> Float[Tensor, "*batch m"]:
    """X W^T + b, or x W + b where `transposed`, with products in `dtype`, inputs and outputs in float32.

    Args:
        x: Inputs.
        weight: The master weights.
        bias: Added in float32.
        dtype: Of the three products, e.g. bfloat16.
        low_precision_weight: `weight` in `dtype`, where it is known not to have changed since; None: cast here.
        transposed: Whether the weight is [k, m], as in GPT-2's Conv1D.
    """
    # Outside of the function, so that the result is no view made in it: some layers change it in place.
    given = (x.reshape(-1, x.shape[-1]), weight, bias, low_precision_weight, dtype, transposed)
    rows: Tensor = _LowPrecisionLinear.apply(*given)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], rows.shape[-1])


class _LowPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_precision_weight: Tensor | None,
        dtype: torch.dtype,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.transposed = dtype, transposed
        low = weight.to(dtype) if low_precision_weight is None else low_precision_weight
        rows = (x.to(dtype) @ (low if transposed else low.t())).to(x.dtype)
        if bias is not None:
            rows += bias
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        grad_bias = grad.sum(dim=0) if ctx.needs_input_grad[2] else None
        low_grad = grad.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            low = weight.to(ctx.dtype)
            grad_x = (low_grad @ (low.t() if ctx.transposed else low)).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            inputs = x.to(ctx.dtype)
            grad_weight = (inputs.t() @ low_grad if ctx.transposed else low_grad.t() @ inputs).to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None
