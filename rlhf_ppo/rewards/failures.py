"""Check what reward sources return and retry failed ones; after the last attempt, raise or drop the samples."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from rlhf_ppo.rewards.calls import RewardRequest, RewardSourceError, WeightedSource, call_sources
from rlhf_ppo.rewards.token_scores import token_scores
from rlhf_ppo.utils.field_types import check_fields

ScoreRow: TypeAlias = float | list[float] | None
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class RewardFailures:
    """What to do when a source raises, times out, or returns too few or non-finite scores."""

    attempts: int = 1
    """Maximum number of calls of a source per batch."""
    timeout: float | None = None
    """Seconds per call; None: no limit. A function that never returns is abandoned in its thread."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubles before each later one."""
    on_failure: Literal["raise", "drop"] = "raise"
    """After the last attempt: "raise" ends the run with an error, "drop" leaves the samples out and counts them."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.attempts < 1:
            raise ValueError(
                f"RewardFailures.attempts must be >= 1, got {self.attempts}: no source would be called. Use 1."
            )
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(
                f"RewardFailures.timeout must be > 0 seconds, got {self.timeout}: every call would time out. "
                "Use None for no limit."
            )
        if not self.backoff >= 0:
            raise ValueError(f"RewardFailures.backoff must be >= 0 seconds, got {self.backoff}. Use 0 for no pause.")


RAISE_ON_FAILURE = RewardFailures()
"""One attempt; any failure ends the run."""


@dataclass(kw_only=True)
class AllSourceResults:
    """Checked scores of all sources after the last attempt, and their failures."""

    rows: dict[str, list[ScoreRow]] = field(default_factory=dict)
    """Source -> one entry per sample; None where the source skipped the sample or failed on it."""
    failed_on: dict[str, list[int]] = field(default_factory=dict)
    """Source -> indices of the samples dropped because it failed."""
    failed_calls: int = 0
    """Number of failed calls, over all sources."""


def call_with_retries(
    sources: Sequence[WeightedSource], request: RewardRequest, failures: RewardFailures
) -> AllSourceResults:
    """Call sources, and failed ones again, until each has returned valid scores or has no attempts left.

    Raises:
        RewardSourceError, TypeError, ValueError: A source failed at its last attempt and `on_failure` is "raise".
    """
    results, pending = AllSourceResults(), list(sources)
    keep_going = failures.attempts > 1 or failures.on_failure == "drop"
    errors: dict[str, Exception] = {}
    raw_results: dict[str, object] = {}
    for attempt in range(failures.attempts):
        if attempt:
            time.sleep(failures.backoff * 2 ** (attempt - 1))
        returned = call_sources(pending, request, timeout=failures.timeout, keep_going=keep_going)
        raw_results = {item.name: result for item, result in zip(pending, returned, strict=True)}
        errors = _add_valid(raw_results, request, results)
        results.failed_calls += len(errors)
        pending = [item for item in pending if item.name in errors]
        if not pending:
            break
    for name, error in errors.items():
        if failures.on_failure == "raise":
            raise error
        rows = _salvage(name, raw_results[name], request)
        results.failed_on[name] = [index for index, (_, failed) in enumerate(rows) if failed]
        results.rows[name] = [row for row, _ in rows]
    return results


def _add_valid(
    raw_results: Mapping[str, object], request: RewardRequest, results: AllSourceResults
) -> dict[str, Exception]:
    """Add valid results to `results`; return source -> error for the others."""
    errors: dict[str, Exception] = {}
    for name, result in raw_results.items():
        try:
            if isinstance(result, RewardSourceError):
                raise result
            results.rows[name] = _check_result(name, result, request)
        except (RewardSourceError, TypeError, ValueError) as error:
            errors[name] = error
    return errors


def _salvage(name: str, result: object, request: RewardRequest) -> list[tuple[ScoreRow, bool]]:
    """Valid entries of a failed result, as (entry, is dropped); drops all if the length is wrong."""
    count = len(request.prompts)
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, Sequence) or isinstance(result, (str, bytes)) or len(result) != count:
        return [(None, True)] * count
    rows: list[tuple[ScoreRow, bool]] = []
    for index, entry in enumerate(result):
        try:
            rows.append((_check_sample(name, index, entry, request), False))
        except (TypeError, ValueError):
            rows.append((None, True))
    return rows


def _check_result(name: str, result: object, request: RewardRequest) -> list[ScoreRow]:
    """Convert a source's result to Python numbers; raise an error that names the source and the sample."""
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, Sequence) or isinstance(result, (str, bytes)):
        raise TypeError(
            f"Reward source {name!r} must return a list with one entry per sample ({len(request.prompts)}), "
            f"got {type(result).__name__}."
        )
    if len(result) != len(request.prompts):
        raise ValueError(
            f"Reward source {name!r} returned {len(result)} scores for {len(request.prompts)} samples. "
            "Return one entry per sample, and None for those to be skipped."
        )
    return [_check_sample(name, index, entry, request) for index, entry in enumerate(result)]


def _check_sample(name: str, index: int, entry: object, request: RewardRequest) -> ScoreRow:
    entry = entry.tolist() if hasattr(entry, "tolist") else entry
    if entry is None:
        return None
    length = None if request.response_lengths is None else request.response_lengths[index]
    if isinstance(entry, Mapping) and length is not None:
        try:
            entry = token_scores(entry, length).tolist()
        except (ValueError, TypeError) as error:
            raise ValueError(f"Reward source {name!r}, sample {index}: {error}") from error
    if isinstance(entry, (list, tuple)):
        if len(entry) != length:
            raise ValueError(
                f"Reward source {name!r} returned {len(entry)} per-token scores for sample {index}, whose response "
                f"has {'an unknown number of' if length is None else length} tokens. Return one number per token, or "
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
    if not abs(value) <= _FLOAT32_MAX:  # False for nan, too.
        raise ValueError(
            f"Reward source {name!r} returned {value} for sample {index} (response {request.responses[index][:60]!r}): "
            "it would destroy the weights in one step. Return a finite number, or None to skip the sample."
        )
    return float(value)
