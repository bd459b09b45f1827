"""One gradient for a weight that is both the embedding and the LM head.

Autograd adds up two of them, each [vocab, hidden], though the embedding's has a row for each token of the batch and
zeros elsewhere. Here the head hands its gradient over, and the embedding adds its rows to that.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SharedGradient:
    """What the head leaves for the embedding, in one backward pass of one forward pass."""

    def __init__(self) -> None:
        self.of_head: Float[Tensor, "vocab hidden"] | None = None


def shared_embedding(
    ids: Int[Tensor, "*shape"],
    weight: Float[Tensor, "vocab hidden"],
    shared: SharedGradient,
    *,
    padding_idx: int | None = None,
) -> Float[Tensor, "*shape hidden"]:
    """`torch.nn.functional.embedding` whose gradient is what `shared` holds by then, with its own rows added.

    Args:
        ids: Tokens.
        weight: Also that of an LM head, which works on states that depend on this embedding: its backward pass is
            therefore the earlier one.
        shared: The same object that `fused_token_statistics` gets.
        padding_idx: A token whose row gets no gradient from here.
    """
    embedded: Tensor = _Embedding.apply(ids, weight, shared, padding_idx)  # type: ignore[no-untyped-call]
    return embedded


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, shared: SharedGradient, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shared, ctx.padding_idx, ctx.shape, ctx.dtype = shared, padding_idx, weight.shape, weight.dtype
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        gradient, ctx.shared.of_head = ctx.shared.of_head, None
        if gradient is None:  # the loss does not read the head
            gradient = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        rows, tokens = grad.reshape(-1, ctx.shape[1]).to(gradient.dtype), ids.reshape(-1)
        if ctx.padding_idx is not None:
            real = tokens != ctx.padding_idx
            rows, tokens = rows[real], tokens[real]
        return None, gradient.index_add_(0, tokens, rows), None, None
