"""A resumed run goes on in the tracker's run that it began."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ppo import PPOConfig
from rlhf_ppo.learner.trackers import Trackers
from tests.support.tiny_run import config, share_of_e, trainer


def test_the_id_of_a_tracked_run_is_saved_and_given_back_on_resume() -> None:
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.is_main_process = True
    accelerator.get_tracker.return_value = SimpleNamespace(id="run-1")
    settings = PPOConfig(log_with="wandb", tracker_kwargs={"wandb": {"entity": "me"}})
    first = Trackers(accelerator, settings)
    first.begin()
    first.begin()
    assert accelerator.init_trackers.call_count == 1
    assert accelerator.init_trackers.call_args.kwargs["init_kwargs"] == {"wandb": {"entity": "me"}}
    first.step = 7
    second = Trackers(accelerator, settings)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"wandb": "run-1", "step": 7}  # also before it has begun
    second.begin()
    expected = {"wandb": {"entity": "me", "resume": "allow", "id": "run-1"}}
    assert accelerator.init_trackers.call_args.kwargs["init_kwargs"] == expected


def test_tensorboard_shows_each_iteration_of_a_resumed_run_once(tmp_path: Path) -> None:
    """The first part logs iteration 3 without saving it; the second logs it again."""

    def run(iterations: int, save_every: int) -> None:
        own = trainer(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path / "tracked")})
        own.train(share_of_e, config(tmp_path / "run", iterations=iterations, save_every=save_every))
        own.accelerator.end_training()

    run(3, save_every=2)
    for path in (tmp_path / "run").glob("checkpoint-3"):
        path.rename(tmp_path / "away")
    run(4, save_every=2)
    events = EventAccumulator(str(tmp_path / "tracked" / "rlhf_ppo"))
    events.Reload()
    assert [event.step for event in events.Scalars("objective/kl")] == [1, 2, 3, 4]
