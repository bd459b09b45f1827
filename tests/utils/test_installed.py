"""Arguments are chosen by what the installed version takes."""

from dataclasses import dataclass
from typing import Any

import pytest

from rlhf_ppo.utils.installed import accepts_argument, parameter_name


@dataclass
class Today:
    page: int = 1


@dataclass
class Before:
    block: int = 1


def anything(**kwargs: Any) -> None: ...


def test_a_field_of_a_dataclass_is_an_argument_and_a_catch_all_is_none() -> None:
    assert accepts_argument(Today, "page") and not accepts_argument(Today, "block")
    assert not accepts_argument(anything, "page")


@pytest.mark.parametrize(("settings", "expected"), [(Today, "page"), (Before, "block")])
def test_the_first_spelling_that_is_taken_is_chosen(settings: type, expected: str) -> None:
    assert parameter_name(settings, "page", "block") == expected


def test_an_argument_that_no_spelling_names_is_an_error_that_says_what_is_taken() -> None:
    with pytest.raises(TypeError, match=r"test_installed.Today to take one of sheet, leaf, got .* takes page:"):
        parameter_name(Today, "sheet", "leaf")
