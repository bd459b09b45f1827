"""One gradient for a weight that is both the embedding and the LM head.

Plain twin: autograd adds two gradients of [vocab, hidden], of which the embedding's is zero but for the tokens of the
batch. Here the embedding adds its rows to the head's gradient in place.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class TiedGradient:
    """The LM head's gradient, handed to the embedding within one backward pass."""

    def __init__(self) -> None:
        self.head_gradient: Float[Tensor, "vocab hidden"] | None = None


def tied_embedding(
    ids: Int[Tensor, "*shape"],
    weight: Float[Tensor, "vocab hidden"],
    tied_gradient: TiedGradient,
    *,
    padding_idx: int | None = None,
) -> Float[Tensor, "*shape hidden"]:
    """`torch.nn.functional.embedding` that adds its gradient to the one in `tied_gradient`, and returns that.

    Args:
        ids: Tokens.
        weight: Also that of an LM head, which works on states that depend on this embedding: its backward pass is
            therefore the earlier one.
        tied_gradient: The same object that `fused_token_statistics` gets.
        padding_idx: A token whose row gets no gradient from here.
    """
    embedded: Tensor = _Embedding.apply(ids, weight, tied_gradient, padding_idx)  # type: ignore[no-untyped-call]
    return embedded


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, tied_gradient: TiedGradient, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.tied_gradient, ctx.padding_idx, ctx.shape, ctx.dtype = (
            tied_gradient,
            padding_idx,
            weight.shape,
            weight.dtype,
        )
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        gradient, ctx.tied_gradient.head_gradient = ctx.tied_gradient.head_gradient, None
        if gradient is None:  # the loss does not read the head
            gradient = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        rows, tokens = grad.reshape(-1, ctx.shape[1]).to(gradient.dtype), ids.reshape(-1)
        if ctx.padding_idx is not None:
            real = tokens != ctx.padding_idx
            rows, tokens = rows[real], tokens[real]
        return None, gradient.index_add_(0, tokens, rows), None, None
