"""Several environments side by side, stepped one after the other in this process.

Pipes to worker processes cost more than the physics of a small robot, so there are none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf_ppo.control.randomization import DomainRandomization, Randomization
from rlhf_ppo.control.snapshots import restored, snapshot


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """Which task, in which worlds."""

    id: str = "Hopper-v5"
    """Gymnasium's name of the task."""
    randomization: Randomization = field(default_factory=Randomization)
    """Worlds of the episodes."""
    render: bool = False
    """Whether `render()` returns pictures."""


def make_environment(config: EnvironmentConfig) -> Any:
    """One environment.

    Raises:
        ValueError: The task is unknown, or neither its observations nor its actions fit a `ControlPolicy`.
    """
    try:
        env: Any = gym.make(config.id, disable_env_checker=True, render_mode="rgb_array" if config.render else None)
    except gym.error.Error as error:
        raise ValueError(
            f"expected the name of a Gymnasium task, got {config.id!r}: {str(error).rstrip('.')}. "
            "`python -c 'import gymnasium; gymnasium.pprint_registry()'` lists them."
        ) from error
    if config.randomization.is_active:
        env = DomainRandomization(env, config.randomization)
    observed, actions = env.observation_space, env.action_space
    fits = isinstance(observed, gym.spaces.Box) and len(observed.shape) == 1
    fits &= isinstance(actions, gym.spaces.Discrete) or (
        isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1
    )
    if not fits:
        raise ValueError(
            f"expected a vector of observations and a vector or a choice of actions, got {observed} and {actions} from "
            f"{config.id}: the networks take one vector. Flatten them with a Gymnasium wrapper of your own."
        )
    return env


@dataclass(frozen=True)
class Step:
    """What one action in each of N environments led to."""

    rewards: list[float]
    terminated: list[bool]
    """The episode ended: there is no future."""
    truncated: list[bool]
    """The time limit cut the episode: its future exists."""
    mask: list[bool]
    """False where the environment did not act but began a new episode."""


class Environments:
    """N environments. An ended episode leaves its true final observation standing for one step of `mask` False, in
    which the next episode begins: V of that observation is what a truncated step bootstraps from.

    Args:
        envs: Environments of one kind.
        seed: Of the first resets; each environment gets its own.
    """

    def __init__(self, envs: Sequence[Any], *, seed: int) -> None:
        self.envs = list(envs)
        self.observation_space, self.action_space = envs[0].observation_space, envs[0].action_space
        self.observations = np.zeros((len(envs), *self.observation_space.shape), dtype=np.float64)
        """What the policy acts on next, [N, observation]."""
        self.finished: list[tuple[float, int]] = []
        """(return, length) of episodes that ended; emptied by whoever reads it."""
        self._ended, self._returns, self._lengths = [False] * len(envs), [0.0] * len(envs), [0] * len(envs)
        for index, env in enumerate(self.envs):
            own = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
            self.observations[index], _ = env.reset(seed=own)

    def __len__(self) -> int:
        return len(self.envs)

    def step(self, actions: np.ndarray) -> Step:
        """Act once everywhere, or begin anew where an episode had ended.

        Args:
            actions: [N, A] of a Gaussian, cut to the range of the motors here; [N, 1] of a categorical.
        """
        chosen = self._applied(actions)
        count = len(self.envs)
        rewards, terminated, truncated = [0.0] * count, [False] * count, [False] * count
        mask = [not ended for ended in self._ended]
        for index, env in enumerate(self.envs):
            if self._ended[index]:
                self.observations[index], _ = env.reset()
                self._ended[index], self._returns[index], self._lengths[index] = False, 0.0, 0
                continue
            self.observations[index], reward, ended, cut, _ = env.step(chosen[index])
            rewards[index], terminated[index], truncated[index] = float(reward), bool(ended), bool(cut and not ended)
            self._returns[index] += rewards[index]
            self._lengths[index] += 1
            if ended or cut:
                self._ended[index] = True
                self.finished.append((self._returns[index], self._lengths[index]))
        return Step(rewards, terminated, truncated, mask)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as JSON."""
        return {
            "observations": self.observations.tolist(),
            "ended": list(self._ended),
            "returns": list(self._returns),
            "lengths": list(self._lengths),
            "envs": [snapshot(env) for env in self.envs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue every episode where `state_dict` was taken.

        Raises:
            ValueError: The number of environments differs.
        """
        if len(state["envs"]) != len(self.envs):
            raise ValueError(
                f"expected {len(self.envs)} environments, got a state of {len(state['envs'])}: half-played episodes "
                "would have nowhere to go on. Resume with as many environments as the run began with."
            )
        self.observations[:] = state["observations"]
        self._ended, self._returns = list(state["ended"]), list(state["returns"])
        self._lengths, self.finished = list(state["lengths"]), []
        for env, saved in zip(self.envs, state["envs"], strict=True):
            restored(env, saved)

    def close(self) -> None:
        """Free what the environments hold."""
        for env in self.envs:
            env.close()

    def _applied(self, actions: np.ndarray) -> list[Any]:
        if isinstance(self.action_space, gym.spaces.Discrete):
            return [int(action) + int(self.action_space.start) for action in actions[:, 0]]
        return list(np.clip(actions, self.action_space.low, self.action_space.high))
