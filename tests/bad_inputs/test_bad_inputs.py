"""Every named bad input is refused in our words, changes nothing, and stands in the documentation."""

from typing import Any

import jaxtyping
import pytest
import torch

from tests.bad_inputs.cases import CASES, Case, trainer
from tests.bad_inputs.table import PAGE, page
from tests.fuzz.harness import PYTHONS_OWN_WORDS


@pytest.fixture(autouse=True)
def _as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user runs without type checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def state() -> tuple[Any, ...]:
    own = trainer()
    return [value.clone() for value in own.model.parameters()], own.kl_ctl.value, len(own.optimizer.state)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.area}: {case.name}" for case in CASES])
def test_a_bad_input_is_refused_in_our_words_and_changes_nothing(case: Case) -> None:
    before = state()
    message = case.message()
    assert not PYTHONS_OWN_WORDS.search(message), message
    assert len(message) > 40, f"says too little: {message}"
    after = state()
    assert all(map(torch.equal, before[0], after[0]))
    assert before[1:] == after[1:]


def test_the_table_is_long_enough_and_each_input_is_named_once() -> None:
    names = [(case.area, case.name) for case in CASES]
    assert len(set(names)) == len(names) >= 60


def test_the_documented_table_is_what_the_calls_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python -m tests.bad_inputs.table"
