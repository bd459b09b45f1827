"""Flags of a configuration: spellings, values, repeated flags, and the help from the docstrings."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from rlhf_ppo.utils.flags import FlagParser, add_flags


@dataclass(frozen=True, kw_only=True)
class Base:
    """Fields that are inherited."""

    data: list[str]
    """Files; one or several."""


@dataclass(frozen=True, kw_only=True)
class Settings(Base):
    """One field of each kind."""

    learning_rate: float = 1e-5
    """Step size, 5 % of the best. Anything after the first sentence is for the page."""
    rank: int | None = None
    """Rank."""
    is_packed: bool = True
    """Whether rows are packed."""
    loss: Literal["mean", "sum"] = "mean"
    """Reduction: mean or sum."""
    names: list[str] = field(default_factory=list)
    """Names."""


def parser(**options: Any) -> FlagParser:
    """A parser of `Settings`."""
    made = FlagParser("p", None, epilog="")
    add_flags(made, Settings, **options)
    return made


def test_flags_are_read_in_both_spellings_and_lists_may_be_repeated() -> None:
    line = [
        "--data",
        "a",
        "b",
        "--data",
        "c",
        "--learning-rate",
        "2e-4",
        "--rank",
        "3",
        "--no_is_packed",
        "--loss",
        "sum",
    ]
    assert vars(parser().parse_args(line)) == {
        "data": ["a", "b", "c"], "learning_rate": 2e-4, "rank": 3, "is_packed": False, "loss": "sum", "names": [],
    }  # fmt: skip
    for words in ("--is_packed false", "--is-packed=no", "--no-is-packed"):
        assert parser().parse_args(["--data", "a", *words.split()]).is_packed is False
    assert vars(parser(overriding=True).parse_args(["--rank", "1", "--no-is-packed"])) == {
        "rank": 1,
        "is_packed": False,
    }


@pytest.mark.parametrize("line", [[], ["--data", "a", "--is_packed", "perhaps"], ["--data", "a", "--loss", "max"]])
def test_values_that_a_field_does_not_take_are_refused_in_a_line(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(line)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_the_help_of_a_flag_is_the_first_point_of_the_docstring_with_the_default() -> None:
    shown = " ".join(parser(hidden=["rank"], overriding=True).format_help().split())
    assert "--data STR ... Files --learning-rate FLOAT Step size, 5 % of the best (1e-05) --is-packed" in shown
    assert "--loss {mean,sum} Reduction: mean or sum (mean) --names" in shown and "--rank" not in shown
