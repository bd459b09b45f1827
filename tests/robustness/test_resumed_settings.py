"""Settings that a callback changes on the way, as schedules do, belong to the run: a resumed one goes on with them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

from rlhf_ppo import PPOConfig, TrainState
from tests.support.tiny_run import config, parameters, share_of_e, trainer

SCHEDULES: dict[str, Callable[[PPOConfig, int], None]] = {
    "clipping": lambda settings, done: setattr(settings, "cliprange", 0.2 / (1 + done)),
    "entropy": lambda settings, done: setattr(settings, "ent_coef", 0.05 * done),
    "temperature": lambda settings, done: setattr(settings, "temperature", 1 / (1 + 0.1 * done)),
    "learning rate": lambda settings, done: setattr(settings, "learning_rate", 1e-3 / (1 + done)),
    "minibatches": lambda settings, done: setattr(settings, "mini_batch_size", 2),
    "KL controller": lambda settings, done: setattr(settings, "target", 0.1 / (1 + done)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_settings_that_a_callback_changes_go_on_in_a_resumed_run(tmp_path: Path, name: str) -> None:
    def schedule(learner: Any, state: TrainState) -> None:
        SCHEDULES[name](learner.config, state.iteration)

    whole, first, resumed = (trainer(target=0.1, horizon=50.0) for _ in range(3))
    whole.train(share_of_e, config(iterations=4), callbacks=[schedule])
    first.train(share_of_e, config(tmp_path, iterations=2, save_every=1), callbacks=[schedule])
    resumed.train(share_of_e, config(tmp_path, iterations=4), callbacks=[schedule])
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed.config.to_dict() == whole.config.to_dict()


def test_a_setting_that_a_resumed_run_begins_with_replaces_what_a_callback_made_of_it(tmp_path: Path) -> None:
    """Both are set to one value together; alone, each would contradict the other's first value."""

    def to_the_loss(learner: Any, state: TrainState) -> None:
        if state.iteration == 1:
            learner.config.kl_penalty, learner.config.ent_coef = "full", 0.1
            learner.config.kl_placement = "loss"
            learner.config.kl_penalty = "k3"

    trainer().train(share_of_e, config(tmp_path, iterations=1, save_every=1), callbacks=[to_the_loss])
    resumed = trainer(ent_coef=0.2)
    with pytest.warns(UserWarning, match=r"other settings: ent_coef=0.2 \(was 0.1\). The run uses the new values"):
        resumed.train(share_of_e, config(tmp_path, iterations=2))
    settings = resumed.config
    assert (settings.kl_placement, settings.kl_penalty, settings.ent_coef) == ("loss", "k3", 0.2)


@pytest.mark.parametrize("had_one", [True, False])
def test_a_schedule_that_only_one_of_two_runs_has_is_named(tmp_path: Path, had_one: bool) -> None:
    first, second = trainer(), trainer()
    (first if had_one else second).lr_scheduler = LinearLR((first if had_one else second).optimizer.optimizer)
    first.train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    message = "lr_scheduler=None (was 'given')" if had_one else "lr_scheduler='given' (was None)"
    with pytest.warns(UserWarning, match=re.escape(message)):
        second.train(share_of_e, config(tmp_path, iterations=2))
