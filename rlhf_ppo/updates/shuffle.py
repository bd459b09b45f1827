"""Seeded, resumable row order, equal on all processes; and the saved state of an update."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Shuffle:
    """Seeded permutations of row indices.

    Args:
        seed: The same on all processes, which must take the same minibatches.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.RandomState(seed)

    def __call__(self, rows: int, device: torch.device) -> Tensor:
        """The next permutation of 0 ... rows - 1, Long [rows]."""
        return torch.as_tensor(self._rng.permutation(rows), device=device)

    def state_dict(self) -> dict[str, Any]:
        state: Any = self._rng.get_state(legacy=False)
        return {"keys": [int(key) for key in state["state"]["key"]], "position": int(state["state"]["pos"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.set_state(("MT19937", np.asarray(state["keys"], dtype=np.uint32), state["position"], 0, 0.0))


class UpdateState:
    """State of an update between calls: the row order, and the number of consecutive non-finite steps."""

    def __init__(self, seed: int) -> None:
        self.shuffle = Shuffle(seed)
        self.skips_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """State from which a resumed run takes the same rows."""
        return {**self.shuffle.state_dict(), "skips_in_a_row": self.skips_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shuffle.load_state_dict(state)
        self.skips_in_a_row = int(state["skips_in_a_row"])
