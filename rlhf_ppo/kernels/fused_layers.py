"""Parts of a transformer layer whose backward pass is written out: fewer walks over the states, fewer of them kept."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm(x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*batch d"]:
    """Root-mean-square norm x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, eq. 4).

    Kept for the backward pass: x and one number a row.
    """
    if not torch.is_grad_enabled():
        return (x * _inverse_rms(x, eps)).mul_(weight)
    result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def swiglu(gate: Float[Tensor, "*batch d"], up: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """SiLU(gate) · up (Shazeer 2020, eq. 6, without its products); SiLU(gate) is computed twice instead of kept."""
    if not torch.is_grad_enabled():
        return _gated(gate, up)
    result: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def rotate(
    x: Float[Tensor, "*batch d"], cos: Float[Tensor, "*#batch d"], sin: Float[Tensor, "*#batch d"]
) -> Float[Tensor, "*batch d"]:
    """Rotary position embedding (x1, x2) cos + (-x2, x1) sin of the two halves of x (Su et al. 2021, eq. 34).

    Args:
        x: Queries or keys.
        cos: Broadcast over the heads, without a gradient.
        sin: Likewise.
    """
    first, second = sin.chunk(2, dim=-1)
    if not torch.is_grad_enabled():
        return _rotated(x, cos, first, second, 1.0)
    result: Tensor = _Rotation.apply(x, cos, first, second, 1.0)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: the number of each row depends on x, too
            scale = _inverse_rms(x, ctx.eps)
        product = grad * x
        grad_weight = (product * scale).flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        # With s = 1 / rms: ∂s/∂x_j = -s³ x_j / d
        slope = (product @ weight).unsqueeze(-1) * scale**3 / x.shape[-1]
        if torch.is_grad_enabled():
            return grad * weight * scale - x * slope, grad_weight, None
        return product.copy_(grad).mul_(weight).mul_(scale).addcmul_(x, slope, value=-1), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        if torch.is_grad_enabled():  # a second derivative is wanted
            sigmoid = torch.sigmoid(gate)
            return grad_gate * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid * grad
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, _gated(gate, grad)


class _Rotation(torch.autograd.Function):
    """Its gradient is a rotation, too, by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: float) -> Tensor:
        ctx.save_for_backward(cos, first, second)
        ctx.sign = sign
        return _rotated(x, cos, first, second, sign)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, first, second = ctx.saved_tensors
        return _Rotation.apply(grad, cos, second, first, -ctx.sign), None, None, None, None  # type: ignore[no-untyped-call]


def _rotated(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: float) -> Tensor:
    rotated = x * cos
    ours, theirs = rotated.chunk(2, dim=-1), x.chunk(2, dim=-1)
    ours[0].addcmul_(theirs[1], first, value=-sign)
    ours[1].addcmul_(theirs[0], second, value=sign)
    return rotated


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate).mul_(up)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm.square() / x.shape[-1] + eps).rsqrt()
