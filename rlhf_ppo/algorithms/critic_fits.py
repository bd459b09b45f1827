"""Fit the critic alone: in the first iterations (value pretraining), or after each update of the policy."""

from typing import Any

from accelerate import Accelerator

from rlhf_ppo.algorithms.advantages import EstimateAdvantages
from rlhf_ppo.batch import Rollout, TrainBatch
from rlhf_ppo.updates import CompareWith, CriticFit, Objective, Update, UpdateRecord
from rlhf_ppo.updates.batch_evaluation import record_without_step
from rlhf_ppo.updates.objective import no_comparison
from rlhf_ppo.updates.sharding import all_gather_batch


class CriticWarmup:
    """Fit the critic alone to Monte Carlo returns for some iterations, then run the usual update (Yuan et al. 2025).

    With an untrained critic and λ < 1, GAE decays the score before it reaches the first tokens. The policy does not
    change until the warm-up ends.

    Args:
        objective: Evaluated for the metrics during the warm-up, without a step.
        compare_with: Further arguments of the policy that `objective` needs: the policy to measure an exact KL to.
    """

    def __init__(
        self,
        update: Update,
        fit: CriticFit,
        objective: Objective,
        accelerator: Accelerator,
        iterations: int,
        compare_with: CompareWith = no_comparison,
    ) -> None:
        self.inner, self.fit, self.objective, self.accelerator = update, fit, objective, accelerator
        self.compare_with = compare_with
        self.remaining = iterations

    def switch_estimates(self, usual: EstimateAdvantages, warmup: EstimateAdvantages) -> EstimateAdvantages:
        """Return an estimate that is `warmup` during the warm-up and `usual` afterwards."""

        def estimate(rollout: Rollout) -> TrainBatch:
            return (warmup if self.remaining else usual)(rollout)

        return estimate

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        if not self.remaining:
            return self.inner(batch)
        self.remaining -= 1
        batch = all_gather_batch(batch, self.accelerator)
        record = record_without_step(
            self.fit.policy, batch, self.objective, self.accelerator, self.fit.config(), self.compare_with
        )
        self.fit(batch)
        record.critic_only, record.extras["val/warmup_remaining"] = True, float(self.remaining)
        return record

    def state_dict(self) -> dict[str, Any]:
        """State of the update and of the fit, and the number of remaining iterations."""
        return {"update": self.inner.state_dict(), "fit": self.fit.state_dict(), "remaining": self.remaining}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["update"])
        self.fit.load_state_dict(state["fit"])
        self.remaining = int(state["remaining"])


class ExtraCriticFits:
    """Run an update, then fit the critic alone some more times on the same batch."""

    def __init__(self, update: Update, fit: CriticFit, accelerator: Accelerator, times: int) -> None:
        self.inner, self.fit, self.accelerator, self.times = update, fit, accelerator, times

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        record = self.inner(batch)
        batch = all_gather_batch(batch, self.accelerator)
        for _ in range(self.times):
            self.fit(batch)
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.inner.state_dict(), "fits": self.fit.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["update"])
        self.fit.load_state_dict(state["fits"])
