"""Before the policy learns, its critic does."""

from typing import Any

from accelerate import Accelerator

from rlhf_ppo.algorithms.advantages import EstimateAdvantages
from rlhf_ppo.batch import Rollout, TrainBatch
from rlhf_ppo.updates import CriticFit, Objective, Update, UpdateRecord
from rlhf_ppo.updates.measure import record_without_step
from rlhf_ppo.updates.sharding import all_gather_batch


class CriticWarmup:
    """For some iterations fit the critic alone, to Monte Carlo returns; then update as usual (Yuan et al. 2025).

    A critic that knows nothing makes GAE with λ < 1 forget the score before it reaches the first tokens. The policy
    stays bit for bit until the critic is warm.

    Args:
        update: What comes after.
        fit: Moves the critic.
        objective: What is reported meanwhile; nothing is learned from it.
        accelerator: Of the policy.
        iterations: How many.
    """

    def __init__(
        self, update: Update, fit: CriticFit, objective: Objective, accelerator: Accelerator, iterations: int
    ) -> None:
        self.inner, self.fit, self.objective, self.accelerator = update, fit, objective, accelerator
        self.remaining = iterations

    def estimating(self, usual: EstimateAdvantages, monte_carlo: EstimateAdvantages) -> EstimateAdvantages:
        """Monte Carlo targets while the critic warms up."""

        def estimate(rollout: Rollout) -> TrainBatch:
            return (monte_carlo if self.remaining else usual)(rollout)

        return estimate

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """One iteration of whichever phase it is."""
        if not self.remaining:
            return self.inner(batch)
        self.remaining -= 1
        everything = all_gather_batch(batch, self.accelerator)
        record = record_without_step(self.fit.policy, everything, self.objective, self.accelerator, self.fit.config())
        self.fit(everything)
        record.extras["val/warmup_remaining"] = float(self.remaining)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Of the update, of the fit's shuffles, and how many iterations are left."""
        return {"update": self.inner.state_dict(), "fit": self.fit.state_dict(), "remaining": self.remaining}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.inner.load_state_dict(state["update"])
        self.fit.load_state_dict(state["fit"])
        self.remaining = int(state["remaining"])
