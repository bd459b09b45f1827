"""Importance weights for tokens that an inference engine sampled with other log-probabilities than the trainer's."""

from typing import Literal, TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.masked import at_least_float32, zero_where_masked

ImportanceLevel: TypeAlias = Literal["token", "sequence", "geometric"]


def importance_ratio(
    logprobs: Float[Tensor, "*shape"], sampler_logprobs: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """π_old(a_t|s_t) / μ(a_t|s_t): the probability of a token under the trainer, divided by that under the sampler.

    Args:
        logprobs: log π_old under the trainer, nats.
        sampler_logprobs: log μ under the sampler, temperature and filters included, nats.
        mask: True = an action of the policy; the ratio is 1 elsewhere.
    """
    return _log_ratio(logprobs, sampler_logprobs, mask).exp()


def truncated_importance_weights(
    logprobs: Float[Tensor, "*shape"],
    sampler_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    cap: float,
) -> Float[Tensor, "*shape"]:
    """Truncated importance weights of the trainer's policy against the sampler's (Ionides 2008).

        w_t = min(π_old(a_t|s_t) / μ(a_t|s_t), C)

    The policy term of token t is multiplied by w_t, which carries no gradient. Unlike PPO's own ratio π_θ / π_old it
    does not change while the epochs run. The cap C bounds the variance from rare tokens; it introduces bias.

    Args:
        logprobs: log π_old under the trainer, nats.
        sampler_logprobs: log μ under the sampler, nats.
        mask: True = an action of the policy; the weight is 1 elsewhere.
        cap: C >= 1. Usual: 2.

    Raises:
        ValueError: The cap is below 1.
    """
    if not cap >= 1:
        raise ValueError(
            f"cap must be >= 1, got {cap}: where sampler and trainer agree the ratio is 1, and a lower cap would "
            "shrink every such token alike. Usual: 2.0."
        )
    return importance_ratio(logprobs, sampler_logprobs, mask).clamp(max=cap).detach()


def importance_weights(
    logprobs: Float[Tensor, "batch time"],
    sampler_logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    level: ImportanceLevel,
    mode: Literal["truncate", "mask", "keep"],
    low: float,
    high: float,
) -> Float[Tensor, "batch time"]:
    """Weights of tokens that were sampled from μ instead of π_old, without gradient; 1 outside the mask.

        ρ_t = π_old(a_t|s_t) / μ(a_t|s_t)
        token: w_t = ρ_t       sequence: w_t = Π_s ρ_s       geometric: w_t = (Π_s ρ_s)^(1/n)

    "truncate" is min(w, high) (truncated importance sampling; Ionides 2008), "mask" is w within [low, high] and 0
    outside (IcePop, Ling Team 2025), "keep" is 1 within and 0 outside (rejection).

    Args:
        logprobs: log π_old under the trainer, nats.
        sampler_logprobs: log μ under the sampler, temperature and filters included, nats.
        mask: True = an action of the policy; n of them in a row.
        level: "token" bounds the variance best and is biased for later tokens; "sequence" is the exact weight of a
            response and varies with its length; "geometric" does not.
        mode: What happens to weights outside the bounds.
        low: Smallest weight that is kept, in [0, 1].
        high: Largest weight, >= 1.

    Raises:
        ValueError: The bounds do not contain 1.
    """
    if not 0 <= low <= 1 <= high:
        raise ValueError(
            f"expected 0 <= low <= 1 <= high, got {low} and {high}: where sampler and trainer agree the weight is 1, "
            "and such tokens would be shrunk or dropped. Usual: 0 and 2 to truncate, 0.5 and 5 to mask."
        )
    log_ratio = _log_ratio(logprobs, sampler_logprobs, mask)
    if level != "token":
        total = log_ratio.sum(dim=1, keepdim=True)
        total = total / mask.sum(dim=1, keepdim=True).clamp(min=1) if level == "geometric" else total
        log_ratio = total.expand_as(log_ratio).masked_fill(~mask, 0.0)
    weights = log_ratio.exp()
    kept = (weights >= low) & (weights <= high)
    match mode:
        case "truncate":
            weights = weights.clamp(max=high)
        case "mask":
            weights = weights.masked_fill(~kept, 0.0)
        case "keep":
            weights = kept.to(weights.dtype)
    return weights.detach()


def _log_ratio(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log π_old - log μ, at least float32, 0 outside the mask."""
    return at_least_float32(zero_where_masked(logprobs, mask)) - at_least_float32(
        zero_where_masked(sampler_logprobs, mask)
    )
