"""The commands of reward models: mistakes in one line, and which process works."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from reward_model.preview import main as preview
from reward_model.train import main as train


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


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("precision: fp16", "precision must be one of 'auto', 'float32', 'bfloat16', got 'fp16'"),
        ("batch_size: 4.0", "batch_size must be a whole number, got 4.0"),
        ("epochs: [1]", "epochs must be a number, got"),
    ],
)
def test_a_setting_of_a_file_is_checked_as_that_of_a_flag(setting: str, message: str, tmp_path: Path) -> None:
    """Such a precision trained in float32, without a word."""
    (tmp_path / "run.yaml").write_text(f"data: x.jsonl\nmodel: gpt2\noutput_dir: o\nlearning_rate: 1e-4\n{setting}\n")
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        train(["--config", str(tmp_path / "run.yaml")])


def test_columns_of_a_file_may_be_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a?", "better": "yes", "worse": "no"}\n')
    mapping = "{prompt: question, chosen: better, rejected: worse}"
    (tmp_path / "run.yaml").write_text(f"data: {tmp_path}/rows.jsonl\ncolumns: {mapping}\n")
    assert preview(["--config", str(tmp_path / "run.yaml")]).report.comparisons == 1


def test_a_misspelled_flag_is_named_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(["--data", "x.jsonl", "--model", "gpt2", "--output_dir", "o", "--learning_rat", "1"])
    assert (
        "--learning_rat 1 (did you mean --learning_rate?). python -m reward_model.train --help"
        in capsys.readouterr().err
    )
