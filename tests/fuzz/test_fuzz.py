"""A few hundred cases of the fuzzing campaign on every run; the whole of it is `python -m tests.fuzz.campaign`."""

from pathlib import Path

import hypothesis.strategies as st
import jaxtyping
import pytest

from tests.fuzz import checkpoint_cases, config_cases, dataset_cases, step_cases
from tests.fuzz.campaign import add
from tests.fuzz.harness import Tally, Target, run_batch

CASES = 80
TARGETS = {"step": step_cases, "config": config_cases, "dataset": dataset_cases, "checkpoint": checkpoint_cases}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "checkpoint" else ()) for name in TARGETS]
)
def test_no_case_ends_in_a_bare_error_or_in_a_refusal_that_changed_something(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user runs without type checks
    target: Target = TARGETS[name].target(tmp_path)
    tally = run_batch(target, 10_000_000, CASES)
    assert tally.cases >= CASES
    assert tally.refused > CASES / 4
    assert not tally.findings, tally.examples


def test_the_harness_tells_our_words_from_pythons_and_a_refusal_from_a_change() -> None:
    """What the campaign counts as a finding is found when it is there."""

    def attempt(case: int) -> None:
        if case == 0:
            raise ValueError("'<' not supported between instances of 'str' and 'int'")
        if case == 1:
            raise KeyError("score")
        raise ValueError("expected a small number, got a large one: it would overflow. Scale it down.")

    target = Target(cases=st.sampled_from([0, 1, 2]), attempt=attempt, unchanged=lambda: False)
    found = " ".join(run_batch(target, 0, 30).findings)
    for kind in ("not our words: ValueError", "unexpected: KeyError", "changed by a refused call: ValueError"):
        assert kind in found


def test_the_campaign_adds_batches_up_and_goes_on_where_it_stopped() -> None:
    row: dict[str, object] = {}
    for _ in range(2):
        tally = Tally(cases=5, refused=3, accepted=1, seconds=0.5, longest_ms=7.0)
        tally.findings["x"] += 1
        add(row, tally)
    assert row["batches"] == 2
    assert (row["cases"], row["refused"], row["accepted"], row["cpu_seconds"]) == (10, 6, 2, 1.0)
    assert row["findings"] == {"x": 2}


@pytest.mark.slow
def test_damaged_checkpoints_are_refused_or_passed_over_and_some_of_each(tmp_path: Path) -> None:
    """A campaign in which every case ends alike would look at one branch only."""
    tally = run_batch(checkpoint_cases.target(tmp_path), 10_000_001, 60)
    assert {"the newest", "the one before"} <= set(tally.outcomes)
    assert tally.refused > 10
