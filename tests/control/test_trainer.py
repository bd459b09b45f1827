"""A run of control from its settings to its figures: learning, resuming, refusing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ppo import GRPO, Critic, PPOClip, PPOPenalty
from rlhf_ppo.checkpoints import FolderInUseError
from rlhf_ppo.control import ControlConfig, ControlTrainer, EnvironmentConfig, Randomization, control_algorithm
from tests.control.tasks import Corridor, Remembering, register
from tests.robustness.another_run import another_run_in

TINY: dict[str, Any] = {"environments": 4, "rollout_steps": 64, "minibatch_size": 64, "epochs": 2, "hidden": (8,)}


def config(task: str = "CartPole-v1", algorithm: Any = "ppo-clip", **settings: Any) -> ControlConfig:
    return ControlConfig(
        environment=settings.pop("environment", EnvironmentConfig(id=task)), algorithm=control_algorithm(algorithm),
        **TINY | {"total_steps": 4 * 256} | settings,
    )  # fmt: skip


def parameters(trainer: ControlTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.parameters()]


def same(left: ControlTrainer, right: ControlTrainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parameters(left), parameters(right), strict=True))


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("ppo-clip", {"environment": EnvironmentConfig(id="Hopper-v5", randomization=Randomization(mass=(0.7, 1.3)))}),
        ("ppo-penalty", {}),
        ("trpo", {}),
    ],
    ids=["ppo-clip on Hopper in changing worlds", "ppo-penalty", "trpo"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, algorithm: Any, settings: Any) -> None:
    """Weights, numbers, and the half-played episodes; the break comes after two of four iterations."""
    own = config(algorithm=algorithm, lowered=False, **settings)
    whole, first, second = (ControlTrainer(own) for _ in range(3))
    expected = whole.train()
    for _ in range(2):
        first.step()
    saved = first.save(tmp_path)
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}  # nothing that could run code
    found = second.train(tmp_path)
    assert same(whole, second)
    assert found == expected[2:]
    assert whole.environments.state_dict() == second.environments.state_dict()
    assert whole.normalizer.state_dict() == second.normalizer.state_dict()


@pytest.mark.parametrize("task", ["MountainCar-v0", "Remembering-v0"])
def test_tasks_whose_state_is_in_collections_resume_exactly(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MountainCar-v0 keeps its state in a tuple."""
    register(monkeypatch, "Remembering-v0", Remembering, max_episode_steps=20)
    own = config(task, lowered=False, total_steps=2 * 256)
    whole, first, second = (ControlTrainer(own) for _ in range(3))
    whole.train()
    first.step()
    first.save(tmp_path)
    second.train(tmp_path)
    assert same(whole, second)
    assert whole.environments.state_dict() == second.environments.state_dict()
    for one, other in zip(whole.environments.envs, second.environments.envs, strict=True):
        for name, value in vars(one.unwrapped).items():
            assert type(getattr(other.unwrapped, name)) is type(value), name


def test_a_state_that_cannot_be_saved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Opaque(Corridor):
        def reset(self, **settings: Any) -> Any:
            self.body = object()
            return super().reset(**settings)

    register(monkeypatch, "Opaque-v0", Opaque, max_episode_steps=20)
    trainer = ControlTrainer(config("Opaque-v0", lowered=False))
    with pytest.warns(UserWarning, match=r"in body cannot be saved"):
        trainer.save(tmp_path)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    trainer = ControlTrainer(config(total_steps=256, lowered=False))
    before = parameters(trainer)
    with another_run_in(tmp_path), pytest.raises(FolderInUseError, match="for this run alone"):
        trainer.train(tmp_path)
    assert all(map(torch.equal, before, parameters(trainer)))


def test_a_seed_decides_a_run_and_nothing_outside_does() -> None:
    runs = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        trainer = ControlTrainer(config(seed=seed, total_steps=256, lowered=False))
        trainer.step()
        runs.append(trainer)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize(
    ("algorithm", "rate"),
    [
        ("ppo-clip", 3e-3),
        pytest.param("ppo-penalty", 3e-3, marks=pytest.mark.slow),
        pytest.param("trpo", 3e-3, marks=pytest.mark.slow),
        pytest.param("reinforce", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_every_algorithm_keeps_the_pole_up_longer(algorithm: Any, rate: float) -> None:
    """A new policy holds it for about 22 steps; twelve iterations of 512 steps double that."""
    trainer = ControlTrainer(
        config(
            algorithm=algorithm, total_steps=12 * 512, rollout_steps=128, epochs=4, learning_rate=rate, hidden=(32,),
            minibatch_size=128, normalize_observations=False, normalize_rewards=False, max_grad_norm=None,
            lowered=False,
        )
    )  # fmt: skip
    history = trainer.train()
    assert history[1]["return/last_100"] < 30
    assert history[-1]["return/last_20"] > 45


def test_the_learning_rate_falls_to_zero_behind_the_last_iteration() -> None:
    """Four iterations: 4/4, 3/4, 2/4, 1/4 of it; or all of it."""
    rates = [row["policy/learning_rate"] for row in ControlTrainer(config(learning_rate=0.4, lowered=False)).train()]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    constant = ControlTrainer(config(learning_rate=0.4, anneal=False, total_steps=512, lowered=False)).train()
    assert [row["policy/learning_rate"] for row in constant] == [0.4, 0.4]


def test_evaluation_moves_nothing_and_repeats_itself() -> None:
    trainer = ControlTrainer(config("InvertedPendulum-v5", total_steps=512, lowered=False))
    trainer.step()
    before = parameters(trainer), trainer.normalizer.state_dict(), trainer.environments.state_dict()
    played = [trainer.evaluate(episodes=3, deterministic=kind) for kind in (True, True, False)]
    assert played[0] == played[1] != played[2]
    after = parameters(trainer), trainer.normalizer.state_dict(), trainer.environments.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)) and before[1:] == after[1:]


def test_evaluation_counts_whole_episodes_of_raw_reward() -> None:
    """Every step of the cart pays 1, so that return and length are the same number."""
    played = ControlTrainer(config(lowered=False)).evaluate(episodes=4, deterministic=False)
    assert played.returns == [float(length) for length in played.lengths]
    assert len(set(played.lengths)) > 1


def test_checkpoints_of_another_task_are_refused(tmp_path: Path) -> None:
    ControlTrainer(config(lowered=False)).save(tmp_path)
    for other in (config("InvertedPendulum-v5"), config(hidden=(9,))):
        trainer = ControlTrainer(other)
        before = parameters(trainer)
        with pytest.raises(ValueError, match="holds a policy for CartPole-v1"):
            trainer.resume(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 100}, "not one iteration would fit"),
        ({"environments": 0}, "environments must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_algorithms_that_need_more_than_control_has_are_refused() -> None:
    with pytest.raises(ValueError, match="got GRPO: it compares responses"):
        ControlTrainer(replace(config(), algorithm=GRPO()))
    with pytest.raises(ValueError, match=r"expected PPOPenalty\(exact=False\)"):
        ControlTrainer(replace(config(), algorithm=PPOPenalty(exact=True)))
    for critic in (Critic(learning_rate=1e-3), Critic(freeze="trunk")):
        with pytest.raises(ValueError, match=r"control has one optimizer and trains the whole critic"):
            ControlTrainer(replace(config(), algorithm=PPOClip(critic=critic)))


FIGURES = [
    ("InvertedPendulum-v5", "ppo-clip", 61_440, {}, 950),
    ("InvertedPendulum-v5", "trpo", 61_440, {"learning_rate": 1e-3}, 950),
    (
        "CartPole-v1", "ppo-clip", 102_400,
        {"learning_rate": 1e-3, "normalize_observations": False, "normalize_rewards": False}, 475,
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("task", "algorithm", "steps", "settings", "least"), FIGURES)
def test_the_small_tasks_are_solved(
    task: str, algorithm: Any, steps: int, settings: dict[str, Any], least: float, seed: int
) -> None:
    """The recorded runs and those that take longer are in docs/results/control.md."""
    trainer = ControlTrainer(
        ControlConfig(
            environment=EnvironmentConfig(id=task), algorithm=control_algorithm(algorithm), total_steps=steps,
            seed=seed, **settings,
        )
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate(episodes=10, deterministic=True).mean >= least


@pytest.mark.parametrize("lowered", [True, False])
def test_minibatches_without_an_action_move_nothing(lowered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step of a corridor of length 1 only begins the next episode: half of all minibatches of one row."""
    register(monkeypatch, "Short-v0", lambda: Corridor(1))
    trainer = ControlTrainer(
        config(
            "Short-v0", environments=1, rollout_steps=16, total_steps=16, minibatch_size=1, epochs=1, lowered=lowered
        )
    )
    metrics = trainer.step()
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {8} and metrics["policy/skipped"] == 0 and metrics["steps"] == 8
