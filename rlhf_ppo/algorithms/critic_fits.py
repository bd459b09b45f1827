"""Further updates of the critic alone after each update of the policy."""

from typing import Any

from accelerate import Accelerator

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.updates import CriticFit, Update, UpdateRecord
from rlhf_ppo.updates.sharding import all_gather_batch


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
