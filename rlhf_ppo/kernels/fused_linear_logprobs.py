"""Log-probabilities and entropy of chosen tokens together with their gradient, in one pass over the logits.

The plain way multiplies by the LM head four times in training: logits in the forward pass, the same logits again in
the backward pass, and one product for each of the two gradients. A loss that is a sum over tokens has a slope at each
token that is known as soon as that token's log-probability is, so the gradients can be taken while the logits are at
hand: three products, and no chunk of logits outlives its turn.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_ppo.functional.logprobs import TokenStatistics
from rlhf_ppo.kernels.head_walk import HeadWalk, Slopes, WalkSettings
from rlhf_ppo.kernels.tied_embedding import SharedGradient

AGREEMENT = 1e-4
"""How far the gradient that arrives may differ from the foreseen one, relative to its largest entry."""


def fused_token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    tokens: Int[Tensor, " tokens"],
    *,
    slopes: Slopes | None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    with_entropy: bool = True,
    product_dtype: torch.dtype | None = None,
    shared: SharedGradient | None = None,
) -> TokenStatistics:
    """`chunked_token_statistics` of a linear head, whose backward pass multiplies nothing.

    `slopes` foresees the gradient that will come back for each token. Where the one that comes is another (the loss is
    no sum over tokens after all), everything is computed again from it: slower, never wrong. A common factor on all
    slopes (loss scaling, the number of processes) is applied and costs nothing.

    Args:
        hidden: States at the positions before the tokens.
        weight: Of the LM head, `logits = hidden weight^T + bias`.
        bias: Of the LM head.
        tokens: The tokens drawn there.
        slopes: The loss's derivatives at each token, given the token's log-probability and entropy; None without a
            gradient, where the same walk scores alone.
        temperature: What the logits are divided by.
        chunk_size: Tokens at a time, at most: first as many as the head's gradient has room for the probabilities of
            and, beyond it, as many as take 31 MiB (CPU) or 496 MiB, but no fewer than 64; then as many as these.
        with_entropy: Also the entropy, which costs more passes over each chunk where `slopes` read it.
        product_dtype: Of the three products; None: that of the states.
        shared: Takes the weight's gradient, for the embedding of the same weight that `hidden` comes from.
    """
    if slopes is None and torch.is_grad_enabled():
        raise ValueError("expected slopes where gradients are taken, got None: the head would get no gradient.")
    trained = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    shared = shared if trained[0] else None  # the embedding's turn comes through the states
    settings = WalkSettings(temperature, chunk_size, with_entropy, product_dtype, *trained)
    given = (hidden, weight, bias, tokens, settings, slopes, shared)
    logprobs, entropy = _Fused.apply(*given)  # type: ignore[no-untyped-call]
    return TokenStatistics(logprobs=logprobs, entropy=entropy if with_entropy else None)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        settings: WalkSettings,
        slopes: Slopes | None,
        shared: SharedGradient | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            found = HeadWalk(hidden, weight, bias, tokens, settings).run(slopes)
        ctx.settings, ctx.shared, ctx.found = settings, shared, found
        ctx.save_for_backward(hidden, weight, bias, tokens)
        return found.logprobs, found.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError(
                "expected one backward pass through the fused LM head, got a second: its gradients are handed over, "
                "not kept. Sum the losses first, or score without `slopes`."
            )
        found, ctx.found = ctx.found, None
        factor = _common_factor((of_logprobs, of_entropy), (found.of_logprobs, found.of_entropy))
        if factor is None:
            hidden, weight, bias, tokens = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                walk = HeadWalk(hidden, weight, bias, tokens, ctx.settings)
                found = walk.run(Slopes(lambda _, __, rows: (of_logprobs[rows], of_entropy[rows])))
            factor = 1.0
        gradients: tuple[Tensor | None, ...] = (found.of_hidden, found.of_weight, found.of_bias)
        if factor != 1.0:
            gradients = tuple(None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        of_hidden, of_weight, of_bias = gradients
        if ctx.shared is not None:
            ctx.shared.of_head, of_weight = of_weight, None
        return of_hidden, of_weight, of_bias, None, None, None, None


def _common_factor(came: tuple[Tensor, ...], foreseen: tuple[Tensor, ...]) -> float | None:
    """S with came = s foreseen, or None where there is no such number."""
    got, expected = torch.cat(came).double(), torch.cat(foreseen).double()
    square = expected.dot(expected)
    factor = torch.where(square > 0, got.dot(expected) / square, torch.zeros_like(square))
    off = (got - factor * expected).abs().amax() if len(got) else square
    size = got.abs().amax() if len(got) else square
    value, difference, largest = torch.stack([factor, off, size]).tolist()
    if not difference <= AGREEMENT * largest:
        return None
    return 1.0 if abs(value - 1.0) < 1e-6 else float(value)
