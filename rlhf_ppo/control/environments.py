"""A vector of environments, stepped one after the other in this process.

No worker processes: their pipes cost more than the physics of a small robot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf_ppo.control.randomization import DomainRandomization, Randomization
from rlhf_ppo.control.snapshots import restore_snapshot, snapshot
from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """The task, and its domain randomization."""

    id: str = "Hopper-v5"
    """Gymnasium's id of the task."""
    randomization: Randomization = field(default_factory=Randomization)
    """Ranges of the domain randomization; the default changes nothing."""
    render: bool = False
    """Whether `render()` returns RGB arrays."""
    max_episode_steps: int | None = None
    """Time limit: episodes are truncated after so many steps. None: that of the task, which may have none."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(
                f"max_episode_steps must be at least 1, got {self.max_episode_steps}: no episode would have an action."
            )


def make_environment(config: EnvironmentConfig) -> Any:
    """Create one environment.

    Raises:
        ValueError: The task is unknown, or its observations or actions do not fit a `ControlPolicy`.
        RuntimeError: It cannot be rendered.
    """
    rendering = {"render_mode": "rgb_array"} if config.render else {}  # many constructors do not take it
    try:
        env: Any = gym.make(
            config.id, disable_env_checker=True, max_episode_steps=config.max_episode_steps, **rendering
        )
    except gym.error.Error as error:
        raise ValueError(
            f"expected the name of a Gymnasium task, got {config.id!r}: {str(error).rstrip('.')}. "
            "`python -c 'import gymnasium; gymnasium.pprint_registry()'` lists them."
        ) from error
    except TypeError as error:
        if not config.render:
            raise
        raise RuntimeError(
            f"expected to render {config.id}, got a task that cannot be created for it ({error}): there will be no "
            "pictures, all other results are unaffected. Let its constructor take render_mode='rgb_array'."
        ) from error
    if config.randomization.is_active:
        env = DomainRandomization(env, config.randomization)
    observations, actions = env.observation_space, env.action_space
    fits = isinstance(observations, gym.spaces.Box) and len(observations.shape) == 1
    fits &= isinstance(actions, gym.spaces.Discrete) or (
        isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1
    )
    if not fits:
        raise ValueError(
            f"expected a vector of observations and a vector or a choice of actions, got {observations} and {actions} "
            f"from {config.id}: the networks take one vector. Flatten them with a Gymnasium wrapper."
        )
    return env


@dataclass(frozen=True)
class Step:
    """Rewards and flags of one step in each of N environments."""

    rewards: list[float]
    terminated: list[bool]
    """The episode ended: it has no future."""
    truncated: list[bool]
    """The time limit cut the episode off: it has an unobserved future."""
    mask: list[bool]
    """False where the environment was reset instead of stepped."""


class Environments:
    """N environments with auto-reset in the next step.

    After an episode its true final observation stays for one step with `mask` False, in which the environment is reset:
    a truncated step bootstraps from V of that observation.

    Args:
        envs: Environments with the same observation and action spaces.
        seed: Seeds the first resets; each environment gets a different one.
    """

    def __init__(self, envs: Sequence[Any], *, seed: int) -> None:
        self.envs = list(envs)
        self.observation_space, self.action_space = envs[0].observation_space, envs[0].action_space
        self.observations = np.zeros((len(envs), *self.observation_space.shape), dtype=np.float64)
        """Current observations, not normalized, [N, observation]."""
        self.finished: list[tuple[float, int]] = []
        """(return, length) of ended episodes; the caller empties it."""
        self._ended, self._returns, self._lengths = [False] * len(envs), [0.0] * len(envs), [0] * len(envs)
        for index, env in enumerate(self.envs):
            env_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
            self.observations[index], _ = env.reset(seed=env_seed)
        self._check_observations()

    def __len__(self) -> int:
        return len(self.envs)

    def step(self, actions: np.ndarray) -> Step:
        """Step every environment once, or reset it where an episode has ended.

        Args:
            actions: [N, A] of a Gaussian, clipped to the action space here; [N, 1] of a categorical.

        Raises:
            ValueError: An observation is not finite.
        """
        env_actions = self._to_env_actions(actions)
        count = len(self.envs)
        rewards, terminated, truncated = [0.0] * count, [False] * count, [False] * count
        mask = [not ended for ended in self._ended]
        for index, env in enumerate(self.envs):
            if self._ended[index]:
                self.observations[index], _ = env.reset()
                self._ended[index], self._returns[index], self._lengths[index] = False, 0.0, 0
                continue
            self.observations[index], reward, ended, cut, _ = env.step(env_actions[index])
            rewards[index], terminated[index], truncated[index] = float(reward), bool(ended), bool(cut and not ended)
            self._returns[index] += rewards[index]
            self._lengths[index] += 1
            if ended or cut:
                self._ended[index] = True
                self.finished.append((self._returns[index], self._lengths[index]))
        self._check_observations()
        return Step(rewards, terminated, truncated, mask)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, JSON-serializable."""
        return {
            "observations": self.observations.tolist(),
            "ended": list(self._ended),
            "returns": list(self._returns),
            "lengths": list(self._lengths),
            "envs": [snapshot(env) for env in self.envs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue every episode where `state_dict` was taken; a ValueError if the number of environments differs."""
        if len(state["envs"]) != len(self.envs):
            raise ValueError(
                f"expected {len(self.envs)} environments, got a state of {len(state['envs'])}: episodes in progress "
                "could not continue. Resume with the same number of environments."
            )
        self.observations[:] = state["observations"]
        self._ended, self._returns = list(state["ended"]), list(state["returns"])
        self._lengths, self.finished = list(state["lengths"]), []
        for env, saved in zip(self.envs, state["envs"], strict=True):
            restore_snapshot(env, saved)

    def close(self) -> None:
        """Close all environments."""
        for env in self.envs:
            env.close()

    def _check_observations(self) -> None:
        if np.isfinite(self.observations).all():
            return
        index, entry = np.argwhere(~np.isfinite(self.observations))[0]
        raise ValueError(
            f"expected finite observations, got {self.observations[index, entry]} in entry {entry} from environment "
            f"{index}, {self._lengths[index]} steps into its episode: actions and losses would be nan. Repair the task."
        )

    def _to_env_actions(self, actions: np.ndarray) -> list[Any]:
        if isinstance(self.action_space, gym.spaces.Discrete):
            return [int(action) + int(self.action_space.start) for action in actions[:, 0]]
        return list(np.clip(actions, self.action_space.low, self.action_space.high))
