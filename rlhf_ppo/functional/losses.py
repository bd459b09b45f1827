"""Losses to minimize, each a sum over the masked steps divided by `count`.

Every loss takes the count of the whole optimizer step (`Count` in `masked`), so that the gradients of micro-batches and
processes add up to that of one batch. Every metric is detached and divided by the same count.
"""

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.masked import Count, masked_mean, zero_where_masked

Metrics: TypeAlias = dict[str, Tensor]
"""Metric names -> detached scalars."""


def ppo_clip_loss(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    count: Count = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """The clipped surrogate (Schulman et al. 2017, eq. 7), to minimize.

        L = -E[min(ρ_t Â_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) Â_t)],    ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)

    Args:
        logprobs: log π_θ, nats; receives the gradient.
        old_logprobs: log π_old, nats.
        advantages: Â_t.
        mask: True = an action of the policy.
        clip_low: ε_low in [0, 1): how far a probability may fall before its gradient is cut.
        clip_high: ε_high >= 0: how far it may rise; above ε_low it is "clip-higher" (Yu et al. 2025).
        dual_clip: c > 1 bounds the loss of a negative advantage by -c Â_t (Ye et al. 2020), for ratios that explode.
        count: Divisor of the sums, see `Count`.

    Returns:
        The loss; and metrics `clip_fraction` (steps whose gradient is cut), `approx_kl` (k2), `policy_kl` (mean of
        log π_old - log π_θ), `k3` (non-negative KL(π_old || π_θ)), `ratio_mean`.

    Raises:
        ValueError: A clip range or `dual_clip` is out of bounds.
    """
    check_clip(clip_low, clip_high, dual_clip)
    log_ratio, advantages = log_ratios(logprobs, old_logprobs, mask), zero_where_masked(advantages, mask)
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    pessimistic = torch.minimum(surrogate, clipped)
    is_cut = clipped < surrogate
    if dual_clip is not None:
        bound = dual_clip * advantages
        is_bounded = (advantages < 0) & (pessimistic < bound)
        pessimistic, is_cut = torch.where(is_bounded, bound, pessimistic), is_cut | is_bounded
    metrics = {"clip_fraction": masked_mean(is_cut.to(ratio.dtype), mask, count)}
    return -masked_mean(pessimistic, mask, count), metrics | ratio_metrics(log_ratio, mask, count)


def kl_penalty_loss(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    beta: float,
    old_kl: Float[Tensor, "*shape"] | None = None,
    count: Count = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """The penalized surrogate (Schulman et al. 2017, eq. 8), to minimize.

        L = -E[ρ_t Â_t - β KL(π_old(·|s_t) || π_θ(·|s_t))]

    Args:
        logprobs: log π_θ, nats; receives the gradient.
        old_logprobs: log π_old, nats.
        advantages: Â_t.
        mask: True = an action of the policy.
        beta: β >= 0, the weight of the KL to the *old policy* (not to the reference).
        old_kl: Exact KL(π_old || π_θ) at each step, with gradient. None: the estimate ρ - 1 - log ρ from the
            sampled action, unbiased in value and gradient under π_old.
        count: Divisor of the sums, see `Count`.

    Returns:
        The loss; and the metrics of `surrogate_loss` with `old_kl`, the mean of the penalized divergence.

    Raises:
        ValueError: β is negative.
    """
    if not beta >= 0:
        raise ValueError(
            f"beta must be >= 0, got {beta}: a negative penalty pushes the policy away from the old one. "
            "Pass beta=0.0 for the surrogate alone."
        )
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    divergence = torch.expm1(log_ratio) - log_ratio if old_kl is None else old_kl
    loss, metrics = surrogate_loss(logprobs, old_logprobs, advantages, mask, count=count)
    penalty = masked_mean(divergence, mask, count)
    return loss + beta * penalty, metrics | {"old_kl": penalty.detach()}


def surrogate_loss(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    count: Count = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """The unclipped surrogate (Schulman et al. 2015, eq. 14), to minimize: L = -E[ρ_t Â_t].

    TRPO adds a constraint. Without a bound it diverges over several epochs.

    Returns:
        The loss; and metrics `approx_kl`, `policy_kl`, `k3`, `ratio_mean` as in `ppo_clip_loss`.
    """
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    loss = -masked_mean(log_ratio.exp() * zero_where_masked(advantages, mask), mask, count)
    return loss, ratio_metrics(log_ratio, mask, count)


def reinforce_loss(
    logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    count: Count = None,
) -> Float[Tensor, ""]:
    """The policy-gradient loss (Williams 1992): L = -E[log π_θ(a_t|s_t) Â_t].

    Its gradient is correct only at the policy that sampled the actions: one pass over the data.
    """
    return -masked_mean(zero_where_masked(logprobs, mask) * zero_where_masked(advantages, mask), mask, count)


def value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    clip_range: float | None,
    count: Count = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Half the squared error of the critic, with the new values clipped around the old ones.

        L = ½ E[max((V - R)², (V_old + clip(V - V_old, -ε, ε) - R)²)]

    Args:
        values: V_θ(s_t); receives the gradient.
        old_values: V at the time of the rollout; read only when clipping.
        returns: Targets R_t.
        mask: True = an action of the policy.
        clip_range: ε > 0 in units of the return; None for the plain squared error (Andrychowicz et al. 2021 found
            clipping to hurt at every threshold).
        count: Divisor of the sums, see `Count`.

    Returns:
        The loss; and metrics `clip_fraction`, `error` (mean squared error, without ½), `mean` (of V).

    Raises:
        ValueError: The clip range is not positive.
    """
    if clip_range is not None and not clip_range > 0:
        raise ValueError(
            f"clip_range must be > 0 or None, got {clip_range}: at 0 the critic could only move away from its target. "
            "Pass None to switch value clipping off."
        )
    values, returns = zero_where_masked(values, mask), zero_where_masked(returns, mask)
    error = (values - returns).square()
    worst = error
    if clip_range is not None:
        old_values = zero_where_masked(old_values, mask)
        clipped = torch.maximum(torch.minimum(values, old_values + clip_range), old_values - clip_range)
        worst = torch.maximum(error, (clipped - returns).square())
    with torch.no_grad():
        metrics = {
            "clip_fraction": masked_mean((worst > error).to(values.dtype), mask, count),
            "error": masked_mean(error, mask, count),
            "mean": masked_mean(values, mask, count),
        }
    return 0.5 * masked_mean(worst, mask, count), metrics


def entropy_bonus(
    entropy: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, count: Count = None
) -> Float[Tensor, ""]:
    """Mean entropy `S[π_θ](s_t)` in nats, to *maximize*: subtract ent_coef times it from the loss."""
    return masked_mean(entropy, mask, count)


def compute_ppo_total_loss(
    new_log_probs: Float[Tensor, "*shape"],
    old_log_probs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    state_values: Float[Tensor, "*shape"],
    return_targets: Float[Tensor, "*shape"],
    entropy: Float[Tensor, "*shape"],
    epsilon: float = 0.2,
    c1: float = 0.5,
    c2: float = 0.01,
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, ""]:
    """The total PPO loss (Schulman et al. 2017, eq. 9), to minimize, in one call.

        L = -E[min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â)] + c₁ E[(V - R)²] - c₂ E[S]

    Args:
        new_log_probs: log π_θ of the actions, nats.
        old_log_probs: log π_old of the actions, nats.
        advantages: Â_t.
        state_values: V_θ(s_t).
        return_targets: R_t.
        entropy: `S[π_θ](s_t)`, nats.
        epsilon: ε of the clipped ratio.
        c1: Weight of the full squared error (`value_loss` takes half of it).
        c2: Weight of the entropy.
        mask: True = an action of the policy; None: every step.
    """
    mask = torch.ones_like(new_log_probs, dtype=torch.bool) if mask is None else mask
    policy, _ = ppo_clip_loss(new_log_probs, old_log_probs, advantages, mask, clip_low=epsilon, clip_high=epsilon)
    half_squares, _ = value_loss(state_values, state_values, return_targets, mask, clip_range=None)
    return policy + c1 * 2 * half_squares - c2 * entropy_bonus(entropy, mask)


def log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log ρ_t = log π_θ - log π_old, 0 outside the mask."""
    # Masked before `exp`: 0 times the inf of a junk step is nan, also in the gradient.
    return zero_where_masked(logprobs, mask) - zero_where_masked(old_logprobs, mask)


def ratio_metrics(log_ratio: Tensor, mask: Tensor, count: Count) -> Metrics:
    """The metrics `approx_kl`, `policy_kl`, `k3` and `ratio_mean` of `ppo_clip_loss`."""
    log_ratio = log_ratio.detach()
    return {
        "approx_kl": masked_mean(0.5 * log_ratio.square(), mask, count),
        "policy_kl": masked_mean(-log_ratio, mask, count),
        "k3": masked_mean(torch.expm1(log_ratio) - log_ratio, mask, count),
        "ratio_mean": masked_mean(log_ratio.exp(), mask, count),
    }


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """Raise ValueError for clip ranges that do not contain 1, and for a dual clip that does not exceed it."""
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ValueError(
            f"expected 0 <= clip_low < 1 and clip_high >= 0, got clip_low={clip_low}, clip_high={clip_high}: ratios "
            "are clipped to [1 - clip_low, 1 + clip_high], which must contain 1 and stay above 0. Usual: 0.2."
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(
            f"dual_clip must be > 1, got {dual_clip}: it would cut the gradient at the old policy itself. "
            "Ye et al. (2020) use 3.0; pass None to switch it off."
        )
