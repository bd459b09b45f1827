"""A resumed run goes on in the tracker's run that it began."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import accelerate.tracking
import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ppo import PPOConfig, PPOTrainer
from rlhf_ppo.learner.trackers import Trackers
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.tiny_run import TEXTS, config, share_of_e, trainer


@pytest.mark.parametrize(("tracker", "name"), [("wandb", "id"), ("trackio", "name")])
def test_a_tracked_run_is_saved_and_given_back_on_resume(tracker: str, name: str) -> None:
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.is_main_process = True
    accelerator.get_tracker.return_value = SimpleNamespace(**{name: "run-1"})
    settings = PPOConfig(log_with=tracker, tracker_kwargs={tracker: {"entity": "me"}})
    first = Trackers(accelerator, settings)
    first.begin()
    first.begin()
    assert accelerator.init_trackers.call_count == 1
    assert accelerator.init_trackers.call_args.kwargs["init_kwargs"] == {tracker: {"entity": "me"}}
    first.step = 7
    second = Trackers(accelerator, settings)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"wandb": None, "trackio": None, "step": 7, tracker: "run-1"}  # before it has begun
    second.begin()
    expected = {tracker: {"entity": "me", "resume": "allow", name: "run-1"}}
    assert accelerator.init_trackers.call_args.kwargs["init_kwargs"] == expected


def test_a_saved_run_that_a_tracker_in_use_cannot_continue_is_told() -> None:
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.is_main_process = True
    accelerator.get_tracker.return_value = SimpleNamespace(id="run-2")
    trackers = Trackers(accelerator, PPOConfig(log_with="wandb"))
    trackers.begin()
    trackers.load_state_dict({"wandb": "run-2", "trackio": None, "step": 7})  # its own: no warning
    with pytest.warns(UserWarning, match="The wandb run 'run-1' of the checkpoint is not continued"):
        trackers.load_state_dict({"wandb": "run-1", "trackio": None, "step": 7})


@pytest.mark.parametrize(
    ("tracker", "own_rows", "step"),
    [("mlflow", False, 3), ("comet_ml", True, 3), ("wandb", True, 3), ("wandb", False, None)],
)
def test_only_weights_and_biases_counts_the_rows_of_a_script_itself(
    tracker: str, own_rows: bool, step: int | None
) -> None:
    """MLflow takes a row without a step for one of step 0."""
    accelerator = create_autospec(Accelerator, instance=True)
    Trackers(accelerator, PPOConfig(log_with=tracker)).log({"objective/kl": 1.0}, 3, own_rows=own_rows)
    assert accelerator.log.call_args.kwargs == {"step": step}


def test_settings_that_no_tracker_would_read_and_a_missing_folder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tracker_kwargs=\{'tensorboard': \{'flush_secs'"):
        trainer(log_with="tensorboard", project_kwargs={"logging_dir": "logs"}, tracker_kwargs={"flush_secs": 1})
    with pytest.raises(ValueError, match=r"project_kwargs=.*logging_dir"):
        trainer(log_with="tensorboard")


def test_the_folder_may_be_among_the_arguments_of_accelerate_as_up_to_trl_0_4(tmp_path: Path) -> None:
    settings = {"logging_dir": str(tmp_path), "cpu": True}
    own = trainer(log_with="tensorboard", accelerator_kwargs=settings)
    own.log_stats({"objective/kl": 1.0}, {"query": [], "response": []}, [torch.tensor(1.0)])
    own.accelerator.end_training()
    assert list(tmp_path.rglob("events*")) and "logging_dir" in settings


@pytest.mark.parametrize(
    ("log_with", "message"),
    [("trackio", "needs a package that is not installed here.*`pip install trackio`"), ("tensorbord", "one of")],
)
def test_a_tracker_that_cannot_log_is_refused(log_with: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate drops a tracker whose package is missing, and says so at the level of debugging alone."""
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["tensorboard"])
    with pytest.raises(ValueError, match=message):
        trainer(log_with=log_with)


def without_dataset(**settings: Any) -> PPOTrainer:
    """A trainer whose prompts are passed to `train()`."""
    like = trainer(**settings)
    return PPOTrainer(like.config, like.model, tokenizer=like.tokenizer)


@pytest.mark.parametrize("build", [trainer, without_dataset])
def test_tensorboard_shows_each_iteration_of_a_resumed_run_once(
    build: Callable[..., PPOTrainer], tmp_path: Path
) -> None:
    """The first part logs iteration 3 without saving it; the second logs it again."""

    def run(iterations: int, save_every: int) -> None:
        own = build(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path / "tracked")})
        prompts = PromptDataset.from_texts(TEXTS, own.tokenizer)
        settings = config(tmp_path / "run", iterations=iterations, save_every=save_every)
        own.train(share_of_e, settings, prompts=prompts)
        own.accelerator.end_training()

    run(3, save_every=2)
    for path in (tmp_path / "run").glob("checkpoint-3"):
        path.rename(tmp_path / "away")
    for path in (tmp_path / "tracked" / "rlhf_ppo").glob("events*"):
        path.rename(path.with_name("0.tfevents"))  # files are read by name, which need not be their order in one second
    run(4, save_every=2)
    events = EventAccumulator(str(tmp_path / "tracked" / "rlhf_ppo"))
    events.Reload()
    assert [event.step for event in events.Scalars("objective/kl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("use", ["log", "get_tracker", "generate"])
def test_a_loop_without_a_dataset_finds_its_tracker_begun(use: str, tmp_path: Path) -> None:
    """`train()` may have to restore which run the tracker continues; a loop of the user's own may log at once."""
    own = without_dataset(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    assert own.accelerator.trackers == []
    calls = {
        "log": lambda: own.accelerator.log({"loss": 1.0}, step=1),
        "get_tracker": lambda: own.accelerator.get_tracker("tensorboard", unwrap=True).add_scalar("loss", 1.0, 1),
        "generate": lambda: own.generate(torch.tensor([5, 6]), max_new_tokens=1),
    }
    calls[use]()
    assert len(own.accelerator.trackers) == 1
    own.accelerator.end_training()
