"""`Rollout` -> `TrainBatch`: the credit of each action, whitened over the batch of all processes."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from rlhf_ppo.algorithms.config import GAE, GRPO, RLOO, Reinforce
from rlhf_ppo.batch import Rollout, TrainBatch
from rlhf_ppo.functional import discounted_returns, gae, grpo_advantages, rloo_advantages, whiten

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]
EstimateAdvantages: TypeAlias = Callable[[Rollout], TrainBatch]


def from_values(config: GAE, reduce_sum: ReduceSum) -> EstimateAdvantages:
    """Generalised advantage estimates; value targets are formed before whitening."""

    def estimate(rollout: Rollout) -> TrainBatch:
        advantages, returns = gae(
            rollout.rewards, rollout.values, rollout.terminated, rollout.truncated,
            gamma=config.gamma, lam=config.lam, mask=rollout.mask,
        )  # fmt: skip
        return _batch(rollout, whiten(advantages, rollout.mask, reduce_sum=reduce_sum), returns)

    return estimate


def from_returns(config: Reinforce, reduce_sum: ReduceSum) -> EstimateAdvantages:
    """Discounted returns G_t minus a baseline: V(s_t) when it is learned, else the batch mean (by whitening).

    A learned V also stands for the future that was not watched, behind truncated and last steps.
    """

    def estimate(rollout: Rollout) -> TrainBatch:
        returns = discounted_returns(
            rollout.rewards, rollout.terminated, rollout.truncated, gamma=config.gamma, mask=rollout.mask,
            values=rollout.values if config.learned_baseline else None,
        )  # fmt: skip
        baseline = rollout.values[:, :-1] if config.learned_baseline else torch.zeros_like(returns)
        return _batch(rollout, whiten(returns - baseline, rollout.mask, reduce_sum=reduce_sum), returns)

    return estimate


def from_groups(config: RLOO | GRPO) -> EstimateAdvantages:
    """One advantage for a whole response, from the other responses to its prompt. KL is part of the score (RLOO)."""

    def estimate(rollout: Rollout) -> TrainBatch:
        totals = rollout.rewards.masked_fill(~rollout.mask, 0.0).sum(dim=1)
        match config:
            case RLOO():
                advantages = rloo_advantages(totals, rollout.group_size)
            case GRPO():
                advantages = grpo_advantages(totals, rollout.group_size, normalize_std=config.normalize_std, eps=1e-4)
        spread = advantages[:, None].expand_as(rollout.rewards).masked_fill(~rollout.mask, 0.0)
        return _batch(rollout, spread, torch.zeros_like(spread))

    return estimate


def _batch(rollout: Rollout, advantages: Tensor, returns: Tensor) -> TrainBatch:
    return TrainBatch(
        inputs=rollout.inputs, mask=rollout.mask, logprobs=rollout.logprobs, values=rollout.values[:, :-1],
        advantages=advantages, returns=returns, ref_logprobs=rollout.ref_logprobs,
    )  # fmt: skip
