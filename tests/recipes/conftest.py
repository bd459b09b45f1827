"""What the sentiment recipe reads, made once for all tests that only look at it."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.recipes.tiny_world import save_gpt2, save_reward_model, write_reviews


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews, a policy and a reward model."""
    folder = tmp_path_factory.mktemp("world")
    write_reviews(folder / "reviews.csv")
    save_reward_model(folder / "reward_model", save_gpt2(folder / "gpt2"))
    AcceleratorState._reset_state()  # a process of its own would have trained it
    return folder
