import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil, steps


@given(seed=seeds, shape=shapes)
def test_covariances_equal_a_loop_and_their_mean_is_the_covariance(seed: int, shape: tuple[int, int]) -> None:
    logprobs, advantages, mask = numbers(seed, *shape), numbers(seed + 1, *shape), random_mask(seed, *shape)
    own = steps(mask)
    means = [sum(float(x[at]) for at in own) / len(own) for x in (logprobs, advantages)]
    found = F.token_covariances(spoil(logprobs, mask), spoil(advantages, mask), mask)
    expected = torch.zeros_like(logprobs)
    for at in own:
        expected[at] = (float(logprobs[at]) - means[0]) * (float(advantages[at]) - means[1])
    assert_close(found, expected)
    covariance = (logprobs[mask] * advantages[mask]).mean() - means[0] * means[1]
    assert_close(found[mask].mean(), covariance, atol=1e-9, rtol=1e-7)


def test_two_processes_measure_covariances_around_their_joint_means() -> None:
    """One holds 0 and 2, the other 4 (log-probabilities and advantages alike): mean 2, parts 4, 0 and 4."""
    here, mask = torch.tensor([[0.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)
    there = torch.tensor([4.0, 4.0, 1.0])
    assert F.token_covariances(here, here, mask, reduce_sum=lambda sums: sums + there).tolist() == [[4.0, 0.0]]


def test_the_threshold_keeps_the_asked_share_of_the_largest() -> None:
    """Of five values a fifth is one, two fifths and a bit are three."""
    values = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.7])
    assert [F.top_share_threshold(values, share) for share in (0.2, 0.41, 1.0)] == pytest.approx([0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0\.0"):
        F.top_share_threshold(values, 0.0)
