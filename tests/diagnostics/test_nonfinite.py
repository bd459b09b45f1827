"""Losses and gradients that are not finite: nothing moves, all is counted, the run stops with a dump that replays."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ppo import GRPO, TRPO, AlgorithmConfig, PPOClip, PPOPenalty, PPOTrainer, PretrainingMix
from rlhf_ppo.diagnostics.dump import FACTS
from rlhf_ppo.models.critic import SeparateCritic, attach_critic
from rlhf_ppo.replay import main, replay
from rlhf_ppo.updates.nonfinite import NonFiniteUpdateError, innermost_update
from tests.classic.test_classic import QUERIES, RESPONSES, SCORES, policy, trainer_of, weights

EXTREME = [torch.tensor(1e30), torch.tensor(-1.0)]
"""Finite, but its square is not: the value loss overflows."""


def state(trainer: PPOTrainer) -> tuple[Any, ...]:
    return weights(trainer).tolist(), repr(trainer.optimizer.state_dict())


def test_an_update_that_is_not_finite_is_rolled_back_counted_and_reported() -> None:
    trainer = trainer_of(kl_penalty="abs", ppo_epochs=1)
    trainer.step(QUERIES, RESPONSES, SCORES)  # Adam has momentum now
    before = state(trainer)
    with pytest.warns(UserWarning, match=r"Skipped a minibatch whose loss \((inf|nan)\)"):
        statistics = trainer.step(QUERIES, RESPONSES, EXTREME)
    assert state(trainer) == before
    assert trainer.metrics["ppo/updates_skipped"] == 1.0
    assert statistics["ppo/loss/total"] == 0.0
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert state(trainer) != before, "a good batch is learned from again"


@pytest.mark.filterwarnings("ignore:Skipped a minibatch")
def test_after_m_in_a_row_the_run_stops_and_a_good_one_between_counts_anew() -> None:
    trainer = trainer_of(kl_penalty="abs", ppo_epochs=1, most_skips_in_a_row=2)
    trainer.step(QUERIES, RESPONSES, EXTREME)
    trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.step(QUERIES, RESPONSES, EXTREME)
    before = state(trainer)
    with pytest.raises(NonFiniteUpdateError, match=r"in 2 minibatches in a row: .* set `PPOConfig.dump_dir`"):
        trainer.step(QUERIES, RESPONSES, EXTREME)
    assert state(trainer) == before


@pytest.fixture(params=[PPOClip(), PPOPenalty(), TRPO()], ids=["clip", "penalty", "trpo"])
def dumped(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PPOTrainer, Path]:
    algorithm: AlgorithmConfig = request.param
    trainer = trainer_of(
        kl_penalty="abs", ppo_epochs=1, most_skips_in_a_row=1, dump_dir=str(tmp_path), temperature=0.9,
        arguments={"algorithm": algorithm},
    )  # fmt: skip
    scores = [torch.tensor(3e38), torch.tensor(-3e38)] if isinstance(algorithm, TRPO) else EXTREME
    with pytest.raises(NonFiniteUpdateError, match=r"python -m rlhf_ppo\.replay .*dump-0"):
        trainer.step(QUERIES, RESPONSES, scores)
    return trainer, tmp_path / "dump-0"


def test_the_dump_replays_what_the_run_saw(dumped: tuple[PPOTrainer, Path], capsys: pytest.CaptureFixture[str]) -> None:
    trainer, folder = dumped
    before = weights(trainer)
    found = replay(folder)
    assert found.is_reproduced, str(found)
    assert found.samples
    assert not found.broken_parameters
    assert torch.equal(before, weights(trainer))
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.endswith("reproduced\n")


def test_a_finite_step_replays_number_by_number(tmp_path: Path) -> None:
    found = replay(dump_of_a_finite_step(tmp_path, token_budget=16))
    assert not found.is_reproduced  # the gradient norm was not nan after all
    assert found.samples == []
    for name, value in found.recorded.items():
        if name != "policy/grad_norm":
            assert math.isclose(value, found.metrics[name], rel_tol=1e-5, abs_tol=1e-6), name
    assert main([str(tmp_path / "dump-0")]) == 1


def dump_of_a_finite_step(folder: Path, model: Any = None, **settings: Any) -> Path:
    """The refusal is ours: a gradient norm said to be nan."""
    trainer = trainer_of(model, ppo_epochs=1, most_skips_in_a_row=1, dump_dir=str(folder), **settings)
    steps: Any = innermost_update(trainer.algorithm.update).steps
    whole = steps.clip
    steps.clip = lambda limit: math.nan * whole(limit)
    with pytest.raises(NonFiniteUpdateError):
        trainer.step(QUERIES, RESPONSES, SCORES)
    return folder / "dump-0"


def test_a_separate_critic_and_the_kl_in_the_loss_are_in_the_replay(tmp_path: Path) -> None:
    """The values were those of an untrained head, and the KL was left out."""
    model = policy()
    attach_critic(model, SeparateCritic.from_policy(model))
    torch.nn.init.normal_(model.critic.head.weight)
    found = replay(dump_of_a_finite_step(tmp_path, model, kl_penalty="k3", kl_placement="loss", init_kl_coef=5.0))
    for name in ("loss/policy", "loss/value", "loss/total"):
        assert math.isclose(found.recorded[name], found.metrics[name], rel_tol=1e-5, abs_tol=1e-6), name


def test_a_step_with_pretraining_texts_is_replayed_without_them_and_says_so(tmp_path: Path) -> None:
    mix = PretrainingMix(texts=[torch.tensor([3, 4, 5])], rows=1)
    found = replay(dump_of_a_finite_step(tmp_path, arguments={"pretraining": mix}))
    assert "without the step's pretraining texts" in str(found)
    assert math.isclose(found.recorded["loss/policy"], found.metrics["loss/policy"], rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"kl_penalty": "full", "kl_placement": "loss"}, {"arguments": {"algorithm": PPOPenalty(exact=True)}}],
    ids=["reference", "old policy"],
)
def test_a_dump_that_lacks_a_part_of_the_update_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected an update that a dump holds as a whole, got one with the .*KL"):
        replay(dump_of_a_finite_step(tmp_path, **settings))


def test_parameters_that_are_broken_already_are_named_before_anything_moves() -> None:
    trainer = trainer_of(use_score_scaling=True)
    with torch.no_grad():
        trainer.model.pretrained_model.transformer.h[0].mlp.c_fc.bias[0] = math.nan
    moments = repr(trainer.running.state_dict())
    with pytest.raises(
        FloatingPointError, match=r"sample 0, where .* \(2 of 2 samples .*h\.0\.mlp\.c_fc\.bias hold nan"
    ):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert repr(trainer.running.state_dict()) == moments
    assert trainer.optimizer.state == {}


def test_a_token_of_probability_zero_is_named_with_its_sample() -> None:
    trainer = trainer_of()
    head = trainer.model.pretrained_model.lm_head
    impossible = int(RESPONSES[1][0])
    head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([impossible]), -math.inf))
    with pytest.raises(FloatingPointError, match=r"sample 1, where the policy's log-probabilities .* probability 0"):
        trainer.step(QUERIES, RESPONSES, SCORES)


def test_what_is_no_dump_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"expected a dump, got .* without dump.json"):
        replay(tmp_path)
    for content in ("{", "[]", '{"format": 99}'):
        (tmp_path / FACTS).write_text(content)
        assert main([str(tmp_path)]) == 2
    assert "expected a dump of format 1, got 99" in capsys.readouterr().err


def test_group_algorithms_refuse_a_step_without_groups_before_anything_moves() -> None:
    trainer = trainer_of(arguments={"algorithm": GRPO()})
    before = state(trainer)
    with pytest.raises(ValueError, match="which responses share a prompt"):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert state(trainer) == before
