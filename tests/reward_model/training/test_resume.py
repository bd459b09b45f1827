"""An interrupted training goes on only as the same run, from its newest intact checkpoint, and loses nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from reward_model import RewardModel, RewardModelConfig, train_reward_model
from reward_model.data.comparisons import as_comparisons
from reward_model.training.ensemble import train_ensemble
from reward_model.training.resume import training_folder
from rlhf_ppo.checkpoints import CheckpointError, FolderInUseError
from tests.reward_model.conftest import preference_rows, tiny_config
from tests.robustness.another_run import another_run_in
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

ROWS = preference_rows(130)
DATA: dict[str, Any] = {"train": ROWS[:100], "evaluation": ROWS[100:]}
SETTINGS: dict[str, Any] = {"checkpoints": 3, "log_every": 3}


class StopAt(TrainerCallback):
    """Ends training at a step as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, a run of 7 steps, and `parts.training`, the same run stopped after 6 with checkpoints of 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    train_reward_model(tiny_config(tiny_base, folder / "whole", **SETTINGS), **DATA)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(tiny_config(tiny_base, folder / "parts", **SETTINGS), **DATA, callbacks=[StopAt(6)])
    return folder


@pytest.fixture
def interrupted(runs: Path, tiny_base: Path, tmp_path: Path) -> RewardModelConfig:
    """The settings that resume a copy of the interrupted run."""
    shutil.copytree(runs / "parts.training", tmp_path / "parts.training")
    return tiny_config(tiny_base, tmp_path / "parts", resume=True, **SETTINGS)


def changed(config: RewardModelConfig, **settings: Any) -> RewardModelConfig:
    return RewardModelConfig(**(vars(config) | settings))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scores(folder: Path) -> list[float]:
    return RewardModel.from_pretrained(folder).raw_scores(["The movie was "] * 2, ["great", "awful and boring"])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_the_scores_and_the_metrics_of_an_uninterrupted_one(
    runs: Path, interrupted: RewardModelConfig
) -> None:
    """Step 5 comes again; steps 2 and 4, with checkpoints, are logged, too: no line mixes what is before and after."""
    assert [row["step"] for row in lines(training_folder(interrupted))] == [1, 2, 3, 4]
    path = train_reward_model(interrupted, **DATA).path
    assert scores(path) == scores(runs / "whole")
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 4, 6, 7]
    for found, expected in zip(lines(path), lines(runs / "whole"), strict=True):
        assert found == pytest.approx(expected)


def another_model(config: RewardModelConfig, folder: Path) -> RewardModelConfig:
    torch.manual_seed(5)
    model = tiny_gpt2()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(folder / "other")
    tiny_tokenizer(chat=True).save_pretrained(folder / "other")
    return changed(config, model=str(folder / "other"))


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (lambda config, _: config, {"train": ROWS[:99]}, "with training comparisons other than"),
        (lambda config, _: config, {"train": [*ROWS[:99], ROWS[0]]}, "with training comparisons other than"),
        (lambda config, _: config, {"train": [ROWS[0] | {"weight": 2.0}, *ROWS[1:100]]}, "with training comparisons"),
        (lambda config, _: config, {"evaluation": ROWS[101:]}, "with held-out comparisons other than"),
        (lambda config, _: changed(config, seed=1), {}, r"other settings: seed=1 \(was 0\)"),
        (lambda config, _: changed(config, batch_size=8), {}, r"other settings: batch_size=8 \(was 16\)"),
        (lambda config, _: changed(config, lora_rank=2), {}, r"lora_rank=2 \(was 0\)"),
        (lambda config, _: changed(config, append_eos=False), {}, "with a template, end-of-text rule or max_length"),
        (another_model, {}, "with a model other than"),
    ],
    ids=["fewer rows", "another row", "another weight", "held-out", "seed", "batch size", "lora", "texts", "model"],
)
def test_a_checkpoint_of_another_run_is_refused_and_stays(
    change: Callable[[RewardModelConfig, Path], RewardModelConfig], data: dict[str, Any], message: str,
    interrupted: RewardModelConfig, tmp_path: Path,
) -> None:  # fmt: skip
    before = contents(training_folder(interrupted))
    with pytest.raises(CheckpointError, match=f"checkpoint-4 was written .*{message}.*set overwrite=True"):
        train_reward_model(change(interrupted, tmp_path), **(DATA | data))
    assert contents(training_folder(interrupted)) == before


def test_other_settings_are_named(interrupted: RewardModelConfig) -> None:
    with pytest.warns(
        UserWarning, match=r"checkpoint-4 .* learning_rate=0.01 \(was 0.001\), centering=0.1 \(was 0.0\)"
    ):
        train_reward_model(changed(interrupted, learning_rate=0.01, centering=0.1), **DATA)


def test_patience_counts_on_in_a_resumed_run(tiny_base: Path, tmp_path: Path) -> None:
    """The accuracy stays: evaluations after steps 2, 4, 6, 8 and 10 count 0, 1, 2, 3 and 4."""
    settings: dict[str, Any] = {"evaluations": 10, "early_stop_patience": 4, "epochs": 3.0, "learning_rate": 1e-12}
    config = tiny_config(tiny_base, tmp_path / "rm", **(SETTINGS | settings | {"log_every": 1}))
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(config, **DATA, callbacks=[StopAt(9)])
    path = train_reward_model(changed(config, resume=True), **DATA).path
    assert lines(path)[-1]["step"] == 10


def test_early_stopping_may_begin_in_a_resumed_run(interrupted: RewardModelConfig) -> None:
    """Saving the next checkpoint ended the run with a KeyError."""
    settings = {"early_stop_patience": 100, "evaluations": 3}
    with pytest.warns(UserWarning, match="early_stop_patience=100"):
        train_reward_model(changed(interrupted, **settings), **DATA)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    name: str, runs: Path, interrupted: RewardModelConfig
) -> None:
    file = training_folder(interrupted) / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(UserWarning, match=f"checkpoint-4 cannot be used: {name} has changed since it was written"):
        path = train_reward_model(interrupted, **DATA).path
    assert scores(path) == scores(runs / "whole")


@pytest.mark.slow
def test_later_checkpoints_that_were_not_finished_are_not_taken_for_the_newest(
    runs: Path, interrupted: RewardModelConfig
) -> None:
    """Transformers keeps two: with `checkpoint-8` and `checkpoint-9` there, it would delete each new one."""
    for number in (8, 9):
        (training_folder(interrupted) / f"checkpoint-{number}").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(interrupted, **DATA, callbacks=[StopAt(7)])
    assert {path.name for path in training_folder(interrupted).glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert scores(train_reward_model(interrupted, **DATA).path) == scores(runs / "whole")


def test_damaged_checkpoints_alone_are_an_error_and_stay(interrupted: RewardModelConfig) -> None:
    for number in (2, 4):
        (training_folder(interrupted) / f"checkpoint-{number}" / "optimizer.pt").unlink()
    before = contents(training_folder(interrupted))
    with (
        pytest.warns(UserWarning, match="optimizer.pt is missing"),
        pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* can be used"),
    ):
        train_reward_model(interrupted, **DATA)
    assert contents(training_folder(interrupted)) == before


@pytest.mark.slow
def test_a_new_run_does_not_delete_what_an_interrupted_one_has_saved(
    runs: Path, interrupted: RewardModelConfig
) -> None:
    before = contents(training_folder(interrupted))
    with pytest.raises(FileExistsError, match=r"holds 2 checkpoint.*up to checkpoint-4.*resume=True"):
        train_reward_model(changed(interrupted, resume=False), **DATA)
    assert contents(training_folder(interrupted)) == before
    path = train_reward_model(changed(interrupted, resume=False, overwrite=True), **DATA).path
    assert scores(path) == scores(runs / "whole") and not training_folder(interrupted).exists()


def test_two_runs_do_not_share_a_folder(interrupted: RewardModelConfig) -> None:
    with another_run_in(training_folder(interrupted)), pytest.raises(FolderInUseError, match="another in it"):
        train_reward_model(interrupted, **DATA)
    assert (training_folder(interrupted) / "checkpoint-4").is_dir()


def test_a_finished_run_is_not_trained_again(runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "whole", tmp_path / "whole")
    before = contents(tmp_path / "whole")
    config = tiny_config(tiny_base, tmp_path / "whole", resume=True, **SETTINGS)
    found = train_reward_model(config, **DATA)
    assert found.path == tmp_path / "whole" and contents(found.path) == before and found.metrics["pairs"] == 30
    with pytest.raises(CheckpointError, match="seed=1"):
        train_reward_model(changed(config, seed=1), **DATA)
    with pytest.raises(CheckpointError, match=r"finished run with other settings: epochs=3.0 \(was 1.0\)"):
        train_reward_model(changed(config, epochs=3.0), **DATA)


@pytest.mark.slow
def test_an_interrupted_ensemble_goes_on_with_the_member_that_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    """The first member is finished, the second has a checkpoint of step 4, the third has not begun."""
    train, evaluation = as_comparisons(ROWS[:100], "train"), as_comparisons(ROWS[100:], "evaluation")
    config = tiny_config(tiny_base, tmp_path / "parts", **SETTINGS)
    for index in range(2):
        member = changed(config, seed=index, output_dir=str(tmp_path / "parts.members" / str(index)))
        if index == 0:
            first = scores(train_reward_model(member, train=train, evaluation=evaluation).path)
        else:
            with pytest.raises(KeyboardInterrupt):
                train_reward_model(member, train=train, evaluation=evaluation, callbacks=[StopAt(5)])
    with pytest.raises(FileExistsError, match=r"parts\.members holds members"):
        train_ensemble(config, 3, train, evaluation, {})
    path = train_ensemble(changed(config, resume=True), 3, train, evaluation, {}).path
    again = train_ensemble(changed(config, output_dir=str(tmp_path / "whole")), 3, train, evaluation, {}).path
    found, expected = ([scores(folder / f"member-{i}") for i in range(3)] for folder in (path, again))
    assert found == expected and found[0] == first and not (tmp_path / "parts.members").exists()
