"""Whatever a user can mend at the recipe's command line is one line that names the remedy, never a traceback."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ppo_gpt2_sentiment as recipe
import pytest
import transformers
from accelerate.state import AcceleratorState

from sentiment import command_line
from tests.recipes.tiny_world import save_classic_classifier, save_gpt2, write_reviews
from tests.support.patience import PATIENCE
from tests.support.tiny_models import tiny_gpt2, tiny_t5, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what works and what does not."""
    folder = tmp_path_factory.mktemp("world")
    save_gpt2(folder / "gpt2")
    save_gpt2(folder / "small", vocab_size=100)
    bare = tiny_tokenizer()
    bare.pad_token = bare.eos_token = None
    save_gpt2(folder / "no_pad", tokenizer=bare)
    tiny_gpt2().save_pretrained(folder / "no_tokenizer")
    tiny_t5().save_pretrained(folder / "t5")
    tiny_tokenizer().save_pretrained(folder / "t5")
    shutil.copytree(folder / "gpt2", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"no weights")
    save_classic_classifier(folder / "classifier")
    (folder / "bad_contract").mkdir()
    (folder / "bad_contract" / "reward_model.json").write_text("{")
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    write_reviews(folder / "reviews.csv")
    write_reviews(folder / "no_text.csv", text="review")
    write_reviews(folder / "few.csv", count=20)
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("text,label\n")
    (folder / "labels.csv").write_text("text,label\nA good film.,positive\n")
    (folder / "binary.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    return folder


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The recipe quietens libraries for its process; other tests want to hear them."""
    verbosity = transformers.utils.logging.get_verbosity()
    AcceleratorState._reset_state()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def arguments(world: Path, output: Path, *changes: str) -> list[str]:
    """A command line that works, with changes; a later flag overrides an earlier one."""
    return [
        "--model", f"{world}/gpt2", "--reward-model", f"{world}/classifier", "--dataset", f"{world}/reviews.csv",
        "--output-dir", str(output), "--iterations", "1", "--batch-size", "8", "--mini-batch-size", "4",
        "--new-tokens", "4", "--eval-prompts", "4", "--threads", "1", "--log-with", "None",
        *(change.format(world=world) for change in changes),
    ]  # fmt: skip


MISTAKES = {
    "wrong flag": (["--iteratons", "3"], 2, "Perhaps you meant: --iterations"),
    "no number": (["--iterations", "three"], 2, "--help"),
    "unknown tracker": (["--log-with", "paper"], 2, "'tensorboard'"),
    "missing model folder": (["--model", "{world}/missing"], 1, "There is no model folder"),
    "folder without a model": (["--model", "{world}/empty"], 1, "no config.json. Choose gpt2-small-reviews"),
    "damaged weights": (["--model", "{world}/damaged"], 1, "Choose gpt2-small-reviews"),
    "encoder-decoder": (["--model", "{world}/t5"], 1, "AutoModelForCausalLM. Choose gpt2-small-reviews"),
    "unreachable model": (["--model", "nobody/nothing"], 1, "a model of the hub if it can be reached"),
    "misspelt model": (["--model", "gpt2-small-review"], 1, "Choose gpt2-small-reviews or smollm2-135m"),
    "no pad token": (["--model", "{world}/no_pad"], 1, "Set tokenizer.pad_token to an existing token"),
    "tokenizer of another model": (["--model", "{world}/small"], 1, "Name a model saved with its own tokenizer"),
    "no tokenizer": (["--model", "{world}/no_tokenizer"], 1, "tokenizer.save_pretrained(folder)"),
    "dataset without the column": (["--dataset", "{world}/no_text.csv"], 1, "row 0 has no text"),
    "empty dataset": (["--dataset", "{world}/empty.csv"], 1, "Give a CSV file with the columns `text` and `label`"),
    "dataset of a header": (["--dataset", "{world}/header.csv"], 1, "holds no reviews"),
    "few reviews": (["--dataset", "{world}/few.csv"], 1, "Give at least 25 of each label"),
    "labels in words": (["--dataset", "{world}/labels.csv"], 1, "Labels must be 0 (negative) or 1 (positive)"),
    "dataset that is no text": (["--dataset", "{world}/binary.csv"], 1, "no CSV file in UTF-8"),
    "missing dataset": (["--dataset", "{world}/missing.csv"], 1, "There is no file of reviews"),
    "unreachable dataset": (["--dataset", "nobody/nothing"], 1, "a dataset within reach"),
    "missing reward model": (["--reward-model", "{world}/missing"], 1, "no such folder. Choose `train`"),
    "misspelt reward model": (["--reward-model", "trian"], 1, "Choose `train`"),
    "unreachable reward model": (["--reward-model", "nobody/nothing"], 1, "Choose `train`"),
    "reward model without a head": (["--reward-model", "{world}/gpt2"], 1, "Choose `train`"),
    "damaged reward model": (["--reward-model", "{world}/bad_contract"], 1, "Restore it or train the model again"),
    "run folder that is a file": (["--output-dir", "{world}/file"], 1, "choose another --output-dir"),
    "batch that does not divide": (["--batch-size", "10"], 1, "--mini-batch-size that divide"),
    "negative iterations": (["--iterations", "-1"], 1, "iterations must be at least 1, got -1"),
    "no iterations": (["--iterations", "0"], 1, "iterations must be at least 1, got 0"),
    "learning rate that is no number": (["--learning-rate", "nan"], 1, "learning_rate must be positive and finite"),
    "negative KL coefficient": (["--kl-coef", "-1"], 1, "kl_coef must be at least 0"),
    "no KL target": (["--kl-target", "0"], 1, "kl_target must be positive"),
    "no responses": (["--new-tokens", "0"], 2, "new_tokens must be at least 1"),
    "responses beyond the positions": (["--new-tokens", "500"], 1, "lower max_new_tokens"),
    "more prompts than reviews": (["--eval-prompts", "5000"], 1, "lower --eval-prompts"),
    "no threads": (["--threads", "0"], 1, "At least one thread is needed"),
    "negative seed": (["--seed", "-1"], 2, "seed must be at least 0"),
}


@pytest.mark.parametrize(("changes", "status", "remedy"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_naming_the_remedy(
    world: Path, tmp_path: Path, changes: list[str], status: int, remedy: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["recipes/ppo_gpt2_sentiment.py", *arguments(world, tmp_path / "run", *changes)])
    with pytest.raises(SystemExit) as stop:
        command_line.run(recipe.main, recipe.Config, recipe.__doc__)
    said = capsys.readouterr()
    assert stop.value.code == status
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert remedy in said.err
    assert "Traceback" not in said.out + said.err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_the_real_command_line_shows_the_same_line_and_status(tmp_path: Path) -> None:
    """One process of its own: what the shell sees."""
    command = [sys.executable, "recipes/ppo_gpt2_sentiment.py", "--model", str(tmp_path / "missing")]
    options = ["--output-dir", str(tmp_path / "run"), "--threads", "1", "--dataset"]
    reviews = write_reviews(tmp_path / "reviews.csv")
    result = subprocess.run(
        [*command, *options, str(reviews)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 1
    assert result.stdout == "[1/5] language model (0 s)\n"
    assert result.stderr.startswith(f"error: There is no model folder {tmp_path / 'missing'}. Choose ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_training_is_one_line_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments(world, tmp_path / "run")])
    monkeypatch.setattr(recipe, "load_judges", interrupted)
    with pytest.raises(SystemExit) as stop:
        command_line.run(recipe.main, recipe.Config, None)
    assert stop.value.code == 75 and signal.getsignal(number) is before
    said = "Finished phases and what this one has saved are kept; the same command goes on."
    assert capsys.readouterr().err == f"Stopped by {signal.Signals(number).name}. {said}\n"
