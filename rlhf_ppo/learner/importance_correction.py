"""Truncated importance weights for tokens sampled by another engine, and metrics of the sampler-learner mismatch."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.functional import importance_ratio, truncated_importance_weights
from rlhf_ppo.rollout.experience import Responses


def check_sampler_logprobs(responses: Responses, cap: float | None) -> None:
    """Check that a batch has sampler log-probabilities if it is to be importance-weighted.

    Raises:
        ValueError: `cap` is set, but the log-probabilities are missing.
    """
    if cap is not None and responses.sampler_logprobs is None:
        raise ValueError(
            "importance_sampling_cap needs the sampler's log-probability of every token, this batch has none: `step()` "
            "does not take them, and `TransformersGenerate` does not return them. Set importance_sampling_cap=None, or "
            "sample in `train()` with a sampler that does (DecodeLoop, ContinuousBatching, VLLMSampler)."
        )


def apply_importance_weights(batch: TrainBatch, responses: Responses, cap: float | None) -> TrainBatch:
    """Multiply advantages by the importance weights min(π_old / μ, cap); without a cap, return the batch unchanged.

    Weights are not negative, so a weight on the advantage is a weight on the whole policy term of a token, the clipped
    surrogate included: min(ρ wÂ, clip(ρ) wÂ) = w min(ρ Â, clip(ρ) Â). Value targets do not change.
    """
    if cap is None or responses.sampler_logprobs is None:
        return batch
    weights = truncated_importance_weights(batch.logprobs, responses.sampler_logprobs, batch.mask, cap=cap)
    return replace(batch, advantages=batch.advantages * weights)


def local_importance_ratios(batch: TrainBatch, responses: Responses) -> Float[Tensor, " actions"] | None:
    """π_old / μ at the actions of this process, on the CPU; None without sampler log-probabilities."""
    if responses.sampler_logprobs is None:
        return None
    return importance_ratio(batch.logprobs, responses.sampler_logprobs, batch.mask)[batch.mask].cpu()


def mismatch_metrics(all_ratios: Sequence[Tensor | None], cap: float | None) -> dict[str, float]:
    """Metrics of the sampler-learner mismatch from the ratios of all processes; empty if there are none."""
    known = [ratios for ratios in all_ratios if ratios is not None]
    if not known:
        return {}
    ratios = torch.cat(known)
    metrics = {
        "sampler/ratio_mean": float(ratios.mean()),
        "sampler/ratio_max": float(ratios.max()),
        "sampler/logprob_difference": float(ratios.log().abs().mean()),
    }
    return metrics if cap is None else metrics | {"sampler/truncated_share": float((ratios > cap).float().mean())}
