"""What one process refuses, all refuse: nobody waits for the others, nothing moves, and the next good step works."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ppo.replay import replay
from tests.distributed.launching import torchrun

pytestmark = pytest.mark.distributed


def test_a_refusal_on_one_process_is_a_refusal_on_all_and_nothing_moves(tmp_path: Path) -> None:
    torchrun(2, Path(__file__).with_name("refusals.py"), str(tmp_path))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    start = told[0]["start, weights"]
    for name in ("nan on process 1", "reward fails on process 1"):
        assert "accepted" not in (told[0][name], told[1][name]), name
    assert "process 1: ValueError: scores[0] must be finite" in told[0]["nan on process 1"]
    assert told[1]["nan on process 1"].startswith("ValueError: scores[0] must be finite")
    assert "process 1: RewardSourceError" in told[0]["reward fails on process 1"]
    for rank in (0, 1):
        assert told[rank]["overflow on process 1, first"] == "accepted", "skipped and counted, not raised"
        assert told[rank]["overflow on process 1, second"].startswith("NonFiniteUpdateError: ")
        unmoved = [
            value
            for name, value in told[rank].items()
            if name.endswith("weights") and not name.startswith(("good", "reward drops", "asked"))
        ]
        assert set(unmoved) == {start}, "no process moved"
        assert told[rank]["good"] == "accepted"
        assert told[rank]["reward drops on process 1"] == "accepted", "the rows of process 0 are left"
        assert told[rank]["good, weights"] == told[0]["good, weights"] != start
    check_asked_once(told)
    found = replay(tmp_path / "dump-0")
    assert found.is_reproduced, "one process computes what two refused"


def check_asked_once(told: list[dict[str, Any]]) -> None:
    """One of two processes asks about the prompts of both; both learn, or both are told the same."""
    assert told[1]["asked"] == told[1]["patient"] == []
    (prompts,) = told[0]["asked"]
    assert sorted(prompts) == ["I", "The movie", "This", "We"], "each prompt of the rollout, once"
    assert len(told[0]["patient"]) == 2, "asked again after a failure"
    assert told[0]["asked once, nonsense"] == told[1]["asked once, nonsense"] != "accepted"
    assert "returned str for sample 0" in told[1]["asked once, nonsense"]
    assert told[0]["asked once, dropped"] == told[1]["asked once, dropped"]
    assert "3 rollouts in a row" in told[1]["asked once, dropped"]
    for name in ("asked once", "asked once, in vain at first"):
        assert told[0][name] == told[1][name] == "accepted"
        assert told[0][f"{name}, weights"] == told[1][f"{name}, weights"] != told[0]["good, weights"]
