"""Where a script overrides an inner method, several processes average their gradients, as in the classic."""

from pathlib import Path

import pytest
import torch

from rlhf_ppo import PPOTrainer
from tests.distributed.launching import torchrun
from tests.distributed.overrides import step

pytestmark = pytest.mark.distributed


def test_two_processes_with_an_override_take_the_step_of_one_without(tmp_path: Path) -> None:
    """Both have as many tokens, so that the mean of their means is the mean over all."""
    torchrun(2, Path(__file__).with_name("overrides.py"), str(tmp_path))
    (first, second), skewed = (
        [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)] for name in ("CallsSuper", "Skewed")
    )
    assert torch.equal(first, second)
    assert torch.equal(*skewed)  # the mean ratio of both, 6.5, is within the threshold of 10
    assert torch.allclose(first, step(PPOTrainer, slice(None), 4), atol=2e-6)
