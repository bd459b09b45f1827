"""Divergence-based masking instead of ratio clipping (Qi et al. 2026, "Rethinking the trust region")."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.losses import Metrics, surrogate_loss
from rlhf_ppo.functional.masked import Count, masked_mean, zero_where_masked

DivergenceKind: TypeAlias = Literal["tv", "kl"]


def binary_divergence(
    logprobs: Float[Tensor, "*shape"], old_logprobs: Float[Tensor, "*shape"], kind: DivergenceKind
) -> Float[Tensor, "*shape"]:
    """Divergence of π_old from π_θ over two outcomes: the sampled token, or any other.

        tv = |p_old - p|          kl = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))

    A lower bound of the divergence over the full vocabulary that needs no logits.

    Args:
        logprobs: log π_θ of the sampled tokens, nats, <= 0.
        old_logprobs: log π_old of the same tokens, nats, <= 0.
        kind: "tv" in [0, 1], or "kl" in nats.

    Raises:
        ValueError: The kind is unknown.
    """
    new, old = logprobs.exp(), old_logprobs.exp()
    match kind:
        case "tv":
            return (new - old).abs()
        case "kl":
            # 1 - p of a token that is almost certain: expm1 keeps its digits, the clamp the logarithm finite.
            tiny = torch.finfo(new.dtype).tiny
            rest, old_rest = ((-torch.expm1(x)).clamp(min=tiny) for x in (logprobs, old_logprobs))
            return old * (old_logprobs - logprobs) + old_rest * (old_rest.log() - rest.log())
        case _:
            raise ValueError(f"kind must be 'tv' or 'kl', got {kind!r}: it decides the unit of the threshold.")


def divergence_masked_loss(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    kind: DivergenceKind,
    threshold: float,
    count: Count = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """DPPO's loss: the surrogate without tokens beyond the threshold that move further away (Qi et al. 2026).

        L = -E[M_t ρ_t Â_t],    M_t = 0 where D_t > threshold and (ρ_t - 1) Â_t > 0, else 1

    A ratio measures distance poorly: for a rare token it leaves [0.8, 1.2] when hardly any probability mass moves, for
    a frequent token it stays inside while much moves. M_t carries no gradient.

    Args:
        logprobs: log π_θ, nats; receives the gradient.
        old_logprobs: log π_old, nats.
        advantages: Â_t.
        mask: True = an action of the policy.
        kind: Which `binary_divergence` D_t is.
        threshold: Largest D_t of a token that is kept regardless of direction, > 0.
        count: Divisor of the sums, see `Count`.

    Returns:
        The loss; and the metrics of `surrogate_loss` with `clip_fraction`, the fraction of dropped steps.

    Raises:
        ValueError: The threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(
            f"threshold must be > 0, got {threshold}: after the first step every token would be dropped. "
            "Pass e.g. 0.15 for 'tv'."
        )
    new, old = zero_where_masked(logprobs, mask), zero_where_masked(old_logprobs, mask)
    with torch.no_grad():
        moves_away = (new - old) * zero_where_masked(advantages, mask) > 0
        dropped = moves_away & (binary_divergence(new, old, kind) > threshold) & mask
    advantages = advantages.masked_fill(dropped, 0)
    loss, metrics = surrogate_loss(logprobs, old_logprobs, advantages, mask, count=count)
    return loss, metrics | {"clip_fraction": masked_mean(dropped.to(loss.dtype), mask, count)}
