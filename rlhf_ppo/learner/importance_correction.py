"""Corrections for tokens that were sampled by another distribution than the policy's, and metrics of the mismatch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rlhf_ppo.algorithms import AlgorithmConfig, Reinforce
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.functional import ImportanceLevel, importance_ratio, importance_weights
from rlhf_ppo.rollout.experience import Responses

logger = logging.getLogger(__name__)

ImportanceMode: TypeAlias = Literal["auto", "off", "truncate", "mask", "bypass"]
USUAL_CAP, USUAL_BAND = 2.0, (0.5, 5.0)
"""Cap of truncated weights (as in TRL and verl); bounds of IcePop's mask (Ling Team 2025)."""


@dataclass(frozen=True, kw_only=True)
class ImportanceCorrection:
    """How π_old / μ, the policy's over the sampler's probability of the sampled tokens, enters the update."""

    mode: Literal["truncate", "mask", "bypass"]
    level: ImportanceLevel
    low: float
    high: float
    is_automatic: bool = False
    """Whether nobody asked for it: it is then left out where the sampler returns no log-probabilities."""


def resolve_correction(
    mode: ImportanceMode,
    level: ImportanceLevel,
    floor: float | None,
    cap: float | None,
    differing_sampler: str | None = None,
) -> ImportanceCorrection | None:
    """The correction that `PPOConfig.importance_sampling*` describes; None: none.

    Args:
        mode: "auto" truncates where `cap` is set, or where the sampler is known to differ.
        floor: Smallest kept weight of "mask" and "bypass"; None: the usual one, none for "bypass".
        cap: Largest weight; None: the usual one, none for "bypass".
        differing_sampler: Why the sampler's distribution is known to differ; None: it is not.

    Raises:
        ValueError: The bounds do not contain 1, or would be ignored.
    """
    if not ((floor is None or 0 <= floor <= 1) and (cap is None or cap >= 1)):
        raise ValueError(
            f"importance_sampling_cap must be at least 1 (or None) and importance_sampling_floor at most 1, got {cap} "
            f"and {floor}: where sampler and trainer agree the ratio is 1, and such tokens would be shrunk or dropped. "
            "Usual: a cap of 2; a floor of 0.5 and a cap of 5 to mask."
        )
    unused = {"floor": floor is not None and mode not in ("mask", "bypass"), "cap": cap is not None and mode == "off"}
    for name, is_unused in unused.items():
        if is_unused:
            raise ValueError(
                f"importance_sampling_{name} would be ignored with importance_sampling={mode!r}: leave it at None, or "
                "choose 'mask'."
            )
    if mode == "off" or (mode == "auto" and cap is None and differing_sampler is None):
        return None
    if mode in ("auto", "truncate"):
        is_automatic = mode == "auto" and cap is None
        return ImportanceCorrection(
            mode="truncate", level=level, low=0.0, high=cap or USUAL_CAP, is_automatic=is_automatic
        )
    defaults = USUAL_BAND if mode == "mask" else (0.0, float("inf"))
    low, high = defaults[0] if floor is None else floor, defaults[1] if cap is None else cap
    return ImportanceCorrection(mode="mask" if mode == "mask" else "bypass", level=level, low=low, high=high)


def check_ratio(mode: ImportanceMode, algorithm: AlgorithmConfig) -> None:
    """Raise a ValueError if "bypass" puts μ into a ratio that the algorithm does not have."""
    if mode == "bypass" and isinstance(algorithm, Reinforce):
        raise ValueError(
            "importance_sampling='bypass' replaces π_old by the sampler's distribution in the probability ratio, which "
            "Reinforce does not have: nothing would be corrected. Use 'truncate' or 'mask'."
        )


def check_sampler_logprobs(responses: Responses, correction: ImportanceCorrection | None) -> None:
    """Raise a ValueError if a correction is set and a batch lacks sampler log-probabilities."""
    if correction is not None and not correction.is_automatic and responses.sampler_logprobs is None:
        raise ValueError(
            "importance_sampling_cap needs the sampler's log-probability of every token, this batch has none: `step()` "
            "takes them with episodes alone, and `TransformersGenerate` does not return them. Set "
            "importance_sampling='off' and importance_sampling_cap=None, or sample in `train()` with a sampler that "
            "does (DecodeLoop, ContinuousBatching, VLLMSampler)."
        )


def correct_for_sampler(
    batch: TrainBatch, responses: Responses, correction: ImportanceCorrection | None
) -> tuple[TrainBatch, Tensor | None]:
    """Weigh the policy term of every token; returns the batch and the weights, [B, T], or None without a correction.

    Weights are not negative, so a weight on the advantage is a weight on the whole policy term of a token, the clipped
    surrogate included: min(ρ wÂ, clip(ρ) wÂ) = w min(ρ Â, clip(ρ) Â). Value targets do not change. With "bypass", μ
    is the old policy of the ratio, which then contains the correction, and tokens are only kept or dropped.
    """
    if correction is None or responses.sampler_logprobs is None:
        return batch, None
    sampler = responses.sampler_logprobs
    weights = importance_weights(
        batch.logprobs, sampler, batch.mask, level=correction.level, low=correction.low, high=correction.high,
        mode="keep" if correction.mode == "bypass" else correction.mode,
    )  # fmt: skip
    batch = replace(batch, advantages=batch.advantages * weights)
    if correction.mode == "bypass":
        batch = replace(batch, logprobs=torch.where(batch.mask, sampler.to(batch.logprobs), batch.logprobs))
    return batch, weights


def local_mismatch(
    logprobs: Tensor, responses: Responses, weights: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """π_old / μ and weights at the actions of this process, on the CPU; None without sampler log-probabilities.

    Args:
        logprobs: log π_old, nats, [B, T].
        responses: Have the mask and the sampler's log-probabilities.
    """
    if responses.sampler_logprobs is None:
        return None
    mask = responses.mask
    ratios = importance_ratio(logprobs, responses.sampler_logprobs, mask)[mask].cpu()
    return ratios, None if weights is None else weights[mask].cpu()


def mismatch_metrics(
    parts: Sequence[tuple[Tensor, Tensor | None] | None], correction: ImportanceCorrection | None
) -> dict[str, float]:
    """Metrics of the mismatch between sampler and policy from the parts of all processes; empty if there are none."""
    known = [part for part in parts if part is not None]
    if not known:
        return {}
    ratios = torch.cat([part[0] for part in known])
    log_ratios = ratios.log()
    metrics = {
        "sampler/ratio_mean": float(ratios.mean()),
        "sampler/ratio_max": float(ratios.max()),
        "sampler/logprob_difference": float(log_ratios.abs().mean()),
        "sampler/kl": float((ratios - 1 - log_ratios).mean()),
    }
    weights = torch.cat([part[1] for part in known if part[1] is not None] or [torch.zeros(0)])
    if correction is None or not len(weights):
        return metrics
    is_changed = weights == 0 if correction.mode != "truncate" else weights >= correction.high
    effective = weights.sum().square() / weights.square().sum().clamp(min=1e-30) / len(weights)
    return metrics | {
        "sampler/weight_mean": float(weights.mean()),
        "sampler/effective_share": float(effective),
        "sampler/truncated_share": float(is_changed.float().mean()),
    }


def log_chosen_correction(correction: ImportanceCorrection | None, reason: str | None) -> None:
    """Log in one line that a correction was chosen automatically, and why; the metrics `sampler/*` show its size."""
    if correction is not None and correction.is_automatic:
        logger.info(
            "%s: each token is weighted by min(π_old / μ, %g), its probability in training over that in sampling. "
            "PPOConfig(importance_sampling='off') turns that off.", reason, correction.high,
        )  # fmt: skip
