"""The order in which an update visits its rows: seeded, equal on all processes, resumable; and what else it carries."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Shuffle:
    """Seeded permutations of row numbers.

    Args:
        seed: The same on all processes: they must draw the same minibatches.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.RandomState(seed)

    def __call__(self, rows: int, device: torch.device) -> Tensor:
        """The next permutation of `rows` numbers, Long [rows]."""
        return torch.as_tensor(self._rng.permutation(rows), device=device)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence of permutations stands."""
        state: Any = self._rng.get_state(legacy=False)
        return {"keys": [int(key) for key in state["state"]["key"]], "position": int(state["state"]["pos"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._rng.set_state(("MT19937", np.asarray(state["keys"], dtype=np.uint32), state["position"], 0, 0.0))


class UpdateState:
    """What an update carries from one call to the next: the order of rows, and steps in a row that were not finite.

    Args:
        seed: Of the order. The same on all processes.
    """

    def __init__(self, seed: int) -> None:
        self.shuffle = Shuffle(seed)
        self.skips_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to draw the same rows."""
        return {**self.shuffle.state_dict(), "skips_in_a_row": self.skips_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.shuffle.load_state_dict(state)
        self.skips_in_a_row = int(state["skips_in_a_row"])
