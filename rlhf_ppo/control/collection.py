"""Run the policy for some steps in every environment: the control side's `Rollout`."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf_ppo.batch import Rollout, TrainBatch
from rlhf_ppo.control.environments import Environments
from rlhf_ppo.control.normalization import Normalizer
from rlhf_ppo.control.policy import ControlInputs, ControlPolicy


class Collector:
    """Acts with one forward pass for all environments; log-probabilities and values follow in one pass at the end.

    Args:
        policy: Acts.
        environments: Are acted in.
        normalizer: Scales what the policy sees and earns.
        steps: T: steps of a rollout in each environment.
        seed: Of the actions.
    """

    def __init__(
        self, policy: ControlPolicy, environments: Environments, normalizer: Normalizer, *, steps: int, seed: int
    ) -> None:
        self.policy, self.environments, self.normalizer, self.steps = policy, environments, normalizer, steps
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self) -> Rollout:
        """T steps in each of N environments: [N, T], with V of the states behind them."""
        environments, count = self.environments, len(self.environments)
        noise = self.policy.distribution.noise((self.steps, count), self.generator)
        seen = np.empty((self.steps + 1, count, *environments.observations.shape[1:]))
        rewards = np.empty((self.steps, count))
        flags = np.empty((3, self.steps, count), dtype=bool)
        actions = []
        for time in range(self.steps):
            seen[time] = environments.observations
            observed = torch.from_numpy(self.normalizer.observed(environments.observations))
            actions.append(self.policy.act(observed, noise[time]))
            step = environments.step(actions[-1].numpy())
            rewards[time], flags[:, time] = step.rewards, (step.terminated, step.truncated, step.mask)
        seen[-1] = environments.observations
        return self._rollout(seen, torch.stack(actions, dim=1), rewards, flags)

    def _rollout(self, seen: np.ndarray, actions: Any, rewards: np.ndarray, flags: np.ndarray) -> Rollout:
        observed = torch.from_numpy(self.normalizer.observed(seen).swapaxes(0, 1).copy())
        terminated, truncated, mask = (torch.from_numpy(flag.T.copy()) for flag in flags)
        self.normalizer.learn_observations(seen[:-1].reshape(-1, seen.shape[-1]))
        scaled = self.normalizer.rewarded(rewards, flags[0] | flags[1], flags[2])
        inputs = ControlInputs(observations=observed[:, :-1], actions=actions)
        return Rollout(
            inputs=inputs, mask=mask, logprobs=self.policy(inputs).logprobs, values=self.policy.values(observed),
            rewards=torch.from_numpy(scaled.T.astype(np.float32)), terminated=terminated, truncated=truncated,
        )  # fmt: skip


def by_step(batch: TrainBatch) -> TrainBatch:
    """The same batch with a row a step, so that minibatches mix times and environments: [N, T] -> [N T, 1]."""
    inputs: Any = batch.inputs
    columns = {
        name: getattr(batch, name).reshape(-1, 1) for name in ("mask", "logprobs", "values", "advantages", "returns")
    }
    return replace(batch, inputs=inputs.steps(), **columns)
