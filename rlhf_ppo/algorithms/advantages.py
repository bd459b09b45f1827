"""`Rollout` -> `TrainBatch`: the credit of each action, standardized over the batch of all processes."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from rlhf_ppo.algorithms.baselines import MovingBaseline
from rlhf_ppo.algorithms.config import GAE, GRPO, RLOO, ReinforcePlusPlus
from rlhf_ppo.batch import Rollout, TrainBatch
from rlhf_ppo.functional import (
    discounted_returns,
    gae,
    grpo_advantages,
    length_adaptive_lam,
    rloo_advantages,
    whitening_statistics,
    zero_where_masked,
)

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]
EstimateAdvantages: TypeAlias = Callable[[Rollout], TrainBatch]
BaselineOf: TypeAlias = Callable[[Rollout, Tensor], Tensor]
"""(rollout, returns [B, T]) -> what to subtract from the returns, broadcast against them."""


def gae_advantages(config: GAE, reduce_sum: ReduceSum) -> EstimateAdvantages:
    """Generalized advantage estimates; value targets are formed before whitening, with a λ of their own if asked."""

    def estimate(rollout: Rollout) -> TrainBatch:
        lam = config.lam if config.length_alpha is None else length_adaptive_lam(rollout.mask, config.length_alpha)
        advantages, returns = _gae(rollout, config.gamma, lam)
        if config.value_lam is not None:
            _, returns = _gae(rollout, config.gamma, config.value_lam)
        return _standardized(rollout, advantages, returns, reduce_sum)

    return estimate


def monte_carlo_advantages(config: GAE, reduce_sum: ReduceSum) -> EstimateAdvantages:
    """The same with λ = 1: targets that do not read the critic which they train."""
    return gae_advantages(replace(config, lam=1.0, value_lam=1.0, length_alpha=None), reduce_sum)


def return_advantages(
    baseline: BaselineOf,
    reduce_sum: ReduceSum,
    *,
    gamma: float,
    shift_mean: bool = True,
    scale: bool = True,
    bootstrap: bool = False,
) -> EstimateAdvantages:
    """Discounted returns G_t minus a baseline, then minus their mean and divided by their deviation, as asked.

    With `bootstrap`, V stands for the future that was not watched, behind truncated and last steps.
    """

    def estimate(rollout: Rollout) -> TrainBatch:
        returns = discounted_returns(
            rollout.rewards, rollout.terminated, rollout.truncated, gamma=gamma, mask=rollout.mask,
            values=rollout.values if bootstrap else None,
        )  # fmt: skip
        centered = zero_where_masked(returns - baseline(rollout, returns), rollout.mask)
        return _standardized(rollout, centered, returns, reduce_sum, shift_mean=shift_mean, scale=scale)

    return estimate


def group_relative_advantages(config: RLOO | GRPO) -> EstimateAdvantages:
    """One advantage for a whole response, from the other responses to its prompt. KL is part of the score (RLOO)."""

    def estimate(rollout: Rollout) -> TrainBatch:
        match config:
            case RLOO():
                advantages = rloo_advantages(_totals(rollout), rollout.group_size)
            case GRPO():
                advantages = grpo_advantages(
                    _totals(rollout), rollout.group_size, normalize_std=config.normalize_std, eps=1e-4
                )
        spread = advantages[:, None].expand_as(rollout.rewards).masked_fill(~rollout.mask, 0.0)
        return _batch(rollout, spread, torch.zeros_like(spread))

    return estimate


def no_baseline(rollout: Rollout, returns: Tensor) -> Tensor:
    """Nothing to subtract; the batch mean is what standardizing subtracts."""
    return torch.zeros_like(returns)


def learned_baseline(rollout: Rollout, returns: Tensor) -> Tensor:
    """V(s_t) of the policy that acted."""
    return rollout.values[:, :-1]


def moving_baseline(moving: MovingBaseline, reduce_sum: ReduceSum) -> BaselineOf:
    """The moving mean of earlier batches, which then takes this one in."""

    def baseline(rollout: Rollout, returns: Tensor) -> Tensor:
        total, count = reduce_sum(torch.stack([returns.sum(), rollout.mask.sum().to(returns.dtype)])).tolist()
        return torch.full_like(returns, moving.swap(total / max(count, 1.0)))

    return baseline


def group_baseline(config: ReinforcePlusPlus) -> BaselineOf:
    """The mean undiscounted return of the responses to the same prompt; nothing where groups are not asked for."""

    def baseline(rollout: Rollout, returns: Tensor) -> Tensor:
        totals = _totals(rollout)
        centered = grpo_advantages(totals, rollout.group_size, normalize_std=False, eps=0.0)
        return (totals - centered)[:, None].expand_as(returns)

    return baseline if config.group_baseline else no_baseline


def _gae(rollout: Rollout, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    return gae(
        rollout.rewards, rollout.values, rollout.terminated, rollout.truncated, gamma=gamma, lam=lam, mask=rollout.mask
    )


def _totals(rollout: Rollout) -> Tensor:
    return zero_where_masked(rollout.rewards, rollout.mask).sum(dim=1)


def _standardized(
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    reduce_sum: ReduceSum,
    *,
    shift_mean: bool = True,
    scale: bool = True,
) -> TrainBatch:
    mean, factor = whitening_statistics(advantages, rollout.mask, reduce_sum=reduce_sum)
    factor = factor if scale else torch.ones_like(factor)
    shifted = zero_where_masked((advantages - mean if shift_mean else advantages) * factor, rollout.mask)
    batch = _batch(rollout, shifted, returns)
    if not rollout.reference_kl_coef:
        return batch
    # The same objective in other units: what multiplies the rewards multiplies the KL that stands beside them.
    return replace(batch, reference_kl_coef=rollout.reference_kl_coef * float(factor))


def _batch(rollout: Rollout, advantages: Tensor, returns: Tensor) -> TrainBatch:
    return TrainBatch(
        inputs=rollout.inputs, mask=rollout.mask, logprobs=rollout.logprobs, values=rollout.values[:, :-1],
        advantages=advantages, returns=returns, ref_logprobs=rollout.ref_logprobs,
        reference_kl_coef=rollout.reference_kl_coef,
    )  # fmt: skip
