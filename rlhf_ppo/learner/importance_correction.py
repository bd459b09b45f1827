"""Tokens that another engine drew: weights that make them count as the trainer's own, and how far the two disagree."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.functional import importance_ratio, truncated_importance_weights
from rlhf_ppo.rollout.experience import Responses


def check_sampler_logprobs(responses: Responses, cap: float | None) -> None:
    """Refuse a batch that is to be weighed but does not say how likely its sampler found each token.

    Raises:
        ValueError: See above.
    """
    if cap is not None and responses.sampler_logprobs is None:
        raise ValueError(
            "importance_sampling_cap needs the sampler's log-probability of every token, this batch has none: `step()` "
            "is not told them, and `TransformersGenerate` does not return them. Set importance_sampling_cap=None, or "
            "draw in `train()` with a sampler that does (DecodeLoop, ContinuousBatching, VLLMSampler)."
        )


def apply_importance_weights(batch: TrainBatch, responses: Responses, cap: float | None) -> TrainBatch:
    """The batch whose advantages carry the importance weights min(π_old / μ, cap); unchanged without a cap.

    Weights are not negative, so that weighing the advantage weighs the whole policy term of a token, the clipped
    surrogate included: min(ρ wÂ, clip(ρ) wÂ) = w min(ρ Â, clip(ρ) Â). Value targets are left alone.
    """
    if cap is None or responses.sampler_logprobs is None:
        return batch
    weights = truncated_importance_weights(batch.logprobs, responses.sampler_logprobs, batch.mask, cap=cap)
    return replace(batch, advantages=batch.advantages * weights)


def local_importance_ratios(batch: TrainBatch, responses: Responses) -> Float[Tensor, " actions"] | None:
    """π_old / μ at the actions of this process, in main memory; None where the sampler's side is not known."""
    if responses.sampler_logprobs is None:
        return None
    return importance_ratio(batch.logprobs, responses.sampler_logprobs, batch.mask)[batch.mask].cpu()


def mismatch_metrics(all_ratios: Sequence[Tensor | None], cap: float | None) -> dict[str, float]:
    """What sampler and trainer disagree on, over the ratios of all processes; empty where they are not known."""
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
