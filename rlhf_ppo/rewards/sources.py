"""Reward sources: any callable that reads prompts and responses as text and says how good each response is.

A source is called with keywords only, `prompts=`, `responses=` and the dataset's other columns, and returns one
entry per sample: a number, a list with one number per response token, or None to leave the sample out of the update.
Sources may be `async`; those run at the same time as each other and as the ordinary ones. The texts are decoded
from the sampled tokens by the trainer; nothing here turns text back into tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.rewards.calls import (
    Reward,
    RewardRequest,
    RewardSource,
    RewardSourceError,
    WeightedSource,
)
from rlhf_ppo.rewards.failures import RAISE_ON_FAILURE, RewardFailures, ScoreRow, SourceAnswers, collect_answers
from rlhf_ppo.rewards.token_scores import token_scores

__all__ = [
    "Reward",
    "RewardFailures",
    "RewardRequest",
    "RewardSource",
    "RewardSourceError",
    "RewardScores",
    "RewardSources",
    "WeightedSource",
    "named_sources",
    "score_batch",
]

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class RewardScores:
    """What all sources together said. Skipped samples hold 0; no entry of `total` or `per_token` is ever nan."""

    total: Float[Tensor, " batch"]
    """Weighted sum over sources, and over tokens where a source gives one number per token."""
    per_token: Float[Tensor, "batch time"] | None
    """None if every source gave one number per sample; else the same sum laid out over the response tokens, the
    per-sample numbers at the last token. Its sum over time is `total`."""
    per_source: dict[str, Float[Tensor, " batch"]]
    """Each source's own unweighted score, summed over tokens; nan where it returned None."""
    skipped: Bool[Tensor, " batch"]
    """True where at least one source returned None or failed: the sample takes no part in the update."""
    dropped: Bool[Tensor, " batch"]
    """True where a source failed: it raised, was late, or said what is no score. Every one of them is skipped too."""
    failed_calls: int = 0
    """Attempts of sources that failed, those that a later attempt made good included."""

    @property
    def scores(self) -> Float[Tensor, " batch"] | Float[Tensor, "batch time"]:
        """`per_token` where there is one, else `total`: what reward shaping takes."""
        return self.total if self.per_token is None else self.per_token

    def joined(self, others: "Sequence[RewardScores]") -> "RewardScores":
        """These samples, then those of `others`, from the same sources; without what each token earned."""
        parts = [self, *others]
        return RewardScores(
            total=torch.cat([part.total for part in parts]),
            per_token=None,
            per_source={name: torch.cat([part.per_source[name] for part in parts]) for name in self.per_source},
            skipped=torch.cat([part.skipped for part in parts]),
            dropped=torch.cat([part.dropped for part in parts]),
            failed_calls=sum(part.failed_calls for part in parts),
        )

    def metrics(self) -> dict[str, float]:
        """Mean and standard deviation of each source over the samples that it scored; what was skipped and why."""
        found = {
            "env/reward_skipped": self.skipped.double().mean().item(),
            "env/reward_dropped": self.dropped.double().mean().item(),
            "env/reward_failed_calls": float(self.failed_calls),
        }
        for name, values in self.per_source.items():
            scored = values[~values.isnan()].double()
            if scored.numel():
                found[f"env/reward/{name}_mean"] = scored.mean().item()
                found[f"env/reward/{name}_std"] = scored.std(unbiased=False).item()
        return found


RewardSources: TypeAlias = (
    RewardSource | Mapping[str, RewardSource | tuple[RewardSource, float]] | Sequence[WeightedSource]
)


def named_sources(sources: RewardSources) -> tuple[WeightedSource, ...]:
    """One callable, or `{name: callable}`, or `{name: (callable, weight)}`, as named and weighted sources.

    Raises:
        TypeError: something in there is not callable.
        ValueError: no source at all, or a weight that is not finite.
    """
    if isinstance(sources, Mapping):
        pairs = {name: item if isinstance(item, tuple) else (item, 1.0) for name, item in sources.items()}
        named = tuple(WeightedSource(name=name, source=pair[0], weight=pair[1]) for name, pair in pairs.items())
    elif isinstance(sources, Sequence):
        named = tuple(sources)
    else:
        named = (WeightedSource(name=getattr(sources, "__name__", type(sources).__name__), source=sources),)
    if not named:
        raise ValueError("No reward source was given: PPO needs at least one. Pass a callable or {name: callable}.")
    return named


def score_batch(
    sources: RewardSources, request: RewardRequest, failures: RewardFailures = RAISE_ON_FAILURE
) -> RewardScores:
    """Ask every source, check every answer, and add them up: total_i = Σ_s weight_s · score_{s,i}.

    If any source returns None for a sample, that sample is skipped as a whole: half a sum would be a different
    reward. A source that merely has nothing to say about a sample returns 0.0. No failure ever becomes a score.

    Args:
        sources: Who is asked.
        request: About what.
        failures: How often a source is asked that fails, and what becomes of the samples.

    Raises:
        RewardSourceError: a source raised or was late; the others are cancelled.
        TypeError, ValueError: an answer of the wrong length, type or value; source and sample are named.
    """
    named = named_sources(sources)
    answers = collect_answers(named, request, failures, check=_check, check_sample=_check_sample)
    rows = answers.rows
    per_source = {
        item.name: torch.tensor([math.nan if row is None else math.fsum(_as_list(row)) for row in rows[item.name]])
        for item in named
    }
    size = len(request.prompts)
    skipped = torch.zeros(size, dtype=torch.bool)
    total = torch.zeros(size, dtype=torch.float64)
    for item in named:
        skipped |= per_source[item.name].isnan()
        total += item.weight * per_source[item.name].double()
    per_token = None
    if any(isinstance(row, list) for found in rows.values() for row in found):
        per_token = _lay_out(named, rows, request, skipped)
    total = total.masked_fill(skipped, 0.0).float()
    return RewardScores(
        total=_finite(total), per_token=per_token, per_source=per_source, skipped=skipped,
        dropped=_dropped(answers, size), failed_calls=answers.failed_calls,
    )  # fmt: skip


def _dropped(answers: SourceAnswers, size: int) -> Bool[Tensor, " batch"]:
    lost = torch.zeros(size, dtype=torch.bool)
    for samples in answers.failed_on.values():
        lost[samples] = True
    return lost


def _finite(total: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    if not torch.isfinite(total).all():
        index = int((~torch.isfinite(total)).nonzero()[0])
        raise ValueError(
            f"The weighted sum of all reward sources must be finite, got {float(total[index])} for sample {index}: it "
            "would destroy the weights in one step. Scale the sources or their weights down."
        )
    return total


def _lay_out(
    named: Sequence[WeightedSource],
    rows: Mapping[str, Sequence[ScoreRow]],
    request: RewardRequest,
    skipped: Bool[Tensor, " batch"],
) -> Float[Tensor, "batch time"]:
    """Per-token numbers at their tokens, per-sample numbers at the last token of the response."""
    lengths = request.response_lengths or []
    laid_out = torch.zeros(len(lengths), max(lengths, default=0), dtype=torch.float64)
    for item in named:
        for sample, row in enumerate(rows[item.name]):
            if row is None or skipped[sample] or not lengths[sample]:
                continue
            values = torch.tensor(_as_list(row), dtype=torch.float64)
            laid_out[sample, lengths[sample] - len(values) : lengths[sample]] += item.weight * values
    return laid_out.float()


def _check(name: str, answer: object, request: RewardRequest) -> list[ScoreRow]:
    """The answer as plain Python numbers, or an error that names the source and the sample."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
        raise TypeError(
            f"Reward source {name!r} must return a list with one entry per sample ({len(request.prompts)}), "
            f"got {type(answer).__name__}."
        )
    if len(answer) != len(request.prompts):
        raise ValueError(
            f"Reward source {name!r} returned {len(answer)} scores for {len(request.prompts)} samples. "
            "Return one entry per sample, and None for those to be skipped."
        )
    return [_check_sample(name, index, entry, request) for index, entry in enumerate(answer)]


def _check_sample(name: str, index: int, entry: object, request: RewardRequest) -> ScoreRow:
    entry = entry.tolist() if hasattr(entry, "tolist") else entry
    if entry is None:
        return None
    wanted = None if request.response_lengths is None else request.response_lengths[index]
    if isinstance(entry, Mapping) and wanted is not None:
        try:
            entry = token_scores(entry, wanted).tolist()
        except (ValueError, TypeError) as error:
            raise ValueError(f"Reward source {name!r}, sample {index}: {error}") from error
    if isinstance(entry, (list, tuple)):
        if len(entry) != wanted:
            raise ValueError(
                f"Reward source {name!r} returned {len(entry)} per-token scores for sample {index}, whose response "
                f"has {'an unknown number of' if wanted is None else wanted} tokens. Return one number per token, or "
                "one number for the whole response."
            )
        return [_number(name, index, value, request) for value in entry]
    return _number(name, index, entry, request)


def _number(name: str, index: int, value: object, request: RewardRequest) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(
            f"Reward source {name!r} returned {type(value).__name__} for sample {index}, expected a number, a list of "
            "numbers (one per token), a mapping of positions to numbers, or None."
        )
    if not abs(value) <= _LARGEST:  # False for nan, too.
        raise ValueError(
            f"Reward source {name!r} returned {value} for sample {index} (response {request.responses[index][:60]!r}): "
            "it would destroy the weights in one step. Return a finite number, or None to skip the sample."
        )
    return float(value)


def _as_list(row: float | list[float]) -> list[float]:
    return row if isinstance(row, list) else [row]
