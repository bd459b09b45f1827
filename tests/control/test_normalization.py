"""Scaling of observations and rewards: the formula, when it moves, and that it comes back."""

import json

import numpy as np
import pytest

from rlhf_ppo.control import Normalizer


def test_observations_are_scaled_by_the_moments_of_the_rollouts_before() -> None:
    """Mean (3, 0), standard deviation (√(8/2), 1e-8 away from 0 for a constant): the first entry by hand."""
    normalizer = Normalizer(2, environments=1, gamma=0.9)
    raw = np.array([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    assert np.array_equal(normalizer.normalize_observations(raw), raw.astype(np.float32))
    normalizer.update_observation_moments(raw)
    assert normalizer.normalize_observations(raw)[:, 0].tolist() == pytest.approx([-1.0, 0.0, 1.0])
    assert np.array_equal(normalizer.normalize_observations(raw)[:, 1], np.zeros(3))
    assert normalizer.normalize_observations(np.array([1e6, 1e6])).tolist() == [10.0, 10.0]


def test_rewards_are_divided_by_the_spread_of_the_rolling_discounted_return() -> None:
    """γ = ½: returns 1, 1.5 | the episode ends | 1, and an auto-reset step that does not count."""
    normalizer = Normalizer(1, environments=1, gamma=0.5)
    rewards = np.array([[1.0], [1.0], [0.0], [1.0]])
    done = np.array([[False], [True], [False], [False]])
    mask = np.array([[True], [True], [False], [True]])
    scaled = normalizer.normalize_rewards(rewards, done, mask)
    std = np.std([1.0, 1.5, 1.0], ddof=1)
    assert scaled[:, 0].tolist() == pytest.approx([1 / std, 1 / std, 0.0, 1 / std])


def test_a_rolling_return_goes_on_into_the_next_rollout() -> None:
    normalizer = Normalizer(1, environments=1, gamma=0.5)
    one, never, always = np.ones((1, 1)), np.zeros((1, 1), dtype=bool), np.ones((1, 1), dtype=bool)
    for _ in range(3):
        scaled = normalizer.normalize_rewards(one, never, always)
    assert scaled[0, 0] == pytest.approx(1 / np.std([1.0, 1.5, 1.75], ddof=1))


def test_switched_off_it_leaves_everything_alone() -> None:
    normalizer = Normalizer(1, environments=1, gamma=0.5, observations=False, rewards=False)
    normalizer.update_observation_moments(np.array([[5.0], [7.0]]))
    assert normalizer.normalize_observations(np.array([5.0])).tolist() == [5.0]
    rewards = np.array([[100.0]])
    assert normalizer.normalize_rewards(rewards, rewards < 0, rewards > 0) is rewards


def test_saved_moments_scale_as_before() -> None:
    generator = np.random.default_rng(0)
    normalizer, other = (Normalizer(3, environments=2, gamma=0.9) for _ in range(2))
    normalizer.update_observation_moments(generator.normal(3, 2, (50, 3)))
    normalizer.normalize_rewards(generator.normal(size=(10, 2)), np.zeros((10, 2), bool), np.ones((10, 2), bool))
    other.load_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    raw, rewards = generator.normal(size=(4, 3)), generator.normal(size=(10, 2))
    assert np.array_equal(normalizer.normalize_observations(raw), other.normalize_observations(raw))
    flags = np.zeros((10, 2), bool)
    assert np.array_equal(
        normalizer.normalize_rewards(rewards, flags, ~flags), other.normalize_rewards(rewards, flags, ~flags)
    )
    with pytest.raises(ValueError, match="moments of shape"):
        Normalizer(4, environments=2, gamma=0.9).load_state_dict(normalizer.state_dict())
