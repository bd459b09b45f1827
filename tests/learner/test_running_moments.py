import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.learner.running_moments import RunningMoments

samples = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6)


@given(batches=st.lists(samples, min_size=1, max_size=5))
def test_running_moments_are_those_of_everything_seen(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        mean, std = moments.update(torch.tensor(batch, dtype=torch.float64))
        assert mean.item() == pytest.approx(statistics.mean(batch), abs=1e-6)
        assert std.item() == pytest.approx(statistics.stdev(batch) if len(batch) > 1 else 1.0, abs=1e-6)
    seen = [x for batch in batches for x in batch]
    assert moments.count == len(seen)
    assert moments.mean.item() == pytest.approx(statistics.mean(seen), abs=1e-6)
    assert moments.std.item() == pytest.approx(statistics.stdev(seen) if len(seen) > 1 else 1.0, abs=1e-6)


def test_a_large_mean_does_not_cost_the_digits_of_a_small_spread() -> None:
    """1e8 ± 1: E[x²] - E[x]² in float32 or float64 sums would be noise."""
    moments = RunningMoments()
    for _ in range(10):
        moments.update(torch.tensor([1e8 - 1, 1e8 + 1], dtype=torch.float64))
    assert moments.std.item() == pytest.approx(math.sqrt(20 / 19), rel=1e-9)


def test_each_entry_of_an_observation_has_its_own_moments() -> None:
    moments = RunningMoments((2,))
    moments.update(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    assert_close(moments.mean, torch.tensor([1.0, 20.0], dtype=torch.float64))
    assert_close(moments.std, torch.tensor([math.sqrt(2), math.sqrt(200)], dtype=torch.float64))


def test_two_processes_agree_on_the_moments_of_their_joint_batch() -> None:
    """What `reduce_sum` adds is the other process's share: count, sum, squares around the joint mean."""
    mine, theirs = torch.tensor([1.0, 2.0]), torch.tensor([6.0])
    shares = iter([torch.tensor(1), theirs.double().sum(), (theirs.double() - 3).square().sum()])
    moments = RunningMoments()
    moments.update(mine, lambda part: part + next(shares))
    assert (moments.count, moments.mean.item()) == (3, 3.0)
    assert moments.std.item() == pytest.approx(statistics.stdev([1, 2, 6]))


def test_an_empty_batch_changes_nothing() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    moments.update(torch.zeros(0))
    assert (moments.count, moments.mean.item()) == (2, 2.0)


def test_normalize_scales_shifts_and_clips_without_learning() -> None:
    """Samples 1 and 3: mean 2, std √2."""
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    x = torch.tensor([2.0, 4.0, 100.0])
    assert_close(moments.normalize(x, shift_mean=True, clip=5.0), torch.tensor([0.0, math.sqrt(2), 5.0]))
    assert_close(moments.normalize(x, shift_mean=False), x / math.sqrt(2))
    assert moments.count == 2


def test_before_two_samples_scaling_does_nothing() -> None:
    assert_close(RunningMoments().normalize(torch.tensor([3.0]), shift_mean=True), torch.tensor([3.0]))


def test_moments_continue_from_their_state_exactly() -> None:
    first, second = RunningMoments((2,)), RunningMoments((2,))
    first.update(torch.randn(5, 2))
    second.load_state_dict(first.state_dict())
    more = torch.randn(4, 2)
    first.update(more)
    second.update(more)
    assert second.count == first.count == 9
    assert torch.equal(first.mean, second.mean) and torch.equal(first.std, second.std)


def test_a_saved_state_is_a_copy() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    state = moments.state_dict()
    moments.update(torch.tensor([100.0]))
    assert state["mean"].item() == 2.0


def test_samples_that_would_spoil_the_moments_are_refused_by_index() -> None:
    moments = RunningMoments()
    with pytest.raises(ValueError, match=r"got nan or inf in sample\(s\) \[1, 2\]"):
        moments.update(torch.tensor([1.0, math.nan, math.inf]))
    assert moments.count == 0
    with pytest.raises(ValueError, match=r"shape \(2,\) behind the batch dimension, got \(3,\)"):
        RunningMoments((2,)).update(torch.zeros(3))
    with pytest.raises(ValueError, match=r"expected moments of shape \(2,\), got mean of shape \(\)"):
        RunningMoments((2,)).load_state_dict(moments.state_dict())
