"""Domain randomization (Tobin et al. 2017; Peng et al. 2018): every episode in a slightly different body and world."""

from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class Randomization:
    """What is drawn at the start of an episode, uniformly in a range; (1, 1) leaves a quantity alone."""

    mass: tuple[float, float] = (1.0, 1.0)
    """Factor on the mass and inertia of each body, one draw a body."""
    friction: tuple[float, float] = (1.0, 1.0)
    """Factor on every friction coefficient, one draw an episode: a contact takes the larger of its two geoms'."""
    motor: tuple[float, float] = (1.0, 1.0)
    """Factor on the strength (gear) of each motor, one draw a motor."""
    sensor_noise: float = 0.0
    """Standard deviation of Gaussian noise on every entry of an observation, in its own units."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("mass", "friction", "motor"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be a range (low, high) with 0 < low <= high, got {(low, high)}: a factor of 0 or "
                    "less has no physics. Pass e.g. (0.7, 1.3), or (1.0, 1.0) to leave it alone."
                )
        if not self.sensor_noise >= 0:
            raise ValueError(f"sensor_noise must be >= 0, got {self.sensor_noise}: it is a standard deviation.")

    @property
    def is_active(self) -> bool:
        """Whether anything is changed at all."""
        return any(getattr(self, item.name) != item.default for item in fields(self))


class DomainRandomization(gym.Wrapper[Any, Any, Any, Any]):
    """A MuJoCo environment whose masses, friction, motors and sensors change from episode to episode.

    Draws come from a generator of its own, seeded by `reset(seed=...)`: the same seed gives the same bodies.

    Args:
        env: A MuJoCo environment.
        config: Ranges.

    Raises:
        ValueError: The environment has no MuJoCo model.
    """

    def __init__(self, env: Any, config: Randomization) -> None:
        super().__init__(env)
        model = getattr(env.unwrapped, "model", None)
        if not isinstance(model, mujoco.MjModel):
            raise ValueError(
                f"expected a MuJoCo environment, got {env.unwrapped.spec.id if env.unwrapped.spec else env}: it has no "
                "masses and motors to change. Leave the randomization out, or take e.g. Hopper-v5."
            )
        self.config, self._model, self._data = config, model, env.unwrapped.data
        self._nominal = {name: getattr(model, name).copy() for name in _QUANTITIES}
        self._rng = np.random.default_rng()
        self.factors: dict[str, np.ndarray] = {}
        """Of the running episode: mass [bodies], friction [1], motor [motors]."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Draw a world, then begin an episode in it."""
        if seed is not None:
            self._rng = np.random.default_rng([seed, 1])
        draw = self._rng.uniform
        self._apply(
            {
                "mass": draw(*self.config.mass, size=self._model.nbody),
                "friction": draw(*self.config.friction, size=1),
                "motor": draw(*self.config.motor, size=self._model.nu),
            }
        )
        observation, info = self.env.reset(seed=seed, options=options)
        return self._sensed(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step, seen through noisy sensors."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._sensed(observation), float(reward), terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """Generator and the factors of the running episode."""
        factors = {name: values.tolist() for name, values in self.factors.items()}
        return {"rng": self._rng.bit_generator.state, "factors": factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the episode where `state_dict` was taken."""
        self._rng.bit_generator.state = state["rng"]
        self._apply({name: np.asarray(values) for name, values in state["factors"].items()})

    def _apply(self, factors: dict[str, np.ndarray]) -> None:
        model, nominal = self._model, self._nominal
        model.body_mass[:] = nominal["body_mass"] * factors["mass"]
        model.body_inertia[:] = nominal["body_inertia"] * factors["mass"][:, None]
        model.geom_friction[:] = nominal["geom_friction"] * factors["friction"]
        model.actuator_gear[:] = nominal["actuator_gear"] * factors["motor"][:, None]
        # What MuJoCo derives from masses is stale until it is asked to derive it again, at the reference position.
        mujoco.mj_setConst(model, self._data)
        self.factors = factors

    def _sensed(self, observation: Any) -> Any:
        if not self.config.sensor_noise:
            return observation
        return observation + self._rng.normal(0.0, self.config.sensor_noise, size=observation.shape)


_QUANTITIES = ("body_mass", "body_inertia", "geom_friction", "actuator_gear")
