"""Log-probabilities and entropy of chosen tokens together with their gradient, in one pass over the logits.

Autograd multiplies by the LM head four times in training: logits in the forward pass, the same logits again in the
backward pass, and one product for each of the two gradients. Where a loss is a sum over tokens, its derivative at a
token is known as soon as that token's log-probability is, so the gradients are computed while the logits are at hand:
three products, and no chunk of logits is kept. Plain twin: `functional.logprobs.chunked_token_statistics`.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_ppo.functional.logprobs import TokenStatistics
from rlhf_ppo.kernels.linear_logprobs import FusedLinearLogprobs, LinearLogprobsSettings, LossGradient
from rlhf_ppo.kernels.tied_embedding import TiedGradient
from rlhf_ppo.kernels.triton_logprobs import choose_fold

TOLERANCE = 1e-4
"""How far the gradient that arrives may differ from the expected one, relative to its largest entry."""


def fused_token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    tokens: Int[Tensor, " tokens"],
    *,
    loss_gradient: LossGradient | None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    with_entropy: bool = True,
    matmul_dtype: torch.dtype | None = None,
    tied_gradient: TiedGradient | None = None,
) -> TokenStatistics:
    """`chunked_token_statistics` of a linear head whose gradients are computed in the forward pass.

    Where the gradient that arrives in the backward pass is not `loss_gradient` (the loss is no sum over tokens after
    all), everything is computed again from it: slower, never wrong. A common factor (loss scaling, the number of
    processes) is applied and costs nothing.

    Args:
        hidden: States at the positions before the tokens.
        weight: Of the LM head, `logits = hidden weight^T + bias`.
        bias: Of the LM head.
        tokens: The tokens drawn there.
        loss_gradient: The derivatives of the loss at each token, given its log-probability and entropy; None where no
            gradient is computed.
        temperature: What the logits are divided by.
        chunk_size: Tokens at a time, at most; see `chunk_sizes`.
        with_entropy: Also the entropy, which costs more passes over each chunk where `loss_gradient` reads it.
        matmul_dtype: Of the three matrix products; None: that of the states.
        tied_gradient: Gets the weight's gradient, for the embedding of the same weight that `hidden` comes from.
    """
    if loss_gradient is None and torch.is_grad_enabled():
        raise ValueError("expected a loss_gradient where gradients are enabled, got None: the head would get none.")
    trained = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    tied_gradient = tied_gradient if trained[0] else None  # the embedding's gradient comes through the states
    fold = choose_fold(weight.device, len(weight), matmul_dtype or hidden.dtype)
    settings = LinearLogprobsSettings(temperature, chunk_size, with_entropy, matmul_dtype, *trained, fold=fold)
    given = (hidden, weight, bias, tokens, settings, loss_gradient, tied_gradient)
    logprobs, entropy = _FusedTokenStatistics.apply(*given)  # type: ignore[no-untyped-call]
    return TokenStatistics(logprobs=logprobs, entropy=entropy if with_entropy else None)


class _FusedTokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        settings: LinearLogprobsSettings,
        loss_gradient: LossGradient | None,
        tied_gradient: TiedGradient | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            output = FusedLinearLogprobs(hidden, weight, bias, tokens, settings).run(loss_gradient)
        ctx.settings, ctx.tied_gradient, ctx.output = settings, tied_gradient, output
        ctx.differs = None if loss_gradient is None else loss_gradient.differs
        ctx.save_for_backward(hidden, weight, bias, tokens)
        return output.logprobs, output.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.output is None:
            raise RuntimeError(
                "expected one backward pass through the fused LM head, got a second: its gradients are handed over, "
                "not kept. Sum the losses first, or score without `loss_gradient`."
            )
        output, ctx.output = ctx.output, None
        received, foreseen = (grad_logprobs, grad_entropy), (output.grad_logprobs, output.grad_entropy)
        factor = _common_factor(received, foreseen, ctx.differs)
        if factor is None:
            hidden, weight, bias, tokens = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                head = FusedLinearLogprobs(hidden, weight, bias, tokens, ctx.settings)
                output = head.run(LossGradient(lambda _, __, rows: (grad_logprobs[rows], grad_entropy[rows])))
            factor = 1.0
        gradients: tuple[Tensor | None, ...] = (output.grad_hidden, output.grad_weight, output.grad_bias)
        if isinstance(factor, Tensor) or factor != 1.0:
            gradients = tuple(None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        grad_hidden, grad_weight, grad_bias = gradients
        if ctx.tied_gradient is not None:
            ctx.tied_gradient.head_gradient, grad_weight = grad_weight, None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _common_factor(
    received: tuple[Tensor, ...], foreseen: tuple[Tensor, ...], differs: list[Tensor] | None = None
) -> Tensor | float | None:
    """S with received = s · foreseen, or None where there is no such number; see `LossGradient.differs`."""
    got, expected = torch.cat(received).double(), torch.cat(foreseen).double()
    square = expected.dot(expected)
    factor = torch.where(square > 0, got.dot(expected) / square, torch.zeros_like(square))
    off = (got - factor * expected).abs().amax() if len(got) else square
    size = got.abs().amax() if len(got) else square
    if differs is not None:
        differs.append((~(off <= TOLERANCE * size)).float())
        return factor
    value, difference, largest = torch.stack([factor, off, size]).tolist()
    if not difference <= TOLERANCE * largest:
        return None
    return 1.0 if abs(value - 1.0) < 1e-6 else float(value)
