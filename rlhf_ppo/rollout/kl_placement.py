"""Where the KL to the reference stands: in the reward, in the loss, or split exactly between the two."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional import ReferenceKL, next_state_kl

KLPenalty: TypeAlias = Literal["kl", "abs", "mse", "full", "k3"]
"""How it is estimated: the classic's names for k1, |k1|, k2 and the exact divergence; k3 under its own name."""
KLPlacement: TypeAlias = Literal["reward", "loss", "split"]

_IN_LOSS: dict[str, ReferenceKL] = {"mse": "k2", "k3": "k3", "full": "full"}


def check_kl_placement(penalty: KLPenalty, placement: KLPlacement) -> None:
    """Refuse a pair whose gradient is not that of a KL, and say why.

    "abs" and "mse" in the reward are biased as well; they are accepted because the classic API names them.

    Raises:
        ValueError: For an unknown name, and for such a pair.
    """
    if penalty not in ("kl", "abs", "mse", "full", "k3"):
        raise ValueError(f"kl_penalty must be one of 'kl', 'abs', 'mse', 'full', 'k3', got {penalty!r}")
    if placement not in ("reward", "loss", "split"):
        raise ValueError(f"kl_placement must be one of 'reward', 'loss', 'split', got {placement!r}")
    if placement == "reward" and penalty == "k3":
        raise ValueError(
            "kl_penalty='k3' in the reward pushes the policy the wrong way (the cosine of its gradient with that of "
            "the KL is negative): k3 is an estimate to look at, logged as objective/kl_k3. Use kl_penalty='kl', or "
            "kl_placement='loss' for GRPO's form."
        )
    if placement == "loss" and penalty not in _IN_LOSS:
        raise ValueError(
            f"kl_penalty={penalty!r} in the loss is no penalty: the gradient of log π - log π_ref under tokens of π "
            "has mean zero, only noise is added. Use kl_penalty='full' (exact), 'mse' (k2, the same gradient on "
            "average) or 'k3' (GRPO), or kl_placement='reward'."
        )
    if placement == "split" and penalty != "full":
        raise ValueError(
            f"kl_placement='split' puts the exact KL of each state into the loss and that of later states into the "
            f"reward, got kl_penalty={penalty!r}, an estimate from single tokens. Use kl_penalty='full'."
        )


def loss_kl_estimator(penalty: KLPenalty, placement: KLPlacement) -> ReferenceKL | None:
    """The estimate that the loss holds; None where the reward holds all of it."""
    return None if placement == "reward" else _IN_LOSS[penalty]


def reward_kl(
    kl: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], placement: KLPlacement
) -> Float[Tensor, "batch time"]:
    """The KL that each action pays for in its reward, nats."""
    match placement:
        case "reward":
            return kl
        case "loss":
            return torch.zeros_like(kl)
        case "split":
            return next_state_kl(kl, mask)
