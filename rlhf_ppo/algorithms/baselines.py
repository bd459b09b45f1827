"""Exponential moving mean of returns as a baseline, and the update that saves it."""

from typing import Any

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.updates import Update, UpdateRecord


class MovingBaseline:
    """Exponential moving mean of batch returns.

        b ← decay · b + (1 - decay) · mean

    The baseline of a batch comes from earlier batches, so it adds no bias. The first batch gets its own mean.

    Args:
        decay: Weight of the old mean, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean: float | None = None

    def update(self, mean: float) -> float:
        """Return the baseline of a batch with mean return `mean`, then update the moving mean with it."""
        before = mean if self.mean is None else self.mean
        self.mean = self.decay * before + (1 - self.decay) * mean
        return before


class UpdateWithBaseline:
    """Wraps an update: reports a moving baseline and saves it with the update's state."""

    def __init__(self, update: Update, moving: MovingBaseline) -> None:
        self.inner = update
        self.moving = moving

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """Run the update and add `policy/baseline` to its record."""
        record = self.inner(batch)
        record.extras["policy/baseline"] = self.moving.mean or 0.0
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.inner.state_dict(), "baseline": self.moving.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["update"])
        self.moving.mean = state["baseline"]
