"""Importance weights for tokens that an inference engine sampled with other log-probabilities than the trainer's."""

from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.masked import at_least_float32, zero_where_masked


def importance_ratio(
    logprobs: Float[Tensor, "*shape"], sampler_logprobs: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """π_old(a_t|s_t) / μ(a_t|s_t): the probability of a token under the trainer, divided by that under the sampler.

    Args:
        logprobs: log π_old under the trainer, nats.
        sampler_logprobs: log μ under the sampler, temperature and filters included, nats.
        mask: True = an action of the policy; the ratio is 1 elsewhere.
    """
    difference = at_least_float32(zero_where_masked(logprobs, mask)) - at_least_float32(
        zero_where_masked(sampler_logprobs, mask)
    )
    return difference.exp()


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
