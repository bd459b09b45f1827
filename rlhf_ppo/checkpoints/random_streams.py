"""The random states of a process, of all libraries: saved, restored, or reseeded."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomStreams:
    """The random states of torch, CUDA, NumPy and Python, and the generator of the sampler.

    Args:
        sampler: Generator that samples the responses.
    """

    sampler: torch.Generator

    def state_dict(self) -> dict[str, Any]:
        """The states of all generators."""
        numpy_state: Any = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (numpy_state[0], torch.as_tensor(numpy_state[1].astype(np.int64)), *numpy_state[2:]),
            "python": random.getstate(),
            "sampler": self.sampler.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all generators; the states are first tried on spare generators, so that it is all or none."""
        name, keys, *rest = state["numpy"]
        numpy_state = (name, keys.numpy().astype(np.uint32), *rest)
        version, internal, gauss = state["python"]
        python_state = (version, tuple(internal), gauss)
        np.random.RandomState().set_state(numpy_state)
        random.Random().setstate(python_state)
        for tensor in (state["torch"], state["sampler"]):
            torch.Generator().set_state(tensor)
        torch.set_rng_state(state["torch"])
        self.sampler.set_state(state["sampler"])
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])

    def restart(self, *key: int) -> None:
        """Reseed all generators from `key` alone, such as (seed, iteration, process)."""
        first, second, third, fourth = (int(word) for word in np.random.SeedSequence(key).generate_state(4))
        torch.manual_seed(first)  # of every device
        self.sampler.manual_seed(second)
        np.random.seed(third)
        random.seed(fourth)
