"""Vector environments: what ends, what is cut, what goes on, and what a checkpoint brings back."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo.algorithms import GAE
from rlhf_ppo.algorithms.advantages import gae_advantages
from rlhf_ppo.control import ControlPolicy, EnvironmentConfig, Environments, Gaussian, Normalizer, Randomization
from rlhf_ppo.control.collection import Collector, flatten_time
from rlhf_ppo.control.environments import make_environment
from rlhf_ppo.functional.masked import identity
from tests.control.tasks import Corridor, corridor

STAND = np.zeros((2, 1))


def test_an_ended_episode_leaves_its_last_observation_for_one_masked_step() -> None:
    """The first corridor ends after two steps, the second is cut after three."""
    environments = Environments([corridor(terminates=2), corridor(truncates=3)], seed=0)
    seen, terminated, truncated, mask = [], [], [], []
    for _ in range(5):
        seen.append(environments.observations[:, 0].tolist())
        step = environments.step(STAND)
        terminated.append(step.terminated)
        truncated.append(step.truncated)
        mask.append(step.mask)
    assert seen == [[0, 0], [1, 1], [2, 2], [0, 3], [1, 0]]
    assert terminated == [[False, False], [True, False], [False, False], [False, False], [True, False]]
    assert truncated == [[False, False], [False, False], [False, True], [False, False], [False, False]]
    assert mask == [[True, True], [True, True], [False, True], [True, False], [True, True]]
    assert environments.finished == [(2.0, 2), (3.0, 3), (2.0, 2)]


def test_motors_get_actions_within_their_range_and_the_policy_keeps_its_own() -> None:
    env = Corridor()
    environments = Environments([env], seed=0)
    environments.step(np.array([[7.0]]))
    assert env.heard == [1.0]


class Clock(ControlPolicy):
    """V(s) = 10 + the number of steps made; always acts 0."""

    def __init__(self) -> None:
        super().__init__(1, Gaussian(1, log_std=-20.0), 1, hidden=())
        with torch.no_grad():
            self.critic[0].weight.fill_(1.0)
            self.critic[0].bias.fill_(10.0)
            self.actor[0].weight.fill_(0.0)


def test_credit_bootstraps_through_a_cut_and_not_through_an_end() -> None:
    """γ = 0.5, λ = 0, by hand: A = 1 + 0.5 V(s') - V(s), without V(s') where the episode terminated.

    The value behind the cut is that of the true final observation, 10 + 3, not of the next episode's first one.
    """
    environments = Environments([corridor(terminates=3), corridor(truncates=3)], seed=0)
    normalizer = Normalizer(1, environments=2, gamma=0.5, observations=False, rewards=False)
    rollout = Collector(Clock(), environments, normalizer, steps=5, seed=0)()
    batch = gae_advantages(GAE(gamma=0.5, lam=0.0), identity)(rollout)
    kept = rollout.mask
    assert kept.tolist() == [[True, True, True, False, True]] * 2
    ended, cut = (batch.returns[row][kept[row]].tolist() for row in range(2))
    assert ended == pytest.approx([1 + 0.5 * 11, 1 + 0.5 * 12, 1.0, 1 + 0.5 * 11])
    assert cut == pytest.approx([1 + 0.5 * 11, 1 + 0.5 * 12, 1 + 0.5 * 13, 1 + 0.5 * 11])


def test_rows_of_an_update_are_the_steps_of_the_rollout_in_their_order() -> None:
    environments = Environments([corridor(terminates=3), corridor(truncates=3)], seed=0)
    normalizer = Normalizer(1, environments=2, gamma=0.5, observations=False, rewards=False)
    policy = Clock()
    rollout = Collector(policy, environments, normalizer, steps=5, seed=0)()
    steps = flatten_time(gae_advantages(GAE(gamma=0.5), identity)(rollout))
    assert_close(steps.mask[:, 0], rollout.mask.flatten())
    with torch.no_grad():
        output = policy(steps.inputs)
    assert_close(output.logprobs, steps.logprobs)
    assert_close(output.values[:, :1], steps.values)


@pytest.mark.parametrize(
    "config",
    [
        EnvironmentConfig(id="CartPole-v1"),
        EnvironmentConfig(id="Hopper-v5"),
        EnvironmentConfig(id="Ant-v5"),
        EnvironmentConfig(
            id="Hopper-v5",
            randomization=Randomization(mass=(0.5, 2.0), friction=(0.5, 2), motor=(0.5, 2), sensor_noise=0.1),
        ),
    ],
    ids=["CartPole", "Hopper", "Ant", "worlds"],
)
def test_half_played_episodes_go_on_bit_for_bit(config: EnvironmentConfig) -> None:
    """Through JSON, into environments that were somewhere else, over several ends of episodes."""
    generator = np.random.default_rng(0)

    def built(seed: int) -> Environments:
        return Environments([make_environment(config) for _ in range(2)], seed=seed)

    def actions() -> list[np.ndarray]:
        if config.id == "CartPole-v1":
            return [generator.integers(0, 2, (2, 1)) for _ in range(60)]
        return [generator.uniform(-1, 1, (2, environments.action_space.shape[0])) for _ in range(60)]

    environments, other = built(0), built(7)
    for action in actions():
        environments.step(action)
    other.load_state_dict(json.loads(json.dumps(environments.state_dict())))
    for action in actions():
        assert environments.step(action) == other.step(action)
        assert np.array_equal(environments.observations, other.observations)
    assert [len(part.finished) > 0 for part in (environments, other)] == [environments.finished != []] * 2


def test_environments_and_seeds_differ_from_each_other() -> None:
    firsts = [
        Environments([make_environment(EnvironmentConfig(id="CartPole-v1")) for _ in range(2)], seed=seed).observations
        for seed in (0, 1, 0)
    ]
    assert len({tuple(row) for part in firsts[:2] for row in part}) == 4
    assert np.array_equal(firsts[0], firsts[2])


def test_states_of_another_number_of_environments_are_refused() -> None:
    state = Environments([corridor()], seed=0).state_dict()
    with pytest.raises(ValueError, match="expected 2 environments, got a state of 1"):
        Environments([corridor(), corridor()], seed=0).load_state_dict(state)


@pytest.mark.parametrize(
    ("task", "message"), [("Nothing-v0", "name of a Gymnasium task"), ("Blackjack-v1", "a vector of observations")]
)
def test_tasks_that_do_not_exist_or_do_not_fit_are_refused(task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_environment(EnvironmentConfig(id=task))


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_an_observation_that_is_not_finite_is_named(lost: float) -> None:
    """A robot's lost sensor would be blamed on the reward, on extreme scores, or on nothing."""

    class LostSensor(Corridor):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            observation, *rest = super().step(action)
            return np.where(self.time == 3, lost, observation), *rest

    environments = Environments([corridor(), LostSensor()], seed=0)
    for _ in range(2):
        environments.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=f"got {lost} in entry 0 from environment 1, 3 steps into its episode"):
        environments.step(np.zeros((2, 1)))
