"""Domain randomization (Tobin et al. 2017; Peng et al. 2018): physical parameters are sampled for every episode."""

from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class Randomization:
    """Ranges of factors that are sampled uniformly per episode; (1, 1) leaves a quantity unchanged."""

    mass: tuple[float, float] = (1.0, 1.0)
    """Factor on mass and inertia, one sample per body."""
    friction: tuple[float, float] = (1.0, 1.0)
    """Factor on every friction coefficient, one sample per episode: a contact uses the larger of its two geoms'."""
    motor: tuple[float, float] = (1.0, 1.0)
    """Factor on the strength (gear), one sample per motor."""
    sensor_noise: float = 0.0
    """Standard deviation of Gaussian noise on every entry of an observation, in its own units."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("mass", "friction", "motor"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be a range (low, high) with 0 < low <= high, got {(low, high)}: a factor of 0 or "
                    "less is unphysical. Pass e.g. (0.7, 1.3), or (1.0, 1.0) to leave it alone."
                )
        if not self.sensor_noise >= 0:
            raise ValueError(f"sensor_noise must be >= 0, got {self.sensor_noise}: it is a standard deviation.")

    @property
    def is_active(self) -> bool:
        """Whether any setting differs from its default."""
        return any(getattr(self, item.name) != item.default for item in fields(self))


class DomainRandomization(gym.Wrapper[Any, Any, Any, Any]):
    """Wrapper of a MuJoCo environment that randomizes masses, friction, motors and sensors per episode.

    It has a separate random generator, seeded by `reset(seed=...)`: the same seed gives the same factors.

    Args:
        env: A MuJoCo environment.
        config: Ranges of the factors.

    Raises:
        ValueError: The environment has no MuJoCo model.
    """

    def __init__(self, env: Any, config: Randomization) -> None:
        super().__init__(env)
        model = getattr(env.unwrapped, "model", None)
        if not isinstance(model, mujoco.MjModel):
            raise ValueError(
                f"expected a MuJoCo environment, got {env.unwrapped.spec.id if env.unwrapped.spec else env}: it has no "
                "masses and motors to change. Leave the randomization out, or use e.g. Hopper-v5."
            )
        self.config, self._model, self._data = config, model, env.unwrapped.data
        self._nominal = {name: getattr(model, name).copy() for name in _QUANTITIES}
        self._rng = np.random.default_rng()
        self.factors: dict[str, np.ndarray] = {}
        """Factors of the current episode: mass [bodies], friction [1], motor [motors]."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Sample factors, then reset the environment."""
        if seed is not None:
            self._rng = np.random.default_rng([seed, 1])
        uniform = self._rng.uniform
        self._apply_factors(
            {
                "mass": uniform(*self.config.mass, size=self._model.nbody),
                "friction": uniform(*self.config.friction, size=1),
                "motor": uniform(*self.config.motor, size=self._model.nu),
            }
        )
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_sensor_noise(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment and add sensor noise to the observation."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._with_sensor_noise(observation), float(reward), terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """State of the generator, and the factors of the current episode."""
        factors = {name: values.tolist() for name, values in self.factors.items()}
        return {"rng": self._rng.bit_generator.state, "factors": factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the episode where `state_dict` was taken."""
        self._rng.bit_generator.state = state["rng"]
        self._apply_factors({name: np.asarray(values) for name, values in state["factors"].items()})

    def _apply_factors(self, factors: dict[str, np.ndarray]) -> None:
        model, nominal = self._model, self._nominal
        model.body_mass[:] = nominal["body_mass"] * factors["mass"]
        model.body_inertia[:] = nominal["body_inertia"] * factors["mass"][:, None]
        model.geom_friction[:] = nominal["geom_friction"] * factors["friction"]
        model.actuator_gear[:] = nominal["actuator_gear"] * factors["motor"][:, None]
        # Recompute the constants that MuJoCo derives from masses, at the reference position.
        mujoco.mj_setConst(model, self._data)
        self.factors = factors

    def _with_sensor_noise(self, observation: Any) -> Any:
        if not self.config.sensor_noise:
            return observation
        return observation + self._rng.normal(0.0, self.config.sensor_noise, size=observation.shape)


_QUANTITIES = ("body_mass", "body_inertia", "geom_friction", "actuator_gear")
