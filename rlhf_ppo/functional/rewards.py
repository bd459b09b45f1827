"""Per-step rewards from scores and KL."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_ppo.functional.masked import ReduceSum, identity, last_action_index, whitening_statistics, zero_where_masked

PenaltyMode: TypeAlias = Literal["replace", "subtract"]


def kl_shaped_rewards(
    kl: Float[Tensor, "batch time"],
    scores: Float[Tensor, " batch"] | Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    kl_coef: float,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Rewards of the KL-regularized objective (Ziegler et al. 2019, eq. 2), spread over the tokens.

        r_t = -kl_coef · kl_t + score_t

    A score per response is added at its last action.

    Args:
        kl: Per-token KL to the reference, nats (k1 gives the exact policy gradient).
        scores: One per response, or one per token.
        mask: True = an action of the policy. Outside, rewards are 0 and nothing is read.
        kl_coef: Weight of the KL to the reference, >= 0.

    Returns:
        Rewards, and rewards without the score (the KL term).

    Raises:
        ValueError: A row has no action, or the shape of the scores is neither [batch] nor [batch, time].
    """
    non_score = -kl_coef * zero_where_masked(kl, mask)
    if scores.shape == mask.shape:
        return non_score + zero_where_masked(scores, mask), non_score
    if scores.shape != mask.shape[:1]:
        raise ValueError(
            f"scores must be [batch] = {tuple(mask.shape[:1])} or [batch, time] = {tuple(mask.shape)}, got "
            f"{tuple(scores.shape)}: they would be spread over the wrong steps. "
            "Squeeze a trailing dimension, or pad token scores to the width of mask."
        )
    index = last_action_index(mask).unsqueeze(1)
    return non_score.scatter_add(1, index, scores.to(non_score.dtype).unsqueeze(1)), non_score


def total_scores(
    scores: Float[Tensor, " batch"] | Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, " batch"]:
    """Score of each episode: the sum over its own actions. Scores at other tokens, junk included, are not read."""
    return scores if scores.dim() == 1 else zero_where_masked(scores, mask).sum(dim=1)


def normalize_episode_scores(
    scores: Float[Tensor, " batch"] | Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    mean: float,
    deviation: float,
    clip: float | None = None,
) -> Float[Tensor, " batch"] | Float[Tensor, "batch time"]:
    """Normalize the total score S of each episode, and leave to each action its share of it.

        S' = clip((S - mean) / deviation, -clip, clip),        S = Σ_t score_t
        score'_t = f (score_t - mean [t is the last action]) / deviation,    f = S' deviation / (S - mean)

    The factor f, 1 unless S' is clipped, makes Σ_t score'_t = S': scores per action become what their sum would become
    as one number at the last action. The mean is subtracted once per episode, there: a constant in every return, which
    leaves the policy gradient unchanged. Subtracted at every token it would pay for the length of the episode.

    Args:
        scores: One per episode, or one per token.
        mask: True = an action of the policy. Outside, scores per token become 0 and are not read.
        mean: Mean of earlier totals; 0 only divides.
        deviation: Standard deviation of earlier totals, > 0; 1 only subtracts.
        clip: Largest absolute total; None: no clipping.

    Raises:
        ValueError: `clip` is not positive.
    """
    if scores.dim() == 1:
        normalized = (scores - mean) / deviation
        return normalized if clip is None else clip_scores(normalized, clip)
    shares = zero_where_masked(scores, mask) / deviation
    rows = torch.arange(len(shares), device=shares.device)
    shares[rows, last_action_index(mask)] -= mean / deviation
    if clip is None:
        return shares
    totals = shares.sum(dim=1)
    limited = clip_scores(totals, clip)
    return shares * torch.where(limited == totals, 1.0, limited / totals)[:, None]


def missing_eos_penalty(
    scores: Float[Tensor, " batch"], finished: Bool[Tensor, " batch"], *, penalty: float, mode: PenaltyMode
) -> Float[Tensor, " batch"]:
    """Penalize responses that ran into the length limit.

    "replace" sets their score to -penalty (Ziegler et al. 2019 with penalty 1); "subtract" subtracts the penalty from
    their score.

    Args:
        scores: From the reward source.
        finished: True = the response ended with a stop token.
        penalty: In units of the score, >= 0.
        mode: "replace" or "subtract".

    Raises:
        ValueError: The penalty is negative, or the mode is unknown.
    """
    if not penalty >= 0:
        raise ValueError(
            f"penalty must be >= 0, got {penalty}: a negative one would reward responses that never end. "
            "The sign is applied here; pass its absolute value."
        )
    if mode not in ("replace", "subtract"):
        raise ValueError(
            f"mode must be 'replace' or 'subtract', got {mode!r}: the two differ by the whole score. "
            "'replace' sets the score to -penalty, 'subtract' subtracts penalty from it."
        )
    penalized = torch.full_like(scores, -penalty) if mode == "replace" else scores - penalty
    return torch.where(finished, scores, penalized)


def soft_overlong_penalty(lengths: Int[Tensor, " batch"], *, max_length: int, buffer: int) -> Float[Tensor, " batch"]:
    """Penalty, in [-1, 0], of responses that come near the maximum length (DAPO, Yu et al. 2025).

        0 for |y| <= L - B,        (L - B - |y|) / B in between,        -1 for |y| >= L

    Args:
        lengths: |y|, tokens of each response.
        max_length: L.
        buffer: B >= 1, tokens before L over which the penalty grows.
    """
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def clip_scores(scores: Float[Tensor, "*shape"], limit: float) -> Float[Tensor, "*shape"]:
    """Clip scores to [-limit, limit].

    Raises:
        ValueError: The limit is not positive.
    """
    if not limit > 0:
        raise ValueError(
            f"limit must be > 0, got {limit}: every score would be clipped to the same number. Pass e.g. 10.0."
        )
    return scores.clamp(-limit, limit)


def classic_whiten_rewards(
    rewards: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    tail: Int[Tensor, " batch"],
    gamma: float,
    lam: float,
    reduce_sum: ReduceSum = identity,
) -> Float[Tensor, "batch time"]:
    """Whitened rewards under which `gae` gives the advantages of TRL's classic trainer.

    For parity only: the meaningful operation is `whiten(rewards, mask, shift_mean=False)`. The classic trainer whitened
    the padded array with the mean kept, which turns the zeros of its padding into

        c = mean · (1 - 1/std),

    and then ran GAE over the whole width. With V = 0 there, the k-th position after the last action adds (γλ)^k c to
    that action's advantage. This function adds the sum in closed form to the last action's reward:

        r'_last += c · Σ_{k=1}^{tail} (γλ)^k

    The result depends on the padding, which no estimate should: the longest row gets nothing, the shortest most.

    Args:
        rewards: Shaped rewards, junk allowed outside the mask.
        mask: True = an action of the policy.
        tail: Positions between each row's last action and the end of the classic padded array, >= 0.
        gamma: γ of the GAE that follows.
        lam: λ of the GAE that follows.
        reduce_sum: Sums over processes; the classic trainer whitened on each process alone.

    Raises:
        ValueError: A row has no action.
    """
    mean, scale = whitening_statistics(rewards, mask, reduce_sum=reduce_sum, scale_equal=True)
    whitened = zero_where_masked((zero_where_masked(rewards, mask) - mean) * scale + mean, mask)
    whitened_zero = mean - mean * scale
    steps = torch.arange(1, int(tail.max()) + 1, device=rewards.device) if len(tail) else tail
    weights = torch.where(steps <= tail.unsqueeze(1), (gamma * lam) ** steps.to(mean.dtype), 0)
    padding_return = whitened_zero * weights.sum(1, keepdim=True)
    return whitened.scatter_add(1, last_action_index(mask).unsqueeze(1), padding_return.to(whitened.dtype))
