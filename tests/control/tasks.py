"""Small environments whose every number is known beforehand."""

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec


class Corridor(gym.Env[Any, Any]):
    """Observation: how many steps were made. Reward: 1 + the action. Terminates after `length` steps, if ever."""

    def __init__(self, length: int | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,))
        self.length = length
        self.time = 0
        self.heard: list[float] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return np.array([0.0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        self.heard.append(float(action[0]))
        return np.array([float(self.time)]), 1.0 + float(action[0]), self.time == self.length, False, {}


class Remembering(Corridor):
    """Rewards and observations of `Corridor` change with what was heard, which is kept in collections of all kinds."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.recent, self.counts, self.pair = deque([0.0], maxlen=3), {0: np.float32(0)}, (0, [0.0])
        self.seen: set[int] = set()
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, reward, *rest = super().step(action)
        self.recent.append(float(action[0]))
        self.counts[self.time % 3] = self.counts.get(self.time % 3, np.float32(0)) + np.float32(reward)
        self.pair = self.pair[0] + 1, [*self.pair[1][-2:], reward]
        self.seen.add(round(reward))
        state = sum(self.recent) + float(self.counts.get(1, 0)) + sum(self.pair[1]) + len(self.seen)
        return np.array([state]), reward + 0.1 * state, *rest


def corridor(*, terminates: int | None = None, truncates: int | None = None) -> Any:
    env: Any = Corridor(terminates)
    return env if truncates is None else gym.wrappers.TimeLimit(env, truncates)


def register(monkeypatch: pytest.MonkeyPatch, name: str, entry_point: Any, **settings: Any) -> None:
    """Register a task with Gymnasium until the end of the test."""
    monkeypatch.setitem(gym.registry, name, EnvSpec(name, entry_point=entry_point, **settings))
