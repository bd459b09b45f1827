"""A baseline that remembers earlier batches."""

from typing import Any

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.updates import Update, UpdateRecord


class MovingBaseline:
    """An exponential moving mean of returns.

        b ← decay · b + (1 - decay) · mean

    A batch is measured against earlier ones, on which its actions have no influence: no bias. The first batch, before
    which there is nothing, is measured against its own mean.

    Args:
        decay: Share of the old mean that stays.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean: float | None = None

    def swap(self, mean: float) -> float:
        """The baseline of a batch whose mean return is `mean`, which is then taken in."""
        before = mean if self.mean is None else self.mean
        self.mean = self.decay * before + (1 - self.decay) * mean
        return before


class UpdateWithBaseline:
    """An update that saves a moving baseline with its own state.

    Args:
        update: What moves the parameters.
        moving: The baseline of its advantages.
    """

    def __init__(self, update: Update, moving: MovingBaseline) -> None:
        self.inner = update
        self.moving = moving

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """The update, with the baseline reported."""
        record = self.inner(batch)
        record.extras["policy/baseline"] = self.moving.mean or 0.0
        return record

    def state_dict(self) -> dict[str, Any]:
        """Of the update and of the baseline."""
        return {"update": self.inner.state_dict(), "baseline": self.moving.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.inner.load_state_dict(state["update"])
        self.moving.mean = state["baseline"]
