"""Two processes play and learn what one does, although their episodes have unequal numbers of turns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.distributed import episodes
from tests.distributed.launching import torchrun

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes wrote what they ended with."""
    path = tmp_path_factory.mktemp("episodes")
    torchrun(2, Path(episodes.__file__), str(path))
    return path


def outcomes(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("kind", "environment"), [("equal", episodes.Unequal), ("segments", episodes.Rewritten)])
def test_two_processes_learn_from_the_same_episodes_what_one_does(kind: str, environment: Any, folder: Path) -> None:
    alone: Any = episodes.run(processes=1, environment=environment)
    for together in outcomes(folder, kind):
        for name, weight in alone["weights"].items():
            assert_close(together["weights"][name], weight, atol=1e-5, rtol=1e-5)
        for name in ("env/reward_mean", "env/turns", "env/segments", "env/left", "env/sampled_tokens", "env/failed"):
            assert together["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-5), name
        assert together["measures"].keys() == alone["measures"].keys()
        for name, values in alone["measures"].items():
            assert together["measures"][name] == pytest.approx(values, abs=1e-4), name


def test_a_sampler_that_all_processes_must_call_together_does_not_hang(folder: Path) -> None:
    """A process whose episodes are over goes on calling it until all are."""
    equal, collective = outcomes(folder, "equal")[0], outcomes(folder, "collective")[0]
    for name, weight in equal["weights"].items():
        assert_close(collective["weights"][name], weight, atol=1e-5, rtol=1e-5)


def test_a_process_whose_environments_all_fail_learns_from_the_others_episodes(folder: Path) -> None:
    first, second = outcomes(folder, "failing")
    assert first["metrics"]["env/failed"] == episodes.EPISODES // 2
    assert len(first["measures"]["judge"]) == episodes.EPISODES // 2  # the evaluation is of the others', too
    assert first["measures"] == second["measures"]
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight)
