"""Evaluation on tasks as people write them: without rendering, and without an end."""

import numpy as np
import pytest

from rlhf_ppo.control import (
    ControlConfig,
    ControlPolicy,
    ControlTrainer,
    EnvironmentConfig,
    EvaluationResult,
    Gaussian,
    Normalizer,
    evaluate,
    render_frames,
)
from tests.control.tasks import Corridor, register


def play(environment: EnvironmentConfig) -> EvaluationResult:
    policy = ControlPolicy(1, Gaussian(1), 1, hidden=())
    normalizer = Normalizer(1, environments=1, gamma=0.9)
    return evaluate(policy, normalizer, environment, episodes=2, deterministic=True, seed=0)


def test_a_task_that_cannot_be_rendered_trains_and_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constructor takes no `render_mode`."""
    register(monkeypatch, "Corridor-v0", lambda: Corridor(5))
    environment = EnvironmentConfig(id="Corridor-v0")
    config = ControlConfig(environment=environment, environments=2, rollout_steps=8, total_steps=16, lowered=False)
    trainer = ControlTrainer(config)
    trainer.train()
    assert trainer.evaluate(episodes=2, deterministic=True).lengths == [5, 5]
    with pytest.raises(RuntimeError, match=r"expected to render Corridor-v0.*no pictures.*render_mode='rgb_array'"):
        render_frames(trainer.policy, trainer.normalizer, environment, count=1, every=1, seed=0)


def test_a_task_without_an_end_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "Endless-v0", Corridor)
    with pytest.raises(ValueError, match=r"2 of 2 still running after 10000 steps.*max_episode_steps"):
        play(EnvironmentConfig(id="Endless-v0"))
    assert play(EnvironmentConfig(id="Endless-v0", max_episode_steps=7)).lengths == [7, 7]


def test_episodes_longer_than_the_bound_count_where_the_task_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "Long-v0", Corridor, max_episode_steps=10_050)
    assert play(EnvironmentConfig(id="Long-v0")).lengths == [10_050, 10_050]


def test_a_time_limit_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="max_episode_steps must be at least 1, got 0"):
        EnvironmentConfig(max_episode_steps=0)


def test_rewards_that_are_not_finite_are_counted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 of 40 rewards, each in an episode of its own that goes on: with scaling and without, nothing changes."""

    class Broken(Corridor):
        def step(self, action: object) -> tuple[object, float, bool, bool, dict[str, object]]:
            observation, _, ended, cut, info = super().step(np.zeros(1))
            return observation, float("nan") if self.time == 4 else 1.0, ended, cut, info

    register(monkeypatch, "Broken-v0", Broken)
    for scales in (True, False):
        config = ControlConfig(
            environment=EnvironmentConfig(id="Broken-v0"), environments=10, rollout_steps=4, total_steps=40,
            lowered=False, normalize_rewards=scales,
        )  # fmt: skip
        trainer = ControlTrainer(config)
        before = trainer.normalizer.state_dict()
        with pytest.raises(
            ValueError, match=r"got 10 of 40 that are not, the first \(nan\) in environment 0 at step 3"
        ):
            trainer.step()
        assert trainer.normalizer.state_dict() == before
        broken = np.array([[1.0, np.nan], [1.0, 1.0], [np.nan, np.inf]])
        with pytest.raises(ValueError, match="got 2 of 5 that are not"):  # the masked one does not count
            Normalizer(1, environments=2, gamma=0.9, rewards=scales).normalize_rewards(
                broken, np.zeros((3, 2), bool), np.array([[True, True], [True, True], [True, False]])
            )
