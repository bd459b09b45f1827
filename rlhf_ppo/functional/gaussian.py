"""Diagonal Gaussian over continuous actions: log-probability, entropy, KL."""

import math

from jaxtyping import Float
from torch import Tensor

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def gaussian_logprobs(
    mean: Float[Tensor, "*shape actions"], log_std: Float[Tensor, " actions"], actions: Float[Tensor, "*shape actions"]
) -> Float[Tensor, "*shape"]:
    """Log π(a|s) = -Σ_j [½ ((a_j - μ_j) / σ_j)² + log σ_j + ½ log 2π], nats.

    Args:
        mean: μ(s), one entry per action dimension.
        log_std: log σ, the same in every state.
        actions: As sampled, before clipping to the action space.
    """
    distance = (actions - mean) * (-log_std).exp()
    return -(0.5 * distance.square() + log_std + _HALF_LOG_2PI).sum(-1)


def gaussian_entropy(log_std: Float[Tensor, " actions"]) -> Float[Tensor, ""]:
    """S = Σ_j [log σ_j + ½ log 2πe], nats; can be negative."""
    return (log_std + (_HALF_LOG_2PI + 0.5)).sum()


def gaussian_kl(
    p_mean: Float[Tensor, "*shape actions"],
    p_log_std: Float[Tensor, " actions"],
    q_mean: Float[Tensor, "*shape actions"],
    q_log_std: Float[Tensor, " actions"],
) -> Float[Tensor, "*shape"]:
    """Exact KL(p || q) = Σ_j [log σ_q - log σ_p + (σ_p² + (μ_p - μ_q)²) / 2σ_q² - ½], nats."""
    variances = ((2 * p_log_std).exp() + (p_mean - q_mean).square()) * (-2 * q_log_std).exp()
    return (q_log_std - p_log_std + 0.5 * variances - 0.5).sum(-1)
