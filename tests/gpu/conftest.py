"""One pretended GPU for each test."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState

from tests.support.pretend_cuda import Counts, pretend_cuda


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """A pretended CUDA device, and what it counts."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(True)
    with pretend_cuda() as counts:
        yield counts
    AcceleratorState._reset_state(True)
