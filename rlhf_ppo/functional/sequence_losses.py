"""Policy losses beside the clipped surrogate: GSPO's sequence ratios, CISPO's weights, likelihood of good examples."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.losses import Metrics, check_clip, log_ratios, ratio_metrics
from rlhf_ppo.functional.masked import Count, masked_mean, sequence_mean_count, zero_where_masked


def gspo_loss(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip_low: float,
    clip_high: float,
    count: Count = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """GSPO's clipped surrogate with one ratio per sequence (Zheng et al. 2025, eq. 5), to minimize.

        s_i = (π_θ(y_i|x) / π_old(y_i|x))^(1/|y_i|) = exp(1/|y_i| Σ_t log ρ_it)
        L = -E_i[1/|y_i| Σ_t min(s_it Â_it, clip(s_it, 1 - ε_low, 1 + ε_high) Â_it)],   s_it = s_i as a value

    The gradient of s_it is s_i ∇log π_θ(y_it) (GSPO-token): with one advantage per response it is that of min(s_i Â_i,
    clip(s_i) Â_i), and advantages per token are allowed. |y_i| counts the policy's own tokens.

    Args:
        logprobs: log π_θ, nats; receives the gradient.
        old_logprobs: log π_old, nats.
        advantages: Â_it.
        mask: True = an action of the policy.
        clip_low: ε_low in [0, 1); 3e-4 in the article: s_i is a mean, and moves far less than a token's ratio.
        clip_high: ε_high >= 0; 4e-4 in the article.
        count: `sequence_mean_count` of the whole optimizer step; None: of these rows.

    Returns:
        The loss; and the metrics of `ppo_clip_loss`, with `clip_fraction` by tokens of sequences that are cut.
    """
    check_clip(clip_low, clip_high)
    if count is None:
        count = sequence_mean_count(mask, mask.any(dim=1).sum().clamp(min=1))
    log_ratio, advantages = log_ratios(logprobs, old_logprobs, mask), zero_where_masked(advantages, mask)
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    ratio = (mean.detach() + log_ratio - log_ratio.detach()).exp()
    surrogate, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    metrics = {"clip_fraction": masked_mean((clipped < surrogate).to(ratio.dtype), mask, count)}
    loss = -masked_mean(torch.minimum(surrogate, clipped), mask, count)
    return loss, metrics | ratio_metrics(log_ratio, mask, count)


def cispo_loss(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    min_weight: float,
    max_weight: float,
    drop: bool = False,
    count: Count = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """CISPO's loss: REINFORCE with clipped importance weights (MiniMax-M1, Chen et al. 2025).

        L = -E[sg(clip(ρ_t, w_min, w_max)) Â_t log π_θ(a_t|s_t)]

    PPO's clip drops the gradient of a token whose ratio has left the range; here the token keeps it, with a bounded
    weight, which carries no gradient. With `drop` a token beyond the bounds has weight 0, whichever the sign of its
    advantage (double-sided importance sampling).

    Args:
        logprobs: log π_θ, nats; receives the gradient.
        old_logprobs: log π_old, nats.
        advantages: Â_t.
        mask: True = an action of the policy.
        min_weight: w_min, the article's 1 - ε_low; 0, its choice, is no lower bound.
        max_weight: w_max, the article's 1 + ε_high, >= 1.
        drop: Whether tokens beyond the bounds are dropped instead of bounded.
        count: Divisor of the sums, see `Count`.

    Returns:
        The loss; and the metrics of `ppo_clip_loss`, with `clip_fraction` the fraction of bounded weights.

    Raises:
        ValueError: The bounds do not contain 1.
    """
    if not 0 <= min_weight <= 1 <= max_weight:
        raise ValueError(
            f"expected 0 <= min_weight <= 1 <= max_weight, got {min_weight} and {max_weight}: tokens of the old policy "
            "itself, whose ratio is 1, would get another weight. Pass e.g. min_weight=0.0, max_weight=5.0."
        )
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(min_weight, max_weight)
    is_cut = weight != ratio
    weight = weight.masked_fill(is_cut, 0.0) if drop else weight
    loss = -masked_mean(weight * zero_where_masked(advantages, mask) * zero_where_masked(logprobs, mask), mask, count)
    metrics = {"clip_fraction": masked_mean(is_cut.to(ratio.dtype), mask, count)}
    return loss, metrics | ratio_metrics(log_ratio, mask, count)


def weighted_nll_loss(
    logprobs: Float[Tensor, "*shape"],
    weights: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    count: Count = None,
) -> Float[Tensor, ""]:
    """Weighted negative log-likelihood, to minimize: L = -E[w_t log π_θ(a_t|s_t)].

    With `positive_example_weights` it is VAPO's loss on good responses (Yue et al. 2025).

    Args:
        logprobs: log π_θ, nats; receives the gradient.
        weights: w_t >= 0.
        mask: True = an action of the policy.
        count: Divisor of the sums, see `Count`.
    """
    return -masked_mean(zero_where_masked(weights, mask) * zero_where_masked(logprobs, mask), mask, count)


def positive_example_weights(
    scores: Float[Tensor, " batch"], mask: Bool[Tensor, "batch time"], *, coef: float, threshold: float, share: float
) -> Float[Tensor, "batch time"]:
    """Weights of `weighted_nll_loss` on good responses: μ / share at tokens of responses above the threshold, else 0.

    Divided by all tokens of the batch the loss is then μ times the mean over the tokens of good responses (Yue et al.
    2025), whichever way the batch is cut into minibatches.

    Args:
        scores: One per response.
        mask: True = an action of the policy.
        coef: μ >= 0.
        threshold: Responses with a larger score are good.
        share: Share of the good responses' tokens in those of all processes; 0: there is none.
    """
    good = (scores > threshold)[:, None] & mask
    return good.to(scores.dtype) * (coef / share if share > 0 else 0.0)
