"""`Rollout` -> `TrainBatch`: advantage estimates, standardized over the batch of all processes."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from rlhf_ppo.algorithms.baselines import MovingBaseline
from rlhf_ppo.algorithms.config import GAE, GRPO, GSPO, RLOO, ReinforcePlusPlus
from rlhf_ppo.algorithms.surrogate_config import PositiveNLL
from rlhf_ppo.batch import Rollout, TrainBatch
from rlhf_ppo.functional import (
    discounted_returns,
    gae,
    grpo_advantages,
    length_adaptive_lam,
    positive_example_weights,
    rloo_advantages,
    turn_gae,
    whitening_statistics,
    zero_where_masked,
)

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]
EstimateAdvantages: TypeAlias = Callable[[Rollout], TrainBatch]
BaselineFunction: TypeAlias = Callable[[Rollout, Tensor], Tensor]
"""(rollout, returns [B, T]) -> baseline to subtract, broadcast against the returns."""


def gae_advantages(config: GAE, reduce_sum: ReduceSum) -> EstimateAdvantages:
    """GAE advantages, whitened; value targets are computed before whitening, with `value_lam` if it is set."""

    def estimate(rollout: Rollout) -> TrainBatch:
        starts = None if config.unit == "token" else _turn_starts(rollout)
        actions = rollout.mask if starts is None else starts
        lam = config.lam if config.length_alpha is None else length_adaptive_lam(actions, config.length_alpha)
        advantages, returns = _gae(rollout, config.gamma, lam, starts)
        if config.value_lam is not None:
            _, returns = _gae(rollout, config.gamma, config.value_lam, starts)
        return _standardize(rollout, advantages, returns, reduce_sum)

    return estimate


def monte_carlo_advantages(config: GAE, reduce_sum: ReduceSum) -> EstimateAdvantages:
    """`gae_advantages` with λ = 1: value targets are Monte Carlo returns, which do not depend on the critic."""
    return gae_advantages(replace(config, lam=1.0, value_lam=1.0, length_alpha=None), reduce_sum)


def return_advantages(
    baseline: BaselineFunction,
    reduce_sum: ReduceSum,
    *,
    gamma: float,
    shift_mean: bool = True,
    scale: bool = True,
    bootstrap: bool = False,
) -> EstimateAdvantages:
    """Discounted returns G_t minus a baseline; optionally minus their mean, and divided by their standard deviation.

    With `bootstrap`, V stands for the unobserved future after truncated and last steps.
    """

    def estimate(rollout: Rollout) -> TrainBatch:
        returns = discounted_returns(
            rollout.rewards, rollout.terminated, rollout.truncated, gamma=gamma, mask=rollout.mask,
            values=rollout.values if bootstrap else None,
        )  # fmt: skip
        centered = zero_where_masked(returns - baseline(rollout, returns), rollout.mask)
        return _standardize(rollout, centered, returns, reduce_sum, shift_mean=shift_mean, scale=scale)

    return estimate


def group_relative_advantages(config: RLOO | GRPO | GSPO) -> EstimateAdvantages:
    """One advantage per response, relative to the other responses to its prompt. The KL is in the score."""

    def estimate(rollout: Rollout) -> TrainBatch:
        match config:
            case RLOO():
                advantages = rloo_advantages(_episode_returns(rollout), rollout.group_size)
            case GRPO() | GSPO():
                advantages = grpo_advantages(
                    _episode_returns(rollout), rollout.group_size, normalize_std=config.normalize_std, eps=1e-4
                )
        per_token = advantages[:, None].expand_as(rollout.rewards).masked_fill(~rollout.mask, 0.0)
        return _train_batch(rollout, per_token, torch.zeros_like(per_token))

    return estimate


def with_positive_examples(
    estimate: EstimateAdvantages, config: PositiveNLL | None, reduce_sum: ReduceSum
) -> EstimateAdvantages:
    """The same estimate, on batches with the weights of good responses' likelihood; None: unchanged."""
    if config is None:
        return estimate

    def estimate_with_weights(rollout: Rollout) -> TrainBatch:
        if rollout.scores is None:
            raise ValueError("expected scores in the rollout, got None: positive_nll does not know which are good")
        batch = estimate(rollout)
        good = (rollout.scores > config.threshold)[:, None] & batch.mask
        tokens, all_tokens = reduce_sum(torch.stack([good.sum(), batch.mask.sum()]).double()).tolist()
        weights = positive_example_weights(
            rollout.scores, batch.mask, coef=config.coef, threshold=config.threshold,
            share=tokens / max(all_tokens, 1.0),
        )  # fmt: skip
        return replace(batch, nll_weights=weights)

    return estimate_with_weights


def no_baseline(rollout: Rollout, returns: Tensor) -> Tensor:
    """Zero baseline; standardization subtracts the batch mean."""
    return torch.zeros_like(returns)


def learned_baseline(rollout: Rollout, returns: Tensor) -> Tensor:
    """V(s_t) at the time of the rollout."""
    return rollout.values[:, :-1]


def moving_baseline(moving: MovingBaseline, reduce_sum: ReduceSum) -> BaselineFunction:
    """The moving mean of earlier batches, then updated with this one."""

    def baseline(rollout: Rollout, returns: Tensor) -> Tensor:
        total, count = reduce_sum(torch.stack([returns.sum(), rollout.mask.sum().to(returns.dtype)])).tolist()
        return torch.full_like(returns, moving.update(total / max(count, 1.0)))

    return baseline


def group_baseline(config: ReinforcePlusPlus) -> BaselineFunction:
    """The mean undiscounted return of the responses to the same prompt; `no_baseline` without `group_baseline`."""

    def baseline(rollout: Rollout, returns: Tensor) -> Tensor:
        totals = _episode_returns(rollout).double()  # the mean of equal returns is then exactly their value
        centered = grpo_advantages(totals, rollout.group_size, normalize_std=False, eps=0.0)
        return (totals - centered).to(returns.dtype)[:, None].expand_as(returns)

    return baseline if config.group_baseline else no_baseline


def _gae(rollout: Rollout, gamma: float, lam: float | Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """GAE over tokens; over turns where their starts are given."""
    steps = rollout.rewards, rollout.values, rollout.terminated, rollout.truncated
    if starts is None:
        return gae(*steps, gamma=gamma, lam=lam, mask=rollout.mask)
    return turn_gae(*steps, gamma=gamma, lam=lam, mask=rollout.mask, turn_starts=starts)


def _turn_starts(rollout: Rollout) -> Tensor:
    """True at the first action of each turn: as given, or of each run of actions."""
    if rollout.turn_starts is not None:
        return rollout.turn_starts & rollout.mask
    return rollout.mask & ~torch.nn.functional.pad(rollout.mask[:, :-1], (1, 0))


def _episode_returns(rollout: Rollout) -> Tensor:
    return zero_where_masked(rollout.rewards, rollout.mask).sum(dim=1)


def _standardize(
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
    batch = _train_batch(rollout, shifted, returns)
    if not rollout.reference_kl_coef:
        return batch
    # The same objective in other units: the factor on the rewards also multiplies the KL term in the loss.
    return replace(batch, reference_kl_coef=rollout.reference_kl_coef * float(factor))


def _train_batch(rollout: Rollout, advantages: Tensor, returns: Tensor) -> TrainBatch:
    mask = rollout.mask if rollout.excluded is None else rollout.mask & ~rollout.excluded[:, None]
    return TrainBatch(
        inputs=rollout.inputs, mask=mask, logprobs=rollout.logprobs, values=rollout.values[:, :-1],
        advantages=advantages, returns=returns, ref_logprobs=rollout.ref_logprobs,
        reference_kl_coef=rollout.reference_kl_coef,
    )  # fmt: skip
