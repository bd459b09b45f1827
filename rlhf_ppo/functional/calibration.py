"""How far a critic is off, by position in the response."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.masked import zero_where_masked


def value_bias_by_position(
    values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    bins: int,
) -> tuple[Float[Tensor, " bins"], Float[Tensor, " bins"]]:
    """Sum of V(s_t) - R_t and number of actions in each of `bins` equal parts of the responses.

    The k-th of n own actions of a response is in part ⌊bins · k / n⌋. Sum over n and add over processes for the mean
    bias: a critic that starts as a reward model is often low at the first tokens (Yuan et al. 2025).

    Args:
        values: V(s_t).
        returns: Value targets R_t.
        mask: True = an action of the policy.
        bins: Number of parts, >= 1.
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    part = ((mask.cumsum(dim=1) - 1) * bins // lengths).clamp(0, bins - 1)
    error = zero_where_masked(values - returns, mask).flatten()
    zeros = torch.zeros(bins, dtype=error.dtype, device=error.device)
    return zeros.scatter_add(0, part.flatten(), error), zeros.scatter_add(0, part.flatten(), mask.flatten().to(error))
