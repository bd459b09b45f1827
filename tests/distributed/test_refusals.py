"""What one process refuses, all refuse: nobody waits for the others, nothing moves, and the next good step works."""

from __future__ import annotations

import json
from pathlib import Path

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
            if name.endswith("weights") and not name.startswith(("good", "reward drops"))
        ]
        assert set(unmoved) == {start}, "no process moved"
        assert told[rank]["good"] == "accepted"
        assert told[rank]["reward drops on process 1"] == "accepted", "the rows of process 0 are left"
        assert told[rank]["good, weights"] == told[0]["good, weights"] != start
    found = replay(tmp_path / "dump-0")
    assert found.is_reproduced, "one process computes what two refused"
