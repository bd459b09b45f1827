"""Observations to zero mean and unit variance, rewards to a unit spread of their discounted return."""

from typing import Any

import numpy as np
import torch

from rlhf_ppo.learner.running_moments import RunningMoments


class Normalizer:
    """Running moments of observations and of discounted returns, which change only between rollouts.

    Within a rollout every observation is scaled by the same two vectors, so the policy that acted is exactly the one
    that the first pass of an update sees. Rewards are divided by the standard deviation of a *rolling discounted
    return*, never shifted: their zero has a meaning (Engstrom et al. 2020).

    Args:
        size: Entries of an observation.
        environments: How many returns roll side by side.
        gamma: Their discount.
        observations: Whether observations are scaled.
        rewards: Whether rewards are scaled.
        clip: Scaled observations and rewards are cut to [-clip, clip].
    """

    def __init__(
        self, size: int, *, environments: int, gamma: float, observations: bool = True, rewards: bool = True,
        clip: float = 10.0,
    ) -> None:  # fmt: skip
        self.moments, self.return_moments = RunningMoments((size,)), RunningMoments()
        self.scales_observations, self.scales_rewards = observations, rewards
        self.gamma, self.clip = gamma, clip
        self._rolling = np.zeros(environments)
        self._refresh()

    def observed(self, observations: np.ndarray) -> np.ndarray:
        """Scaled observations, float32, any leading shape. Changes nothing."""
        if not self.scales_observations:
            return observations.astype(np.float32)
        scaled: np.ndarray = (observations - self._mean) * self._inverse
        cut: np.ndarray = np.minimum(np.maximum(scaled, -self.clip), self.clip).astype(np.float32)
        return cut

    def learn_observations(self, observations: np.ndarray) -> None:
        """Take in the raw observations of a rollout, [samples, size]; the next rollout is scaled by them."""
        if self.scales_observations:
            self.moments.update(torch.from_numpy(observations))
            self._refresh()

    def rewarded(self, rewards: np.ndarray, done: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Scaled rewards of a rollout, after taking in its discounted returns.

        Args:
            rewards: Raw, [time, environments].
            done: Where an episode ended, terminated or truncated: the return begins anew behind it.
            mask: Where an action was taken.
        """
        if not self.scales_rewards:
            return rewards
        returns = np.empty_like(rewards)
        for time, reward in enumerate(rewards):
            returns[time] = self._rolling = self.gamma * self._rolling + reward
            self._rolling = np.where(done[time], 0.0, self._rolling)
        self.return_moments.update(torch.from_numpy(returns[mask]))
        scaled: np.ndarray = np.clip(rewards / (float(self.return_moments.std) + 1e-8), -self.clip, self.clip)
        return scaled

    def state_dict(self) -> dict[str, Any]:
        """Both moments and the rolling returns, as JSON."""
        parts = {"observations": self.moments, "returns": self.return_moments}
        saved = {name: {key: item.tolist() for key, item in part.state_dict().items()} for name, part in parts.items()}
        return saved | {"rolling": self._rolling.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved moments.

        Raises:
            ValueError: They are of observations of another size.
        """
        for name, part in (("observations", self.moments), ("returns", self.return_moments)):
            saved = {key: torch.tensor(item, dtype=torch.float64) for key, item in state[name].items()}
            part.load_state_dict(saved)
        self._rolling = np.asarray(state["rolling"])
        self._refresh()

    def _refresh(self) -> None:
        self._mean = self.moments.mean.numpy().copy()
        self._inverse = 1 / (self.moments.std.numpy() + 1e-8)
