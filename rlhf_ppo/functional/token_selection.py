"""Which tokens the policy loss reads: those of high entropy, or all but some with a large covariance."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.masked import ReduceSum, identity, masked_sum, zero_where_masked


def token_covariances(
    logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    reduce_sum: ReduceSum = identity,
) -> Float[Tensor, "*shape"]:
    """Each token's part of the covariance of log-probability and advantage (Cui et al. 2025). Collective.

        c_t = (log π(a_t|s_t) - mean log π) (Â_t - mean Â)

    A policy gradient step lowers the entropy by about the mean of c_t, most of which comes from few tokens.

    Args:
        logprobs: log π of the sampled tokens, nats.
        advantages: Â_t.
        mask: True = an action of the policy; c_t is 0 elsewhere.
        reduce_sum: Sums over processes.
    """
    sums = torch.stack([masked_sum(logprobs, mask), masked_sum(advantages, mask), mask.sum().to(logprobs.dtype)])
    total_logprob, total_advantage, count = reduce_sum(sums).unbind()
    count = count.clamp(min=1)
    return zero_where_masked((logprobs - total_logprob / count) * (advantages - total_advantage / count), mask)


def top_share_threshold(values: Float[Tensor, " values"], share: float) -> float:
    """The smallest of the ⌈share · n⌉ largest values: tokens at or above it are kept (Wang et al. 2025).

    Args:
        values: Entropies of all tokens, at least one.
        share: ρ in (0, 1].

    Raises:
        ValueError: The share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}: no token would be left. Wang et al. use 0.2.")
    return float(values.topk(math.ceil(share * len(values))).values[-1])
