"""What becomes of a batch when a reward source fails: asked again, then an error, or samples dropped and counted."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rlhf_ppo.rewards.calls import RewardRequest, RewardSourceError, WeightedSource, call_sources
from rlhf_ppo.utils.field_types import check_fields

ScoreRow: TypeAlias = float | list[float] | None
CheckSample: TypeAlias = Callable[[str, int, object, RewardRequest], ScoreRow]
CheckAnswer: TypeAlias = Callable[[str, object, RewardRequest], list[ScoreRow]]


@dataclass(frozen=True, kw_only=True)
class RewardFailures:
    """What happens when a source raises, gives no answer in time, too few scores, or one that is no finite number."""

    attempts: int = 1
    """How often a source is asked about a batch before it has failed."""
    timeout: float | None = None
    """Seconds that one answer may take; None: any time. A function that never returns is left behind in a thread."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubled before each later one."""
    on_failure: Literal["raise", "drop"] = "raise"
    """After the last attempt: end the run with an error, or leave the samples out of the update and count them."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.attempts < 1:
            raise ValueError(
                f"RewardFailures.attempts must be >= 1, got {self.attempts}: nobody would be asked. Use 1."
            )
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(
                f"RewardFailures.timeout must be > 0 seconds, got {self.timeout}: every answer would be late. "
                "Use None for no bound."
            )
        if not self.backoff >= 0:
            raise ValueError(f"RewardFailures.backoff must be >= 0 seconds, got {self.backoff}. Use 0 for no pause.")


RAISE_ON_FAILURE = RewardFailures()
"""Nothing is tried twice, and any failure ends the run."""


@dataclass(kw_only=True)
class SourceAnswers:
    """What the sources said in the end."""

    rows: dict[str, list[ScoreRow]] = field(default_factory=dict)
    """Source -> one entry a sample; None where it skipped the sample or failed on it."""
    failed_on: dict[str, list[int]] = field(default_factory=dict)
    """Source -> the samples that its failure costs."""
    failed_calls: int = 0
    """Attempts that failed, of all sources."""


def collect_answers(
    named: Sequence[WeightedSource],
    request: RewardRequest,
    failures: RewardFailures,
    *,
    check: CheckAnswer,
    check_sample: CheckSample,
) -> SourceAnswers:
    """Ask until every source has given a usable answer, or has failed for good.

    Args:
        named: The sources.
        request: What they are asked about.
        failures: How often, how long, and what then.
        check: The answer as rows, or an error.
        check_sample: One entry of it, or an error.

    Raises:
        RewardSourceError, TypeError, ValueError: a source failed for good and `on_failure` is "raise".
    """
    found, left = SourceAnswers(), list(named)
    patient = failures.attempts > 1 or failures.on_failure == "drop"
    errors: dict[str, Exception] = {}
    raw: dict[str, object] = {}
    for attempt in range(failures.attempts):
        if attempt:
            time.sleep(failures.backoff * 2 ** (attempt - 1))
        answers = call_sources(left, request, timeout=failures.timeout, keep_going=patient)
        raw = {item.name: answer for item, answer in zip(left, answers, strict=True)}
        errors = _take(raw, request, check, found)
        found.failed_calls += len(errors)
        left = [item for item in left if item.name in errors]
        if not left:
            break
    for name, error in errors.items():
        if failures.on_failure == "raise":
            raise error
        rows = _usable(name, raw[name], request, check_sample)
        found.failed_on[name] = [index for index, (_, failed) in enumerate(rows) if failed]
        found.rows[name] = [row for row, _ in rows]
    return found


def _take(
    raw: Mapping[str, object], request: RewardRequest, check: CheckAnswer, found: SourceAnswers
) -> dict[str, Exception]:
    """Put good answers into `found`; the errors of the others."""
    errors: dict[str, Exception] = {}
    for name, answer in raw.items():
        try:
            if isinstance(answer, RewardSourceError):
                raise answer
            found.rows[name] = check(name, answer, request)
        except (RewardSourceError, TypeError, ValueError) as error:
            errors[name] = error
    return errors


def _usable(
    name: str, answer: object, request: RewardRequest, check_sample: CheckSample
) -> list[tuple[ScoreRow, bool]]:
    """Each entry with whether it is lost. An answer of the wrong length is lost whole: nobody knows whose is whose."""
    count = len(request.prompts)
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)) or len(answer) != count:
        return [(None, True)] * count
    rows: list[tuple[ScoreRow, bool]] = []
    for index, entry in enumerate(answer):
        try:
            rows.append((check_sample(name, index, entry, request), False))
        except (TypeError, ValueError):
            rows.append((None, True))
    return rows
