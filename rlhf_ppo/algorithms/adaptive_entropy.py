"""Adapt the weight of the entropy in the loss to a target."""

import functools
from collections.abc import Callable
from typing import Any

from rlhf_ppo.algorithms.surrogate_config import AdaptiveEntropy
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.updates import MinibatchUpdate, Objective, UpdateRecord


class AdaptiveEntropyUpdate:
    """Run an update with the present weight of the entropy, then adapt it (Skywork-OR1, He et al. 2025).

        c ← clip(c + step, 0, largest) where H < target, else clip(c - step, 0, largest)
        weight of the next update = c where H <= target, else 0

    H is the entropy in the last minibatch of the update.

    Args:
        update: Minimizes the objective of the present weight.
    """

    def __init__(
        self, update: MinibatchUpdate, config: AdaptiveEntropy, objective: Callable[[float], Objective]
    ) -> None:
        self.inner, self.config = update, config
        self.objective = functools.cache(objective)
        self.coef = self.weight = config.start

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        self.inner.objective = self.objective(self.weight)
        record = self.inner(batch)
        record.extras["policy/ent_coef"] = self.weight
        if record.metrics:
            self._adapt(record.metrics[-1]["policy/entropy"])
        return record

    def _adapt(self, entropy: float) -> None:
        config = self.config
        step = config.step if entropy < config.target else -config.step
        self.coef = min(max(self.coef + step, 0.0), config.largest)
        self.weight = self.coef if entropy <= config.target else 0.0

    def state_dict(self) -> dict[str, Any]:
        """State of the update, the adapted weight, and that of the next update."""
        return {"update": self.inner.state_dict(), "coef": self.coef, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["update"])
        self.coef, self.weight = float(state["coef"]), float(state["weight"])
