"""Retry failed reward sources; after the last attempt, raise or drop the affected samples."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rlhf_ppo.rewards.calls import RewardRequest, RewardSourceError, WeightedSource, call_sources
from rlhf_ppo.utils.field_types import check_fields

ScoreRow: TypeAlias = float | list[float] | None
CheckSample: TypeAlias = Callable[[str, int, object, RewardRequest], ScoreRow]
CheckResult: TypeAlias = Callable[[str, object, RewardRequest], list[ScoreRow]]


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
    sources: Sequence[WeightedSource],
    request: RewardRequest,
    failures: RewardFailures,
    *,
    check: CheckResult,
    check_sample: CheckSample,
) -> AllSourceResults:
    """Call sources, and failed ones again, until each has returned valid scores or has no attempts left.

    Args:
        failures: Attempts, timeout, and what to do after the last attempt.
        check: Converts a raw result to rows, or raises.
        check_sample: Converts one entry of a result, or raises.

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
        errors = _add_valid(raw_results, request, check, results)
        results.failed_calls += len(errors)
        pending = [item for item in pending if item.name in errors]
        if not pending:
            break
    for name, error in errors.items():
        if failures.on_failure == "raise":
            raise error
        rows = _salvage(name, raw_results[name], request, check_sample)
        results.failed_on[name] = [index for index, (_, failed) in enumerate(rows) if failed]
        results.rows[name] = [row for row, _ in rows]
    return results


def _add_valid(
    raw_results: Mapping[str, object], request: RewardRequest, check: CheckResult, results: AllSourceResults
) -> dict[str, Exception]:
    """Add valid results to `results`; return source -> error for the others."""
    errors: dict[str, Exception] = {}
    for name, result in raw_results.items():
        try:
            if isinstance(result, RewardSourceError):
                raise result
            results.rows[name] = check(name, result, request)
        except (RewardSourceError, TypeError, ValueError) as error:
            errors[name] = error
    return errors


def _salvage(
    name: str, result: object, request: RewardRequest, check_sample: CheckSample
) -> list[tuple[ScoreRow, bool]]:
    """Valid entries of a failed result, as (entry, is dropped); drops all if the length is wrong."""
    count = len(request.prompts)
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, Sequence) or isinstance(result, (str, bytes)) or len(result) != count:
        return [(None, True)] * count
    rows: list[tuple[ScoreRow, bool]] = []
    for index, entry in enumerate(result):
        try:
            rows.append((check_sample(name, index, entry, request), False))
        except (TypeError, ValueError):
            rows.append((None, True))
    return rows
