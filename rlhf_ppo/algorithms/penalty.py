"""Around the update of PPO-Penalty: β follows the KL that was reached, and the old policy is kept for the exact KL."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlhf_ppo.algorithms.penalty_beta import PenaltyBeta
from rlhf_ppo.batch import TrainBatch, split_into_micro_batches
from rlhf_ppo.models.scoring import OldPolicyStates, TokenPolicy
from rlhf_ppo.updates import MinibatchConfig, MinibatchUpdate, Objective, Update, UpdateRecord
from rlhf_ppo.updates.measure import kl_after_update


class AdaptiveBetaUpdate:
    """Run an update, then adapt β to the KL it reached (Schulman et al. 2017, §4).

    Args:
        update: Minimizes the objective of the present β.
        beta: Follows the KL.
        objective: Of a β.
    """

    def __init__(self, update: MinibatchUpdate, beta: PenaltyBeta, objective: Callable[[float], Objective]) -> None:
        self.inner = update
        self.beta = beta
        self.objective = functools.cache(objective)

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """One update, then β x 2 or β / 2 outside the band around the target, by the KL after its last step."""
        inner = self.inner
        inner.objective = self.objective(self.beta.value)
        record = inner(batch)
        kl = kl_after_update(
            inner.policy, batch, inner.accelerator,
            size=inner.config.micro_batch_size, token_budget=inner.config.token_budget,
        )  # fmt: skip
        record.extras = {"policy/beta": self.beta.value, "policy/reached_kl": kl}
        self.beta.update(kl)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Of the update and of β."""
        return {"update": self.inner.state_dict(), "beta": self.beta.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.inner.load_state_dict(state["update"])
        self.beta.load_state_dict(state["beta"])


class OldPolicyKeeper:
    """An update that can measure the exact KL(π_old || π_θ): π_old's hidden states and LM head are kept aside.

    Args:
        policy: The `TokenPolicy` itself.
        config: Sizes of passes.
    """

    def __init__(self, policy: TokenPolicy, config: Callable[[], MinibatchConfig]) -> None:
        self.policy, self.config = policy, config
        self._head: Any = None

    def around(self, update: Update) -> Update:
        """The same update, on batches that carry the old states."""
        return _Around(self, update)

    def compare_with(self, batch: TrainBatch) -> dict[str, Any]:
        """What the policy's forward pass needs to measure the KL at a micro-batch."""
        if batch.old_states is None:
            raise ValueError("the batch carries no old states: run the update through OldPolicyKeeper.around")
        return {"old": OldPolicyStates(self._head, batch.old_states)}

    def kept(self, batch: TrainBatch) -> TrainBatch:
        """The batch with the states of the policy as it is now."""
        config, costs = self.config(), batch.inputs.costs()
        self._head = self.policy.copy_head()
        rows: dict[int, torch.Tensor] = {}
        for micro_batch in split_into_micro_batches(
            costs, size=config.micro_batch_size, token_budget=config.token_budget
        ):
            inputs: Any = batch.inputs.select(micro_batch)
            rows |= dict(zip(micro_batch.tolist(), self.policy.snapshot(inputs), strict=True))
        width = batch.mask.shape[1]
        states = [torch.nn.functional.pad(row, (0, 0, 0, width - len(row))) for _, row in sorted(rows.items())]
        return replace(batch, old_states=torch.stack(states))


class _Around:
    def __init__(self, keeper: OldPolicyKeeper, update: Update) -> None:
        self.keeper, self.inner = keeper, update

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        return self.inner(self.keeper.kept(batch))

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
