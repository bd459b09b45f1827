"""What is minimised: a policy term, a value term, an entropy term, each divided by the same global count."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from rlhf_ppo.algorithms.config import GRPO, RLOO, Critic, PPOClip
from rlhf_ppo.batch import PolicyOutput, TrainBatch
from rlhf_ppo.functional import (
    entropy_bonus,
    kl_estimate,
    kl_penalty_loss,
    masked_mean,
    ppo_clip_loss,
    reinforce_loss,
    surrogate_loss,
    value_loss,
)
from rlhf_ppo.updates import Objective, Terms

PolicyTerm: TypeAlias = Callable[[Tensor, TrainBatch, Tensor], Tensor]
"""(new log-probs, batch, count) -> the policy's scalar share of the loss."""


def clipped(config: PPOClip | RLOO | GRPO) -> PolicyTerm:
    """The clipped surrogate."""
    dual_clip = config.dual_clip if isinstance(config, PPOClip) else None

    def term(logprobs: Tensor, batch: TrainBatch, count: Tensor) -> Tensor:
        loss, _ = ppo_clip_loss(
            logprobs, batch.logprobs, batch.advantages, batch.mask,
            clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=dual_clip, count=count,
        )  # fmt: skip
        return loss

    return term


def penalised(beta: float) -> PolicyTerm:
    """The surrogate minus β KL(π_old || π_θ)."""

    def term(logprobs: Tensor, batch: TrainBatch, count: Tensor) -> Tensor:
        loss, _ = kl_penalty_loss(logprobs, batch.logprobs, batch.advantages, batch.mask, beta=beta, count=count)
        return loss

    return term


def unbounded(logprobs: Tensor, batch: TrainBatch, count: Tensor) -> Tensor:
    """The bare surrogate, which something else must bound."""
    loss, _ = surrogate_loss(logprobs, batch.logprobs, batch.advantages, batch.mask, count=count)
    return loss


def likelihood(logprobs: Tensor, batch: TrainBatch, count: Tensor) -> Tensor:
    """REINFORCE: -log π(a|s) Â."""
    return reinforce_loss(logprobs, batch.advantages, batch.mask, count=count)


def with_reference(term: PolicyTerm, weight: float) -> PolicyTerm:
    """Add `weight` times the k3 estimate of KL(π_θ || π_ref) to a policy term (GRPO)."""

    def total(logprobs: Tensor, batch: TrainBatch, count: Tensor) -> Tensor:
        if batch.ref_logprobs is None:
            raise ValueError("kl_in_loss needs the reference's log-probabilities, the batch has none: pass `ref_model`")
        kl = kl_estimate(logprobs, batch.ref_logprobs, "k3")
        return term(logprobs, batch, count) + weight * masked_mean(kl, batch.mask, count)

    return total


def objective(
    policy_term: PolicyTerm, *, critic: Critic | None, ent_coef: float, clip_low: float = 0.2, clip_high: float = 0.2
) -> Objective:
    """The total objective: policy + c_1 value - c_2 entropy (Schulman et al. 2017, eq. 9), with its metrics.

    Args:
        policy_term: The algorithm's own part.
        critic: Weight and clipping of the value loss; None for an algorithm without value function.
        ent_coef: c_2.
        clip_low: What `policy/clipfrac` counts as clipped below 1.
        clip_high: The same above 1.
    """

    def terms(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> Terms:
        mask = batch.mask
        policy_loss = policy_term(output.logprobs, batch, count)
        values = output.values[:, :-1]
        value, value_metrics = value_loss(
            values, batch.values, batch.returns, mask,
            clip_range=None if critic is None else critic.clip_range_value, count=count,
        )  # fmt: skip
        entropy = policy_loss.new_zeros(())
        if output.entropy is not None:
            entropy = entropy_bonus(output.entropy, mask, count=count)
        loss = policy_loss
        if critic is not None:
            loss = loss + critic.vf_coef * value
        if ent_coef:
            loss = loss - ent_coef * entropy
        with torch.no_grad():
            _, policy_metrics = ppo_clip_loss(
                output.logprobs, batch.logprobs, batch.advantages, mask,
                clip_low=clip_low, clip_high=clip_high, count=count,
            )  # fmt: skip
            ratio = (output.logprobs - batch.logprobs)[mask].exp()
        metrics = {
            "loss/policy": policy_loss,
            "loss/value": value,
            "loss/total": loss,
            "policy/entropy": entropy,
            "policy/approxkl": policy_metrics["approx_kl"],
            "policy/policykl": policy_metrics["policy_kl"],
            "policy/clipfrac": policy_metrics["clip_fraction"],
            "policy/ratio_mean": policy_metrics["ratio_mean"],
            "val/vpred": value_metrics["mean"],
            "val/error": value_metrics["error"],
            "val/clipfrac": value_metrics["clip_fraction"],
        }
        return Terms(loss=loss, metrics={name: item.detach() for name, item in metrics.items()}, ratio=ratio.detach())

    return terms
