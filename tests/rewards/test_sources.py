"""Reward sources: how they are called, how their answers add up, and what happens when one of them misbehaves."""

import asyncio
import math
import threading
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo.rewards.sources import RewardRequest, RewardSourceError, WeightedSource, named_sources, score_batch
from tests.support.patience import PATIENCE

REQUEST = RewardRequest(
    prompts=["a", "b", "c"],
    responses=["one", "two 2", "three 3 3"],
    columns={"label": [1, 0, 1]},
    response_lengths=[1, 2, 3],
)


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_a_source_without_extra_arguments_gets_prompts_and_responses() -> None:
    scores = score_batch(length, REQUEST)
    assert_close(scores.total, torch.tensor([3.0, 5.0, 9.0]))
    assert scores.per_token is None
    assert scores.scores is scores.total
    assert list(scores.per_source) == ["length"]
    assert not scores.skipped.any()


def test_a_source_gets_the_columns_that_it_names_and_all_of_them_with_double_star() -> None:
    seen: dict[str, Any] = {}

    def named(responses: list[str], *, label: list[int], missing: float = 2.0) -> list[float]:
        return [missing * value for value in label]

    def greedy(**columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * 3

    scores = score_batch({"named": named, "greedy": greedy}, REQUEST)
    assert_close(scores.total, torch.tensor([2.0, 0.0, 2.0]))
    assert seen == {"prompts": REQUEST.prompts, "responses": REQUEST.responses, "label": [1, 0, 1]}


def test_an_argument_that_is_no_column_is_named() -> None:
    def wants(responses: list[str], completions: list[str]) -> list[float]:
        return []

    def of_trl(completions: list[str], **columns: Any) -> list[float]:
        raise AssertionError(completions, columns)

    for source in (wants, of_trl):
        with pytest.raises(TypeError, match=r"' wants 'completions', .* given prompts, responses, label"):
            score_batch(source, REQUEST)


def test_sources_add_up_by_weight() -> None:
    """2·(3, 5, 9) - 0.5·(1, 1, 1)."""
    scores = score_batch({"length": (length, 2.0), "one": (lambda **_: [1, True, np.float32(1)], -0.5)}, REQUEST)
    assert_close(scores.total, torch.tensor([5.5, 9.5, 17.5]))
    assert_close(scores.per_source["length"], torch.tensor([3.0, 5.0, 9.0]))
    assert_close(scores.per_source["one"], torch.ones(3))


@pytest.mark.parametrize("convert", [torch.tensor, np.array, tuple, lambda x: [torch.tensor(v) for v in x]])
def test_tensors_arrays_and_tuples_are_lists_too(convert: Any) -> None:
    scores = score_batch(lambda **_: convert([1.0, 2.0, 3.0]), REQUEST)
    assert_close(scores.total, torch.tensor([1.0, 2.0, 3.0]))


def test_a_sample_without_a_score_is_skipped_as_a_whole_and_no_nan_is_left() -> None:
    scores = score_batch({"length": length, "shy": lambda **_: [1.0, None, 1.0]}, REQUEST)
    assert scores.skipped.tolist() == [False, True, False]
    assert_close(scores.total, torch.tensor([4.0, 0.0, 10.0]))
    assert scores.per_source["shy"].isnan().tolist() == [False, True, False]
    metrics = scores.metrics()
    assert metrics["env/reward_skipped"] == pytest.approx(1 / 3)
    assert metrics["env/reward/shy_mean"] == 1.0
    assert metrics["env/reward/length_mean"] == pytest.approx(17 / 3)
    assert metrics["env/reward/shy_std"] == 0.0


def test_metrics_of_a_source_that_skipped_everything_are_left_out_and_not_nan() -> None:
    metrics = score_batch(lambda **_: [None] * 3, REQUEST).metrics()
    assert metrics == {"env/reward_skipped": 1.0, "env/reward_dropped": 0.0, "env/reward_failed_calls": 0.0}


def test_per_token_scores_lie_at_their_tokens_and_sample_scores_at_the_last() -> None:
    """Lengths 1, 2, 3; the scalar source adds 10 at the last token of each row."""
    dense = [[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]]
    scores = score_batch({"dense": (lambda **_: dense, 2.0), "flat": lambda **_: [10.0] * 3}, REQUEST)
    expected = torch.tensor([[12.0, 0.0, 0.0], [2.0, 14.0, 0.0], [2.0, 4.0, 16.0]])
    assert scores.per_token is not None
    assert_close(scores.per_token, expected)
    assert_close(scores.scores, expected)
    assert_close(scores.total, expected.sum(1))


def test_a_skipped_sample_has_no_per_token_scores_either() -> None:
    scores = score_batch({"d": lambda **_: [[1.0], None, [1.0] * 3], "f": lambda **_: [1.0] * 3}, REQUEST)
    assert scores.per_token is not None
    assert_close(scores.per_token, torch.tensor([[2.0, 0, 0], [0, 0, 0], [1, 1, 2.0]]))


def test_per_token_scores_must_match_the_response() -> None:
    with pytest.raises(ValueError, match=r"'<lambda>' returned 1 per-token scores for sample 1, .* has 2 tokens"):
        score_batch(lambda **_: [[1.0], [1.0], [1.0] * 3], REQUEST)
    unknown = RewardRequest(prompts=["a"], responses=["b"])
    with pytest.raises(ValueError, match="unknown number of tokens"):
        score_batch(lambda **_: [[1.0]], unknown)


def test_async_sources_run_at_the_same_time() -> None:
    """Each waits for the other: one after the other they would never end."""
    met: dict[str, asyncio.Event] = {}

    async def meet(mine: str, other: str) -> list[float]:
        met.setdefault(mine, asyncio.Event()).set()
        await asyncio.wait_for(met.setdefault(other, asyncio.Event()).wait(), timeout=PATIENCE)
        return [1.0] * 3

    async def left(**_: Any) -> list[float]:
        return await meet("left", "right")

    async def right(**_: Any) -> list[float]:
        return await meet("right", "left")

    assert_close(score_batch({"left": left, "right": right}, REQUEST).total, torch.full((3,), 2.0))


def test_async_sources_run_while_ordinary_ones_do() -> None:
    started = threading.Event()

    def ordinary(**_: Any) -> list[float]:
        assert started.wait(timeout=PATIENCE)
        return [1.0] * 3

    async def remote(**_: Any) -> list[float]:
        started.set()
        return [2.0] * 3

    scores = score_batch({"ordinary": ordinary, "remote": remote}, REQUEST)
    assert_close(scores.total, torch.full((3,), 3.0))
    assert list(scores.per_source) == ["ordinary", "remote"]


def test_a_source_keeps_its_event_loop_from_batch_to_batch() -> None:
    """An HTTP client opened in the first call is bound to the loop of that call."""
    loops = []

    async def remote(**_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    for _ in range(2):
        score_batch(remote, REQUEST)
    assert loops[0] is loops[1]


def test_async_sources_work_where_a_loop_is_running_already() -> None:
    """As in a notebook cell."""

    class Judge:
        async def __call__(self, *, prompts: list[str], responses: list[str]) -> list[float]:
            await asyncio.sleep(0)
            return [1.0] * 3

    async def cell() -> torch.Tensor:
        return score_batch(Judge(), REQUEST).total

    assert_close(asyncio.run(cell()), torch.ones(3))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_names_the_source_and_keeps_its_cause(asynchronous: bool) -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("score")

    async def broken_async(**_: Any) -> list[float]:
        raise KeyError("score")

    with pytest.raises(RewardSourceError, match="'judge' raised KeyError on 3 samples") as caught:
        score_batch({"length": length, "judge": broken_async if asynchronous else broken}, REQUEST)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_first_exception_does_not_wait_for_a_slow_source_and_cancels_it() -> None:
    cancelled = threading.Event()

    async def slow(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    async def broken(**_: Any) -> list[float]:
        await asyncio.sleep(0)
        raise TimeoutError("no answer")

    with pytest.raises(RewardSourceError, match=r"'broken' raised TimeoutError .* no answer"):
        score_batch({"slow": slow, "broken": broken}, REQUEST)
    assert cancelled.wait(timeout=PATIENCE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_score_that_is_not_finite_names_source_sample_and_response(value: float) -> None:
    with pytest.raises(ValueError, match=r"'judge' returned .* for sample 1 \(response 'two 2'\)"):
        score_batch({"judge": lambda **_: [0.0, value, 0.0]}, REQUEST)
    with pytest.raises(ValueError, match=r"'judge' returned .* for sample 2"):
        score_batch({"judge": lambda **_: [0.0, 0.0, [0.0, value, 0.0]]}, REQUEST)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned 1 scores for 3 samples"),
        (1.0, "got float"),
        ("abc", "got str"),
        ({"a": 1}, "got dict"),
        (None, "got NoneType"),
        ([1.0, "good", 1.0], "returned str for sample 1"),
        ([[1.0], [None, 1.0], 1.0], "returned NoneType for sample 1"),
    ],
)
def test_an_answer_of_the_wrong_shape_or_type_is_refused(answer: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"'judge' .*{message}"):
        score_batch({"judge": lambda **_: answer}, REQUEST)


def test_sources_must_be_callables_with_finite_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # A user runs without shape checks.
    with pytest.raises(TypeError, match=r"'judge' must be a callable .* got int"):
        named_sources({"judge": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="weight of reward source 'judge' must be finite"):
        named_sources({"judge": (length, math.nan)})
    with pytest.raises(ValueError, match="at least one"):
        named_sources({})


def test_sources_of_one_name_are_refused_because_one_would_replace_the_other() -> None:
    sources = [WeightedSource(name="judge", source=length), WeightedSource(name="judge", source=lambda **_: [0.0] * 3)]
    with pytest.raises(ValueError, match=r"a name of its own, got \['judge'\] more than once"):
        score_batch(sources, REQUEST)


def test_a_list_of_functions_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # A user runs without shape checks.
    with pytest.raises(TypeError, match=r"got function.*Pass \{name: callable\}"):
        named_sources([length])  # type: ignore[list-item]


def test_a_request_whose_parts_differ_in_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 prompts, but 2 items in 'responses'"):
        RewardRequest(prompts=["a"], responses=["b", "c"])
    with pytest.raises(ValueError, match="1 prompts, but 0 items in 'label'"):
        RewardRequest(prompts=["a"], responses=["b"], columns={"label": []})
    with pytest.raises(ValueError, match="name of a keyword"):
        RewardRequest(prompts=["a"], responses=["b"], columns={"prompts": ["x"]})
