"""The commands of reward models: mistakes in one line, and which process works."""

import runpy
import sys

import pytest


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", ["score", "evaluate", "serve", "preview", "adopt"])
def test_of_several_processes_the_first_alone_works(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under `accelerate launch` each row would be printed once for each process."""
    monkeypatch.setattr(sys, "argv", [name, "--nonsense"])
    monkeypatch.setenv("RANK", "1")
    runpy.run_module(f"reward_model.{name}", run_name="__main__")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        runpy.run_module(f"reward_model.{name}", run_name="__main__")
    assert capsys.readouterr().err.startswith("error: ")


def test_a_misspelled_flag_is_named_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    from reward_model.train import main

    with pytest.raises(SystemExit):
        main(["--data", "x.jsonl", "--model", "gpt2", "--output_dir", "o", "--learning_rat", "1"])
    assert (
        "--learning_rat 1 (did you mean --learning_rate?). python -m reward_model.train --help"
        in capsys.readouterr().err
    )
