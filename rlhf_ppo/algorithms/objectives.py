"""Objectives to minimize: a policy term, a value term and an entropy term, each divided by the same global count."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rlhf_ppo.algorithms.config import GSPO, Critic, PPOClip
from rlhf_ppo.algorithms.surrogate_config import ClippedSurrogate
from rlhf_ppo.batch import PolicyOutput, TrainBatch
from rlhf_ppo.functional import (
    ReferenceKL,
    cispo_loss,
    divergence_masked_loss,
    entropy_bonus,
    gspo_loss,
    kl_estimate,
    kl_penalty_loss,
    masked_mean,
    ppo_clip_loss,
    reinforce_loss,
    sequence_mean_count,
    surrogate_loss,
    value_loss,
    weighted_nll_loss,
)
from rlhf_ppo.updates import LossTerms, Objective

PolicyTerm: TypeAlias = Callable[[PolicyOutput, TrainBatch, Tensor], Tensor]
"""(new policy output, batch, count) -> scalar policy loss."""


def clipped_surrogate(config: ClippedSurrogate) -> PolicyTerm:
    """The surrogate with ratio clipping, or what replaces it, plus the likelihood of good responses."""
    dual_clip = config.dual_clip if isinstance(config, PPOClip) else None
    divergence, cispo = config.divergence, config.cispo

    def term(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> Tensor:
        arguments = output.logprobs, batch.logprobs, batch.advantages, batch.mask
        if divergence is not None:
            loss, _ = divergence_masked_loss(
                *arguments, kind=divergence.kind, threshold=divergence.threshold, count=count
            )
        elif cispo is not None:
            loss, _ = cispo_loss(
                *arguments, min_weight=cispo.min_weight, max_weight=cispo.max_weight, drop=cispo.drop, count=count
            )
        else:
            loss, _ = ppo_clip_loss(
                *arguments, clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=dual_clip, count=count
            )
        if batch.nll_weights is None:
            return loss
        return loss + weighted_nll_loss(output.logprobs, batch.nll_weights, batch.mask, count=count)

    return term


def sequence_surrogate(config: GSPO) -> PolicyTerm:
    """GSPO: the clipped surrogate with one ratio per response."""

    def term(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> Tensor:
        loss, _ = gspo_loss(
            output.logprobs, batch.logprobs, batch.advantages, batch.mask,
            clip_low=config.clip_low, clip_high=config.clip_high, count=count,
        )  # fmt: skip
        return loss

    return term


def kl_penalized_surrogate(beta: float) -> PolicyTerm:
    """The surrogate minus β KL(π_old || π_θ), exact if the policy output contains `old_kl`."""

    def term(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> Tensor:
        loss, _ = kl_penalty_loss(
            output.logprobs, batch.logprobs, batch.advantages, batch.mask,
            beta=beta, old_kl=output.old_kl, count=count,
        )  # fmt: skip
        return loss

    return term


def surrogate(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> Tensor:
    """The unclipped surrogate; the update must bound the step."""
    loss, _ = surrogate_loss(output.logprobs, batch.logprobs, batch.advantages, batch.mask, count=count)
    return loss


def policy_gradient(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> Tensor:
    """REINFORCE: -log π(a|s) Â."""
    return reinforce_loss(output.logprobs, batch.advantages, batch.mask, count=count)


def with_reference_kl(term: PolicyTerm, kind: ReferenceKL | None) -> PolicyTerm:
    """Add the KL to the reference, weighed by `batch.reference_kl_coef`, to a policy term; None: no KL."""
    if kind is None:
        return term

    def total(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> Tensor:
        kl = output.reference_kl if kind == "full" else _estimate_reference_kl(output, batch, kind)
        if kl is None:
            raise ValueError(
                "expected the KL to the reference in the policy output, got None: the loss needs it. "
                "Pass the reference to `build_algorithm`."
            )
        return term(output, batch, count) + batch.reference_kl_coef * masked_mean(kl, batch.mask, count)

    return total


def mean_over_sequences(terms: Objective) -> Objective:
    """The same objective as a mean over responses of each response's mean; `count` is then the number of responses."""

    def averaged(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> LossTerms:
        return terms(output, batch, sequence_mean_count(batch.mask, count))

    return averaged


def total_objective(
    policy_term: PolicyTerm, *, critic: Critic | None, ent_coef: float, clip_low: float = 0.2, clip_high: float = 0.2
) -> Objective:
    """The total objective: policy + c_1 value - c_2 entropy (Schulman et al. 2017, eq. 9), with its metrics.

    Args:
        critic: Weight and clipping of the value loss; None: no value loss.
        clip_low: ε below 1 for the metric `policy/clipfrac`.
        clip_high: ε above 1 for the same metric.
    """

    def terms(output: PolicyOutput, batch: TrainBatch, count: Tensor) -> LossTerms:
        mask = batch.mask
        policy_loss = policy_term(output, batch, count)
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
            ratio = (output.logprobs - batch.logprobs).exp()
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
        return LossTerms(
            loss=loss, metrics={name: item.detach() for name, item in metrics.items()}, ratio=ratio.detach()
        )

    return terms


def _estimate_reference_kl(output: PolicyOutput, batch: TrainBatch, kind: Literal["k2", "k3"]) -> Tensor | None:
    if batch.ref_logprobs is None:
        return None
    return kl_estimate(output.logprobs, batch.ref_logprobs, kind, mask=batch.mask)
