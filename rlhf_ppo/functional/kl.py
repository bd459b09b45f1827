"""KL divergence between two policies: per-token estimators, the exact divergence, and the KL of the next state."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional.masked import at_least_float32, next_action_index, zero_where_masked

KLKind: TypeAlias = Literal["k1", "abs", "k2", "k3"]
ReferenceKL: TypeAlias = Literal["k2", "k3", "full"]
"""Kinds of KL to the reference that a loss can hold. k1 is excluded: its gradient there has mean zero."""


def kl_estimate(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    kind: KLKind,
    *,
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Per-token estimate of KL(π || reference) from tokens sampled by π (Schulman 2020, "Approximating KL divergence").

        k1 = log π - log π_ref      k2 = k1² / 2      k3 = exp(-k1) - 1 + k1      abs = |k1|

    k1 is unbiased and of either sign; k2 is biased and >= 0; k3 is unbiased and >= 0. *Where* one is used matters more
    than its value: as a reward k1 gives the exact gradient of the sequence KL; as a loss k1's gradient has mean zero,
    k2's is exact per state, and k3's is that of the reversed KL.

    Args:
        logprobs: log π of the sampled tokens, nats.
        ref_logprobs: log π_ref of the same tokens, nats.
        kind: The estimator.
        mask: Where given, positions outside become 0 and get no gradient.

    Raises:
        ValueError: The kind is unknown.
    """
    if mask is not None:
        logprobs, ref_logprobs = zero_where_masked(logprobs, mask), zero_where_masked(ref_logprobs, mask)
    difference = logprobs - ref_logprobs
    match kind:
        case "k1":
            return difference
        case "abs":
            return difference.abs()
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return torch.expm1(-difference) + difference
        case _:
            raise ValueError(
                f"kind must be one of 'k1', 'abs', 'k2', 'k3', got {kind!r}: it decides the sign and the bias of every "
                "KL term. The exact divergence over the vocabulary is `categorical_kl`, which needs logits."
            )


def categorical_kl(
    p_logits: Float[Tensor, "*shape vocab"], q_logits: Float[Tensor, "*shape vocab"]
) -> Float[Tensor, "*shape"]:
    """Exact KL(p || q) = Σ_v p_v (log p_v - log q_v) over the last dimension, nats, at least float32.

    Entries with p = 0 contribute 0, whatever q is there; q = 0 where p > 0 gives inf.
    """
    log_p = torch.log_softmax(at_least_float32(p_logits), dim=-1)
    log_q = torch.log_softmax(at_least_float32(q_logits), dim=-1)
    impossible = log_p == -torch.inf
    # inf - inf is nan even where it is multiplied by p = 0, so both logarithms are taken out first.
    difference = log_p.masked_fill(impossible, 0) - log_q.masked_fill(impossible, 0)
    return (log_p.exp() * difference).sum(-1)


def next_state_kl(kl: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """Exact KL at the state that each action leads to: the action's share of the sequence KL, for the reward.

        ∇KL(π || π_ref over sequences) = E[Σ_t ∇KL_t + Σ_t ∇log π(a_t|s_t) Σ_{u>t} KL_u],    KL_u = KL(π(·|s_u) || ...)

    Both sums are exact given the states (Rao-Blackwell; Amini et al. 2025). The first belongs in the loss, the
    second in the reward, whose return from t on then holds later states only.

    Args:
        kl: KL(π(·|s_t) || π_ref(·|s_t)) at each step, nats, junk allowed outside the mask.
        mask: True = an action of the policy. Masked steps (tool output) may lie before the next action.

    Returns:
        KL at the row's next action, 0 at its last one and outside the mask.
    """
    next_index, is_last = next_action_index(mask)
    padded = torch.nn.functional.pad(zero_where_masked(kl, mask), (0, 1))
    return zero_where_masked(padded.gather(1, next_index), mask & ~is_last)
