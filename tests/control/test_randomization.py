"""Domain randomization: what it changes, when, and that a seed decides it."""

from typing import Any

import numpy as np
import pytest

from rlhf_ppo.control import EnvironmentConfig, Randomization
from rlhf_ppo.control.environments import make_environment

WORLDS = Randomization(mass=(0.5, 2.0), friction=(0.5, 2.0), motor=(0.5, 2.0))


def hopper(config: Randomization) -> Any:
    return make_environment(EnvironmentConfig(id="Hopper-v5", randomization=config))


def body(env: Any) -> np.ndarray:
    model = env.unwrapped.model
    parts = [model.body_mass[1:], model.geom_friction[:, 0], model.actuator_gear[:, 0]]
    return np.concatenate([np.array(part) for part in parts])


def test_every_episode_has_a_world_of_its_own_within_the_ranges() -> None:
    nominal, env = body(hopper(Randomization())), hopper(WORLDS)
    factors = []
    for seed in (0, None, None):
        env.reset(seed=seed)
        factors.append(body(env) / nominal)
    assert all(0.5 <= value <= 2.0 for row in factors for value in row)
    assert not np.allclose(factors[0], factors[1]) and not np.allclose(factors[1], factors[2])


def test_the_same_seed_draws_the_same_worlds() -> None:
    worlds = []
    for _ in range(2):
        env = hopper(WORLDS)
        env.reset(seed=3)
        first = body(env)
        env.reset()
        worlds.append((first, body(env)))
    assert np.array_equal(worlds[0][0], worlds[1][0]) and np.array_equal(worlds[0][1], worlds[1][1])


def test_what_mujoco_derives_from_masses_follows_them() -> None:
    """Without mj_setConst the mass of a subtree would be that of the nominal body."""
    env = hopper(Randomization(mass=(2.0, 2.0)))
    env.reset(seed=0)
    nominal = hopper(Randomization()).unwrapped.model
    assert np.allclose(env.unwrapped.model.body_subtreemass, 2 * nominal.body_subtreemass)
    assert np.allclose(env.unwrapped.model.body_inertia, 2 * nominal.body_inertia)


def test_friction_reaches_the_contact_of_foot_and_floor() -> None:
    """A contact takes the larger coefficient of its two geoms, so that changing the floor alone would do nothing."""
    found = []
    for factor in (1.0, 0.4):
        env = hopper(Randomization(friction=(factor, factor)))
        env.reset(seed=0)
        for _ in range(30):
            env.step(np.zeros(3))
        data = env.unwrapped.data
        assert data.ncon > 0
        found.append(float(data.contact[0].friction[0]))
    assert found[1] == pytest.approx(0.4 * found[0])


def test_sensor_noise_is_seen_and_not_felt() -> None:
    """The physics are those without noise; the observation is not."""
    plain, noisy = hopper(Randomization()), hopper(Randomization(sensor_noise=0.1))
    first, _ = plain.reset(seed=0)
    seen, _ = noisy.reset(seed=0)
    assert 0 < np.abs(seen - first).max() < 1.0
    for _ in range(3):
        plain.step(np.ones(3))
        noisy.step(np.ones(3))
    assert np.array_equal(plain.unwrapped.data.qpos, noisy.unwrapped.data.qpos)


def test_without_ranges_there_is_no_wrapper_at_all() -> None:
    assert not hasattr(hopper(Randomization()), "factors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mass": (1.3, 0.7)}, "0 < low <= high"),
        ({"motor": (0.0, 1.0)}, "0 < low <= high"),
        ({"sensor_noise": -0.1}, ">= 0"),
    ],
)
def test_ranges_without_physics_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Randomization(**settings)


def test_tasks_without_masses_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a MuJoCo environment, got CartPole-v1"):
        make_environment(EnvironmentConfig(id="CartPole-v1", randomization=WORLDS))
