"""Reward sources: callables that score responses, given prompts and responses as text.

A source is called with keywords only, `prompts=`, `responses=` and the dataset's other columns, and returns one
entry per sample: a number, a list with one number per response token, or None to leave the sample out of the update.
`async` sources run concurrently with each other and with ordinary ones. The trainer decodes the texts from the sampled
tokens; they are never tokenized again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.batch import join_columns, select_columns
from rlhf_ppo.rewards.calls import (
    Reward,
    RewardRequest,
    RewardSource,
    RewardSourceError,
    WeightedSource,
)
from rlhf_ppo.rewards.failures import RAISE_ON_FAILURE, AllSourceResults, RewardFailures, ScoreRow, call_with_retries

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

_SCORE_COLUMNS = ("total", "per_token", "per_source", "skipped", "dropped")


@dataclass(frozen=True, kw_only=True)
class RewardScores:
    """Scores of a batch, summed over sources. Skipped samples have 0; `total` and `per_token` are never nan."""

    total: Float[Tensor, " batch"]
    """Weighted sum over sources, and over tokens where a source gives one number per token."""
    per_token: Float[Tensor, "batch time"] | None
    """The same sum by response token, per-sample scores at the last token; its sum over time is `total`. None if every
    source returned one number per sample."""
    per_source: dict[str, Float[Tensor, " batch"]]
    """Unweighted score of each source, summed over tokens; nan where it returned None."""
    skipped: Bool[Tensor, " batch"]
    """True where at least one source returned None or failed: the sample is left out of the update."""
    dropped: Bool[Tensor, " batch"]
    """True where a source failed: it raised, timed out, or returned an invalid score. A subset of `skipped`."""
    failed_calls: int = 0
    """Number of failed calls of sources, also those that a later attempt made up for."""

    @property
    def scores(self) -> Float[Tensor, " batch"] | Float[Tensor, "batch time"]:
        """`per_token` if there is one, else `total`: the input of reward shaping."""
        return self.total if self.per_token is None else self.per_token

    def joined(self, others: "Sequence[RewardScores]") -> "RewardScores":
        """Concatenate with the scores of `others`, from the same sources; `per_token` is None where one of them is."""
        batches = [self, *others]
        failed_calls = sum(batch.failed_calls for batch in batches)
        return RewardScores(**join_columns(batches, _SCORE_COLUMNS), failed_calls=failed_calls)

    def select(self, rows: Sequence[int]) -> "RewardScores":
        """The scores of some samples, with the failed calls of all."""
        return replace(self, **select_columns(self, _SCORE_COLUMNS, rows))

    def metrics(self) -> dict[str, float]:
        """Mean and standard deviation of each source over the samples it scored; fractions skipped and dropped."""
        metrics = {
            "env/reward_skipped": self.skipped.double().mean().item(),
            "env/reward_dropped": self.dropped.double().mean().item(),
            "env/reward_failed_calls": float(self.failed_calls),
        }
        for name, values in self.per_source.items():
            scored = values[~values.isnan()].double()
            if scored.numel():
                metrics[f"env/reward/{name}_mean"] = scored.mean().item()
                metrics[f"env/reward/{name}_std"] = scored.std(unbiased=False).item()
        return metrics


RewardSources: TypeAlias = (
    RewardSource | Mapping[str, RewardSource | tuple[RewardSource, float]] | Sequence[WeightedSource]
)


def named_sources(sources: RewardSources) -> tuple[WeightedSource, ...]:
    """Convert a callable, `{name: callable}` or `{name: (callable, weight)}` to `WeightedSource`s.

    Raises:
        TypeError: A source is not callable, or a list holds something else than `WeightedSource`s.
        ValueError: There is no source, a weight is not finite, or two sources have one name.
    """
    if isinstance(sources, Mapping):
        pairs = {name: item if isinstance(item, tuple) else (item, 1.0) for name, item in sources.items()}
        weighted_sources = tuple(
            WeightedSource(name=name, source=pair[0], weight=pair[1]) for name, pair in pairs.items()
        )
    elif isinstance(sources, Sequence):
        weighted_sources = tuple(sources)
        if other := next((item for item in sources if not isinstance(item, WeightedSource)), None):
            raise TypeError(
                f"A list of reward sources holds `WeightedSource`s, got {type(other).__name__}: it has no name or "
                "weight. Pass {name: callable} or {name: (callable, weight)}."
            )
    else:
        weighted_sources = (WeightedSource(name=getattr(sources, "__name__", type(sources).__name__), source=sources),)
    if not weighted_sources:
        raise ValueError("No reward source was given: PPO needs at least one. Pass a callable or {name: callable}.")
    names = [item.name for item in weighted_sources]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Each reward source needs a name of its own, got {repeated} more than once among {names}: the scores of "
            "one would replace those of the other. Rename them."
        )
    return weighted_sources


def zero_scores(count: int, sources: RewardSources | None) -> RewardScores:
    """Scores of 0 for `count` samples, without a call of the sources."""
    names = [] if sources is None else [item.name for item in named_sources(sources)]
    return RewardScores(
        total=torch.zeros(count), per_token=None, per_source={name: torch.zeros(count) for name in names},
        skipped=torch.zeros(count, dtype=torch.bool), dropped=torch.zeros(count, dtype=torch.bool),
    )  # fmt: skip


def score_batch(
    sources: RewardSources, request: RewardRequest, failures: RewardFailures = RAISE_ON_FAILURE
) -> RewardScores:
    """Call every source, check its scores, and sum them: total_i = Σ_s weight_s · score_{s,i}.

    If any source returns None for a sample, the whole sample is skipped: a partial sum would be a different reward. A
    source that does not apply to a sample returns 0.0. A failure never becomes a score.

    Args:
        sources: The reward sources.
        request: The samples to score.
        failures: Retries, and what to do with the samples of a source that fails.

    Raises:
        RewardSourceError: A source raised or timed out; the others are cancelled.
        TypeError, ValueError: A result of the wrong length, type or value; the message names source and sample.
    """
    weighted_sources = named_sources(sources)
    results = call_with_retries(weighted_sources, request, failures)
    rows = results.rows
    per_source = {
        item.name: torch.tensor([math.nan if row is None else math.fsum(_as_list(row)) for row in rows[item.name]])
        for item in weighted_sources
    }
    size = len(request.prompts)
    skipped = torch.zeros(size, dtype=torch.bool)
    total = torch.zeros(size, dtype=torch.float64)
    for item in weighted_sources:
        skipped |= per_source[item.name].isnan()
        total += item.weight * per_source[item.name].double()
    per_token = None
    if any(isinstance(row, list) for source_rows in rows.values() for row in source_rows):
        per_token = _sum_per_token(weighted_sources, rows, request, skipped)
    total = total.masked_fill(skipped, 0.0).float()
    return RewardScores(
        total=_check_finite(total), per_token=per_token, per_source=per_source, skipped=skipped,
        dropped=_dropped_samples(results, size), failed_calls=results.failed_calls,
    )  # fmt: skip


def _dropped_samples(results: AllSourceResults, size: int) -> Bool[Tensor, " batch"]:
    dropped = torch.zeros(size, dtype=torch.bool)
    for samples in results.failed_on.values():
        dropped[samples] = True
    return dropped


def _check_finite(total: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    if not torch.isfinite(total).all():
        index = int((~torch.isfinite(total)).nonzero()[0])
        raise ValueError(
            f"The weighted sum of all reward sources must be finite, got {float(total[index])} for sample {index}: it "
            "would destroy the weights in one step. Scale the sources or their weights down."
        )
    return total


def _sum_per_token(
    weighted_sources: Sequence[WeightedSource],
    rows: Mapping[str, Sequence[ScoreRow]],
    request: RewardRequest,
    skipped: Bool[Tensor, " batch"],
) -> Float[Tensor, "batch time"]:
    """Weighted sum of scores by token, per-sample scores at the last token of the response."""
    lengths = request.response_lengths or []
    per_token = torch.zeros(len(lengths), max(lengths, default=0), dtype=torch.float64)
    for item in weighted_sources:
        for sample, row in enumerate(rows[item.name]):
            if row is None or skipped[sample] or not lengths[sample]:
                continue
            values = torch.tensor(_as_list(row), dtype=torch.float64)
            per_token[sample, lengths[sample] - len(values) : lengths[sample]] += item.weight * values
    return per_token.float()


def _as_list(row: float | list[float]) -> list[float]:
    return row if isinstance(row, list) else [row]
