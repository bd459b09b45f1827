"""What a loop of one's own asks of `step()`: groups, cut episodes, batches of any size, no KL; and what it is told."""

from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from rlhf_ppo import (
    GRPO,
    RLOO,
    AlgorithmConfig,
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    Reinforce,
    TrainConfig,
)
from rlhf_ppo.functional import gae
from rlhf_ppo.models.scoring import TokenPolicy
from tests.classic.test_classic import trainer_of, weights
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer
from tests.support.tiny_run import SAMPLING, share_of_e
from tests.support.tiny_run import trainer as trainer_with_prompts

QUERIES = [torch.tensor([5, 6])] * 2 + [torch.tensor([7])] * 2
RESPONSES = [torch.tensor(row) for row in ([10, 11, 12], [13, 14], [15], [16, 17])]
MASKS = [torch.tensor(row) for row in ([1, 0, 1], [1, 1], [1], [1, 1])]
SCORES = [torch.tensor(score) for score in (1.0, 0.0, 3.0, -1.0)]


def grouped(algorithm: AlgorithmConfig, **settings: Any) -> PPOTrainer:
    no_kl = {"init_kl_coef": 0.0, "adap_kl_ctrl": False}
    return trainer_of(
        batch_size=4, mini_batch_size=4, ppo_epochs=1, **no_kl | settings, arguments={"algorithm": algorithm}
    )


def advantages(trainer: PPOTrainer) -> list[list[float]]:
    assert trainer.last_batch is not None
    batch = trainer.last_batch[0]
    return [row[mask].tolist() for row, mask in zip(batch.advantages, batch.mask, strict=True)]


def test_step_compares_the_responses_of_a_group() -> None:
    """RLOO of 1, 0 and of 3, -1: each minus the other, at its own tokens."""
    trainer = grouped(RLOO())
    trainer.step(QUERIES, RESPONSES, SCORES, MASKS, group_size=2)
    assert advantages(trainer) == [[1.0, 1.0], [-1.0, -1.0], [4.0], [-4.0, -4.0]]


def test_groups_that_cannot_be_compared_are_refused_and_nothing_changes() -> None:
    trainer = grouped(GRPO())
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"group_size must be a whole number of at least 2, got 1.*side by side"):
        trainer.step(QUERIES, RESPONSES, SCORES)
    with pytest.raises(ValueError, match=r"expected whole groups of 3 responses, got 4 samples"):
        trainer.step(QUERIES, RESPONSES, SCORES, group_size=3)
    with pytest.raises(ValueError, match=r"queries\[2\] must be the prompt of its group, queries\[0\] \(group_size"):
        trainer.step(QUERIES, RESPONSES, SCORES, group_size=4)
    assert torch.equal(weights(trainer), before)


def test_a_cut_episode_counts_on_the_value_of_its_last_state() -> None:
    """With γ = λ = 1 and no KL a target is the score plus, for the cut rows, V behind the last action."""
    trainer = trainer_of(batch_size=4, mini_batch_size=4, lam=1.0, init_kl_coef=0.0, adap_kl_ctrl=False)
    trainer.step(QUERIES, RESPONSES, SCORES, MASKS, truncated=[True, False, False, True])
    assert trainer.last_batch is not None
    batch, scored = trainer.last_batch
    behind = [float(scored.values[0, 3]), 0.0, 0.0, float(scored.values[3, 2])]
    for row, mask in enumerate(batch.mask):
        expected = torch.full((int(mask.sum()),), float(SCORES[row]) + behind[row])
        torch.testing.assert_close(batch.returns[row][mask], expected, atol=1e-5, rtol=0)
    zeros = torch.zeros(1, 1)
    cut = gae(
        zeros, torch.tensor([[0.0, 2.0]]), zeros.bool(), ~zeros.bool(), gamma=1.0, lam=1.0
    )  # what the rows above rely on
    assert cut[1].item() == 2.0


@pytest.mark.parametrize("flags", [[True], [True] * 3 + [2], "yes!", torch.ones(4, 1), torch.full((4,), torch.nan)])
def test_flags_that_are_none_are_refused(flags: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    trainer = trainer_of(batch_size=4, mini_batch_size=4)
    with pytest.raises(ValueError, match="truncated must hold True or False for each of the 4 samples"):
        trainer.step(QUERIES, RESPONSES, SCORES, truncated=flags)


def test_a_batch_of_another_size_is_taken_when_asked_and_refused_otherwise() -> None:
    """Three rows in minibatches of two: two optimizer steps, the second on one row."""
    trainer = trainer_of(batch_size=2, mini_batch_size=2, ppo_epochs=1)
    rows = QUERIES[:3], RESPONSES[:3], SCORES[:3]
    with pytest.raises(ValueError, match=r"Batch size \(2\) does not match number of examples - but got 3"):
        trainer.step(*rows)
    trainer.step(*rows, any_batch_size=True)
    assert trainer.metrics["ppo/updates"] == 2
    trainer.step(*([part[0]] for part in rows), any_batch_size=True)
    assert trainer.metrics["ppo/updates"] == 1


def test_own_tokens_and_turns_are_counted_apart_from_the_length() -> None:
    """Own tokens 2, 2, 1, 2 in 2, 1, 1, 1 turns; tokens 3, 2, 1, 2."""
    trainer = trainer_of(batch_size=4, mini_batch_size=4)
    statistics = trainer.step(QUERIES, RESPONSES, SCORES, MASKS)
    assert float(statistics["tokens/responses_len_mean"]) == 2.0
    assert trainer.metrics["tokens/actions_mean"] == 7 / 4
    assert trainer.metrics["tokens/turns_mean"] == 5 / 4


def passes_of(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per forward pass: whether it was made without gradients."""
    seen: list[bool] = []
    forward = TokenPolicy.forward

    def counted(self: TokenPolicy, *args: Any, **kwargs: Any) -> Any:
        seen.append(not torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TokenPolicy, "forward", counted)
        trainer.step(QUERIES, RESPONSES, SCORES, MASKS)
    return seen


def test_without_a_kl_there_is_no_reference_no_pass_over_one_and_no_statistic_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights are those of a coefficient of 0, whose KL is measured all the same."""
    size = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "init_kl_coef": 0.0}
    watched, without = trainer_of(**size), trainer_of(**size, kl_penalty="none")
    assert watched.ref_model is not None and without.ref_model is None
    assert passes_of(watched, monkeypatch) == [True, True, False]
    assert passes_of(without, monkeypatch) == [True, False]
    assert torch.equal(weights(watched), weights(without))
    statistics = without.step(QUERIES, RESPONSES, SCORES, MASKS)
    assert not [name for name in statistics | without.metrics if "kl_" in name or name == "objective/kl"]


def test_the_doctor_the_loop_and_the_evaluation_run_without_a_reference() -> None:
    trainer = trainer_with_prompts(kl_penalty="none", init_kl_coef=0.0, diagnose=True)
    prompts: Any = trainer.dataset
    run = TrainConfig(iterations=2, sampling=SAMPLING, progress=False, eval_every=1, keep_best="score")
    state = trainer.train(share_of_e, run, eval_prompts=prompts)
    assert trainer.diagnosis is not None and "reference" not in trainer.diagnosis.checked
    assert "eval/length" in state.metrics and "eval/kl" not in state.metrics
    with pytest.raises(ValueError, match=r"expected a KL to the reference for max_reference_kl.*kl_penalty='none'"):
        trainer.train(share_of_e, TrainConfig(iterations=1, sampling=SAMPLING, max_reference_kl=5.0))


def test_a_kl_that_is_wanted_and_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_penalty='none' measures no KL, got init_kl_coef=0\.2"):
        PPOConfig(kl_penalty="none")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    reference = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    config = PPOConfig(kl_penalty="none", init_kl_coef=0.0)
    with pytest.raises(ValueError, match="it would never be read"):
        PPOTrainer(config, model, reference, tiny_tokenizer())
    trainer = trainer_of(kl_penalty="none", init_kl_coef=0.0)
    with pytest.raises(ValueError, match="therefore kept no reference"):
        trainer.config.kl_penalty = "kl"


@pytest.mark.parametrize("algorithm", [GRPO(), Reinforce()], ids=["grpo", "reinforce"])
def test_an_algorithm_without_a_critic_reports_no_values(algorithm: AlgorithmConfig) -> None:
    trainer = grouped(algorithm)
    statistics = trainer.step(QUERIES, RESPONSES, SCORES, MASKS, group_size=2)
    assert not [name for name in statistics if name.startswith("ppo/val/") or name == "ppo/loss/value"]
    assert isinstance(statistics["ppo/loss/policy"], float)


def test_a_loop_of_ones_own_is_not_warned_of_a_missing_dataset(recwarn: pytest.WarningsRecorder) -> None:
    trainer_of()
    assert not [str(warning.message) for warning in recwarn.list if "dataset" in str(warning.message)]


def test_groups_of_a_step_are_those_of_the_managed_loop() -> None:
    """The same responses and scores through `train()` and `step()`: the same weights, bit for bit."""
    from dataclasses import replace

    managed = trainer_with_prompts(algorithm=RLOO(), ppo_epochs=1)
    own = trainer_with_prompts(algorithm=RLOO(), ppo_epochs=1)
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    scores: list[list[float]] = []

    def reward(*, prompts: list[str], responses: list[str], **_: Any) -> list[float]:
        scores.append(share_of_e(prompts, responses))
        return scores[-1]

    managed.train(reward, TrainConfig(iterations=1, sampling=replace(SAMPLING, num_return_sequences=2), progress=False))
    assert managed.last_batch is not None
    inputs: Any = managed.last_batch[0].inputs
    seen.append((list(inputs.prompts), list(inputs.responses)))
    own.step(*seen[0], [torch.tensor(score) for score in scores[0]], group_size=2)
    assert torch.equal(weights(managed), weights(own))


def test_a_trainer_that_overrides_the_classics_methods_refuses_what_they_do_not_know() -> None:
    class Own(PPOTrainer):
        def compute_rewards(self, *args: Any) -> Any:
            return super().compute_rewards(*args)

    config = PPOConfig(batch_size=4, mini_batch_size=4, diagnose=False)
    own = Own(config, AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()), None, tiny_tokenizer())
    with pytest.raises(ValueError, match=r"overrides \['compute_rewards'\] .*they would be ignored"):
        own.step(QUERIES, RESPONSES, SCORES, truncated=[False] * 4)
    own.config.init_kl_coef, own.config.kl_penalty = 0.0, "none"
    with pytest.raises(ValueError, match="got kl_penalty='none'"):
        own.step(QUERIES, RESPONSES, SCORES)
