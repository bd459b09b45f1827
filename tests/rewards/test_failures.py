"""A reward source that raises, is late, answers too little or says nan: asked again, then an error or counted drops."""

import asyncio
import math
import threading
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from rlhf_ppo.rewards.sources import RewardFailures, RewardRequest, RewardScores, RewardSourceError, score_batch
from tests.support.patience import PATIENCE

REQUEST = RewardRequest(prompts=["a", "b", "c"], responses=["x", "y", "z"], response_lengths=[1, 1, 1])
GOOD = [1.0, 2.0, 3.0]
DROP = RewardFailures(on_failure="drop", backoff=0.0)


def saying(*answers: Any) -> Any:
    """A source that gives these answers one after the other; an exception among them is raised."""
    left: Iterator[Any] = iter(answers)

    def source(**_: Any) -> Any:
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return source


FAULTS = {
    "exception": OSError("no route"), "too few": [1.0], "too many": [1.0] * 4, "nan": [1.0, math.nan, 3.0],
    "infinity": [math.inf, 1.0, 1.0], "text": "good", "nothing": None, "words": [1.0, "two", 3.0],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_source_that_fails_once_is_asked_again_and_the_failure_is_counted(fault: Any) -> None:
    scores = score_batch(saying(fault, GOOD), REQUEST, RewardFailures(attempts=2, backoff=0.0))
    assert scores.total.tolist() == GOOD
    assert scores.metrics()["env/reward_failed_calls"] == 1.0
    assert not scores.dropped.any()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_last_failure_is_raised_and_names_the_source(fault: Any) -> None:
    with pytest.raises((RewardSourceError, TypeError, ValueError), match="'judge'"):
        score_batch({"judge": saying(fault, fault)}, REQUEST, RewardFailures(attempts=2, backoff=0.0))


@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        ("exception", [0, 1, 2]),
        ("too few", [0, 1, 2]),
        ("text", [0, 1, 2]),
        ("nan", [1]),
        ("infinity", [0]),
        ("words", [1]),
    ],
)
def test_dropped_samples_are_exactly_those_without_a_usable_score_and_are_counted(fault: str, lost: list[int]) -> None:
    scores = score_batch({"judge": saying(FAULTS[fault]), "other": lambda **_: GOOD}, REQUEST, DROP)
    assert scores.dropped.nonzero().flatten().tolist() == lost
    assert torch.equal(scores.dropped, scores.skipped)
    assert scores.per_source["judge"].isnan().nonzero().flatten().tolist() == lost, "a failure never reads as a score"
    assert scores.metrics()["env/reward_dropped"] == pytest.approx(len(lost) / 3)
    assert scores.metrics()["env/reward_failed_calls"] == 1.0


def test_what_a_source_leaves_out_on_purpose_is_skipped_and_no_failure() -> None:
    scores = score_batch(lambda **_: [1.0, None, 3.0], REQUEST, DROP)
    assert scores.skipped.tolist() == [False, True, False]
    assert not scores.dropped.any()
    assert scores.failed_calls == 0


def test_only_the_source_that_failed_is_asked_again() -> None:
    calls = []

    def steady(**_: Any) -> list[float]:
        calls.append(1)
        return GOOD

    flaky = saying(OSError("x"), OSError("y"), GOOD)
    scores = score_batch({"steady": steady, "flaky": flaky}, REQUEST, RewardFailures(attempts=3, backoff=0.0))
    assert len(calls) == 1
    assert scores.total.tolist() == [2.0, 4.0, 6.0]
    assert scores.failed_calls == 2


def test_a_function_that_does_not_come_back_is_left_behind() -> None:
    never = threading.Event()
    limits = RewardFailures(timeout=0.05, on_failure="drop")
    scores = score_batch({"hangs": lambda **_: never.wait(PATIENCE), "answers": lambda **_: GOOD}, REQUEST, limits)
    assert scores.dropped.all()
    with pytest.raises(RewardSourceError, match=r"'<lambda>' raised TimeoutError .* no answer within 0.05 s"):
        score_batch(lambda **_: never.wait(PATIENCE), REQUEST, RewardFailures(timeout=0.05))
    never.set()


def test_a_coroutine_that_does_not_come_back_is_cancelled() -> None:
    cancelled = threading.Event()

    async def hangs(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return GOOD

    with pytest.raises(RewardSourceError, match=r"no answer within 0\.05 s"):
        score_batch(hangs, REQUEST, RewardFailures(timeout=0.05))
    assert cancelled.wait(timeout=PATIENCE)


def test_an_answer_in_time_is_the_same_with_and_without_a_time_limit() -> None:
    async def remote(**_: Any) -> list[float]:
        await asyncio.sleep(0)
        return GOOD

    for source in (remote, lambda **_: GOOD):
        assert score_batch(source, REQUEST, RewardFailures(timeout=PATIENCE)).total.tolist() == GOOD


def test_a_source_that_wants_a_missing_column_is_an_error_at_once_whatever_the_setting() -> None:
    def wants(responses: list[str], completions: list[str]) -> list[float]:
        return GOOD

    with pytest.raises(TypeError, match="'completions'"):
        score_batch(wants, REQUEST, RewardFailures(attempts=5, backoff=60.0, on_failure="drop"))


def test_a_sum_beyond_float32_is_refused_though_each_part_is_finite() -> None:
    with pytest.raises(ValueError, match="weighted sum of all reward sources must be finite, got inf for sample 0"):
        score_batch({"big": (lambda **_: [3e38, 0.0, 0.0], 10.0)}, REQUEST)


def test_drops_of_several_processes_are_counted_together() -> None:
    parts = [score_batch({"judge": saying(fault)}, REQUEST, DROP) for fault in (GOOD, [1.0, math.nan, 3.0])]
    joined: RewardScores = parts[0].joined(parts[1:])
    assert joined.metrics()["env/reward_dropped"] == pytest.approx(1 / 6)
    assert joined.failed_calls == 1


@pytest.mark.parametrize(
    "wrong", [{"attempts": 0}, {"timeout": 0.0}, {"timeout": math.nan}, {"backoff": -1.0}, {"on_failure": "ignore"}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user runs without type checks
    with pytest.raises(ValueError, match=rf"RewardFailures\.{next(iter(wrong))} must be"):
        RewardFailures(**wrong)
