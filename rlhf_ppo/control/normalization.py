"""Normalize observations to zero mean and unit variance, and rewards to unit variance of the discounted return."""

from typing import Any

import numpy as np
import torch

from rlhf_ppo.learner.running_moments import RunningMoments


class Normalizer:
    """Normalizes observations and rewards by running moments that change only between rollouts.

    Within a rollout every observation is scaled by the same mean and standard deviation, so the first pass of an update
    sees exactly the policy that acted. Rewards are divided by the standard deviation of a *rolling discounted return*,
    never shifted (Engstrom et al. 2020).

    Args:
        size: Entries of an observation.
        environments: Number of environments, each with a rolling return.
        gamma: Discount of the rolling returns.
        observations: Whether observations are scaled.
        rewards: Whether rewards are scaled.
        clip: Scaled observations and rewards are clipped to [-clip, clip].
    """

    def __init__(
        self, size: int, *, environments: int, gamma: float, observations: bool = True, rewards: bool = True,
        clip: float = 10.0,
    ) -> None:  # fmt: skip
        self.moments, self.return_moments = RunningMoments((size,)), RunningMoments()
        self.scales_observations, self.scales_rewards = observations, rewards
        self.gamma, self.clip = gamma, clip
        self._rolling_returns = np.zeros(environments)
        self._update_scale()

    def normalize_observations(self, observations: np.ndarray) -> np.ndarray:
        """Normalized observations, float32, any leading shape; the moments do not change."""
        if not self.scales_observations:
            return observations.astype(np.float32)
        scaled: np.ndarray = (observations - self._mean) * self._inverse_std
        clipped: np.ndarray = np.minimum(np.maximum(scaled, -self.clip), self.clip).astype(np.float32)
        return clipped

    def update_observation_moments(self, observations: np.ndarray) -> None:
        """Update the moments with the raw observations of a rollout, [samples, size], for the next rollout."""
        if self.scales_observations:
            self.moments.update(torch.from_numpy(observations))
            self._update_scale()

    def normalize_rewards(self, rewards: np.ndarray, done: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Update the return moments with a rollout, and return its normalized rewards.

        Args:
            rewards: Raw rewards, [time, environments].
            done: Where an episode ended, terminated or truncated: the rolling return restarts after it.
            mask: Where an action was taken.

        Raises:
            ValueError: A reward is not finite; nothing has changed.
        """
        _check_rewards(rewards, mask)
        if not self.scales_rewards:
            return rewards
        returns = np.empty_like(rewards)
        for time, reward in enumerate(rewards):
            returns[time] = self._rolling_returns = self.gamma * self._rolling_returns + reward
            self._rolling_returns = np.where(done[time], 0.0, self._rolling_returns)
        self.return_moments.update(torch.from_numpy(returns[mask]))
        scaled: np.ndarray = np.clip(rewards / (float(self.return_moments.std) + 1e-8), -self.clip, self.clip)
        return scaled

    def state_dict(self) -> dict[str, Any]:
        """Both moments and the rolling returns, JSON-serializable."""
        moments = {"observations": self.moments, "returns": self.return_moments}
        saved = {name: {key: item.tolist() for key, item in m.state_dict().items()} for name, m in moments.items()}
        return saved | {"rolling": self._rolling_returns.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved moments; a ValueError if the saved observations have another size."""
        for name, moments in (("observations", self.moments), ("returns", self.return_moments)):
            saved = {key: torch.tensor(item, dtype=torch.float64) for key, item in state[name].items()}
            moments.load_state_dict(saved)
        self._rolling_returns = np.asarray(state["rolling"])
        self._update_scale()

    def _update_scale(self) -> None:
        self._mean = self.moments.mean.numpy().copy()
        self._inverse_std = 1 / (self.moments.std.numpy() + 1e-8)


def _check_rewards(rewards: np.ndarray, mask: np.ndarray) -> None:
    broken = mask & ~np.isfinite(rewards)
    if broken.any():
        time, environment = np.argwhere(broken)[0]
        raise ValueError(
            f"expected finite rewards, got {int(broken.sum())} of {int(mask.sum())} that are not, the first "
            f"({rewards[time, environment]}) in environment {environment} at step {time} of the rollout: one would "
            "spoil the returns of its whole episode. Repair the reward of the task."
        )
