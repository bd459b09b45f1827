"""Placement of the KL to the reference: in the reward, in the loss, or split between the two."""

from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.functional import ReferenceKL, next_state_kl

KLPenalty: TypeAlias = Literal["kl", "abs", "mse", "full", "k3", "none"]
"""KL estimate: "kl", "abs", "mse", "full" are TRL's names for k1, |k1|, k2 and the exact KL; "k3" is k3; "none": there
is no reference, and no pass over one."""
KLPlacement: TypeAlias = Literal["reward", "loss", "split"]

_LOSS_ESTIMATORS: dict[str, ReferenceKL] = {"mse": "k2", "k3": "k3", "full": "full"}


def check_kl_placement(penalty: KLPenalty, placement: KLPlacement, kl_coef: float) -> None:
    """Raise ValueError for an estimate whose gradient in this placement is not that of the KL.

    "abs" and "mse" in the reward are biased, too; they are accepted because TRL's classic API has them.

    Raises:
        ValueError: An unknown name, or such a combination.
    """
    if penalty not in get_args(KLPenalty):
        raise ValueError(f"kl_penalty must be one of {', '.join(map(repr, get_args(KLPenalty)))}, got {penalty!r}")
    if placement not in ("reward", "loss", "split"):
        raise ValueError(f"kl_placement must be one of 'reward', 'loss', 'split', got {placement!r}")
    if penalty == "none" and (kl_coef != 0 or placement != "reward"):
        raise ValueError(
            f"kl_penalty='none' measures no KL, got init_kl_coef={kl_coef} and kl_placement={placement!r}: there would "
            "be nothing to weigh. Set init_kl_coef=0 and leave kl_placement at 'reward', or choose kl_penalty='kl'."
        )
    if placement == "reward" and penalty == "k3":
        raise ValueError(
            "kl_penalty='k3' in the reward pushes the policy the wrong way (the cosine of its gradient with that of "
            "the KL is negative): k3 is for monitoring, logged as objective/kl_k3. Use kl_penalty='kl', or "
            "kl_placement='loss' for GRPO's form."
        )
    if placement == "loss" and penalty not in _LOSS_ESTIMATORS:
        raise ValueError(
            f"kl_penalty={penalty!r} in the loss does not penalize the KL: the gradient of log π - log π_ref on "
            "tokens of π has mean zero, so it only adds noise. Use kl_penalty='full' (exact), 'mse' (k2, the same "
            "gradient on average) or 'k3' (GRPO), or kl_placement='reward'."
        )
    if placement == "split" and penalty != "full":
        raise ValueError(
            f"kl_placement='split' puts the exact KL of each state into the loss and that of later states into the "
            f"reward, got kl_penalty={penalty!r}, an estimate from single tokens. Use kl_penalty='full'."
        )


def loss_kl_estimator(penalty: KLPenalty, placement: KLPlacement) -> ReferenceKL | None:
    """KL estimate in the loss; None if all of the KL is in the reward."""
    return None if placement == "reward" else _LOSS_ESTIMATORS[penalty]


def reward_kl(
    kl: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], placement: KLPlacement
) -> Float[Tensor, "batch time"]:
    """KL that is subtracted from the reward of each action, nats."""
    match placement:
        case "reward":
            return kl
        case "loss":
            return torch.zeros_like(kl)
        case "split":
            return next_state_kl(kl, mask)
