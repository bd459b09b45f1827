"""A few kills of the campaign on every run; the whole of it is `python -m tests.robustness.kill_campaign`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """In a process of its own: one in which autograd has run cannot be forked."""
    results = tmp_path / "kills.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.robustness.kill_campaign", "--kills", "5", "--results", str(results)],
        cwd=ROOT, env=environment, check=True, timeout=PATIENCE,
    )  # fmt: skip
    found = json.loads(results.read_text())
    assert found["kills"] >= 5
    assert (found["unreadable"], found["lost"], found["equal"]) == (0, 0, found["runs"])
