"""The recipe killed in each of its phases, by a signal and by SIGKILL; and what it prints, where nobody watches."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.killed_demo import KILLED_AT
from tests.support.patience import PATIENCE

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'recipes'}", "NO_COLOR": "1"}


def run_demos(folder: Path, *kills: str) -> Path:
    """`folder`, where an undisturbed run and one for each of these signals has been."""
    command = [sys.executable, "-m", "tests.recipes.killed_demo", str(folder), *kills]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=PATIENCE)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_demos(tmp_path_factory.mktemp("killed"), "SIGTERM", "SIGKILL")


@pytest.fixture(scope="module")
def found(world: Path) -> dict[str, Any]:
    """What came of them."""
    return dict(json.loads((world / "found.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGKILL", -9)])
def test_a_run_killed_in_each_phase_ends_like_an_undisturbed_one(found: dict[str, Any], name: str, status: int) -> None:
    whole, killed = found["undisturbed"], found[name]
    assert whole["statuses"] == [0] and killed["statuses"] == [status] * 5 + [0]
    for what in ("weights", "metrics", "evaluation", "samples"):
        assert killed[what] == whole[what], what


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_at_most_five_percent_of_a_phase_are_repeated(found: dict[str, Any], name: str) -> None:
    """Counted in steps that were begun; the step that was killed is among those."""
    whole, killed = found["undisturbed"]["counts"], found[name]["counts"]
    assert set(whole) == set(killed) == set(KILLED_AT)
    for phase, steps in whole.items():
        assert steps >= 20
        assert killed[phase] - steps <= max(1, 0.05 * steps), phase


@pytest.mark.slow
def test_a_signal_says_in_a_line_what_is_kept(world: Path, found: dict[str, Any]) -> None:
    """Numbers of steps from when the signals were sent: the step that begins is finished."""
    steps = found["undisturbed"]["counts"]
    lines = [line for line in (world / "SIGTERM.err").read_text().splitlines() if line.startswith("Stopped by")]
    other = "Stopped by SIGTERM. Finished phases and what this one has saved are kept; the same command goes on."
    kept = "which is kept; the same command goes on."
    assert lines == [
        f"Stopped by SIGTERM after step {KILLED_AT['1']} of {steps['1']} of the language model, {kept}",
        f"Stopped by SIGTERM after step {KILLED_AT['2']} of {steps['2']} of the reward model, {kept}",
        other,
        f"Stopped by SIGTERM after {KILLED_AT['4']} of 20 iterations, checkpoint written; the same command goes on.",
        other,
    ]


@pytest.mark.slow
def test_nothing_is_printed_that_is_not_ours_and_bars_are_lines(tmp_path: Path) -> None:
    world = run_demos(tmp_path)
    said = (world / "undisturbed.out").read_text().splitlines()
    ours = (
        r"\[[1-5]/5\] [a-zA-Z ,-]+ \(\d+ s\)", r"held-out pair accuracy 0\.\d+", r"[\d,]+ of [\d,]+ parameters are .*",
        r"second classifier: .*", r"precision: .*", r"score -?[\d.]+ ± .*", r"20 iterations",
        r"model: .*", r"report: .*/report\.html",
    )  # fmt: skip
    assert [line for line in said if not any(re.fullmatch(pattern, line) for pattern in ours)] == []
    assert [line[:6] for line in said if line.startswith("[")] == [f"[{number}/5] " for number in range(1, 6)]
    bars = (world / "undisturbed.err").read_text()
    assert "\r" not in bars and "\x1b" not in bars
    names = [re.fullmatch(r"(.+): \d+ of \d+ (step|it) in [\d:]+, .*", line) for line in bars.splitlines()]
    assert {match[1] for match in names if match} == {"Language model", "Reward model", "PPO"}
    assert all(names)
