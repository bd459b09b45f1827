"""Updates of PPO-Penalty: adapt β to the KL after each update, and keep the old policy for the exact KL."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlhf_ppo.algorithms.penalty_beta import PenaltyBeta
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.models.lm_head import OldPolicyStates
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.updates import MinibatchConfig, MinibatchUpdate, Objective, Update, UpdateRecord
from rlhf_ppo.updates.batch_evaluation import kl_after_update


class AdaptiveBetaUpdate:
    """Run an update, then adapt β to the KL it reached (Schulman et al. 2017, §4).

    Args:
        update: Minimizes the objective of the current β.
    """

    def __init__(self, update: MinibatchUpdate, beta: PenaltyBeta, objective: Callable[[float], Objective]) -> None:
        self.inner = update
        self.beta = beta
        self.objective = functools.cache(objective)

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """Run one update, measure its KL after the last step, and double or halve β if the KL is out of range."""
        inner = self.inner
        inner.objective = self.objective(self.beta.value)
        record = inner(batch)
        kl = kl_after_update(inner.policy, batch, inner.accelerator, inner.config)
        record.extras = {"policy/beta": self.beta.value, "policy/reached_kl": kl}
        self.beta.update(kl)
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.inner.state_dict(), "beta": self.beta.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["update"])
        self.beta.load_state_dict(state["beta"])


class OldPolicySnapshot:
    """Copies π_old's hidden states and LM head before an update, for the exact KL(π_old || π_θ) in its loss."""

    def __init__(self, policy: TokenPolicy, config: Callable[[], MinibatchConfig]) -> None:
        self.policy, self.config = policy, config
        self._head: Any = None

    def wrap(self, update: Update) -> Update:
        """The same update, on batches with the old policy's hidden states."""
        return _UpdateWithOldStates(self, update)

    def compare_with(self, batch: TrainBatch) -> dict[str, Any]:
        """The policy's argument `old` for the KL at a micro-batch."""
        if batch.old_states is None:
            raise ValueError(
                "expected a batch with old_states, got None: run the update through OldPolicySnapshot.wrap"
            )
        return {"old": OldPolicyStates(self._head, batch.old_states)}

    def with_old_states(self, batch: TrainBatch) -> TrainBatch:
        """Copy the LM head, and return the batch with the current policy's hidden states."""
        self._head = self.policy.copy_head()
        rows: dict[int, torch.Tensor] = {}
        for micro_batch in self.config().micro_batches(batch.inputs.costs()):
            inputs: Any = batch.inputs.select(micro_batch)
            rows |= dict(zip(micro_batch.tolist(), self.policy.snapshot(inputs), strict=True))
        width = batch.mask.shape[1]
        states = [torch.nn.functional.pad(row, (0, 0, 0, width - len(row))) for _, row in sorted(rows.items())]
        return replace(batch, old_states=torch.stack(states))


class _UpdateWithOldStates:
    def __init__(self, snapshot: OldPolicySnapshot, update: Update) -> None:
        self.snapshot, self.inner = snapshot, update

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        return self.inner(self.snapshot.with_old_states(batch))

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
