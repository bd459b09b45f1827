"""Collect a `Rollout` from the environments."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf_ppo.batch import Rollout, TrainBatch
from rlhf_ppo.control.environments import Environments
from rlhf_ppo.control.normalization import Normalizer
from rlhf_ppo.control.policy import ControlInputs, ControlPolicy


class Collector:
    """Samples actions with one forward pass per step; log-probabilities and values follow in one pass at the end.

    Args:
        normalizer: Scales observations and rewards.
        steps: T: steps per environment and rollout.
        seed: Seeds the actions.
    """

    def __init__(
        self, policy: ControlPolicy, environments: Environments, normalizer: Normalizer, *, steps: int, seed: int
    ) -> None:
        self.policy, self.environments, self.normalizer, self.steps = policy, environments, normalizer, steps
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self) -> Rollout:
        """Run T steps in each of N environments; returns [N, T] arrays, with values [N, T + 1]."""
        environments, count = self.environments, len(self.environments)
        noise = self.policy.distribution.noise((self.steps, count), self.generator)
        observations = np.empty((self.steps + 1, count, *environments.observations.shape[1:]))
        rewards = np.empty((self.steps, count))
        flags = np.empty((3, self.steps, count), dtype=bool)
        actions = []
        for time in range(self.steps):
            observations[time] = environments.observations
            normalized = torch.from_numpy(self.normalizer.normalize_observations(environments.observations))
            actions.append(self.policy.act(normalized, noise[time]))
            step = environments.step(actions[-1].numpy())
            rewards[time], flags[:, time] = step.rewards, (step.terminated, step.truncated, step.mask)
        observations[-1] = environments.observations
        return self._rollout(observations, torch.stack(actions, dim=1), rewards, flags)

    def _rollout(self, observations: np.ndarray, actions: Any, rewards: np.ndarray, flags: np.ndarray) -> Rollout:
        normalized = torch.from_numpy(self.normalizer.normalize_observations(observations).swapaxes(0, 1).copy())
        terminated, truncated, mask = (torch.from_numpy(flag.T.copy()) for flag in flags)
        scaled = self.normalizer.normalize_rewards(rewards, flags[0] | flags[1], flags[2])
        self.normalizer.update_observation_moments(observations[:-1].reshape(-1, observations.shape[-1]))
        inputs = ControlInputs(observations=normalized[:, :-1], actions=actions)
        return Rollout(
            inputs=inputs, mask=mask, logprobs=self.policy(inputs).logprobs, values=self.policy.values(normalized),
            rewards=torch.from_numpy(scaled.T.astype(np.float32)), terminated=terminated, truncated=truncated,
        )  # fmt: skip


def flatten_time(batch: TrainBatch) -> TrainBatch:
    """One row per step, so that minibatches mix time steps and environments: [N, T] -> [N T, 1]."""
    inputs: Any = batch.inputs
    return replace(batch, inputs=inputs.flatten_time(), **batch.map_tensors(lambda value: value.reshape(-1, 1)))
