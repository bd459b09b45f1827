"""Scores per token through `step()`: of an episode with a tool's tokens, what the policy's own tokens earn."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ppo import PPOTrainer
from tests.classic.test_classic import trainer_of, weights

QUERY = torch.tensor([5, 6])
RESPONSES = [torch.tensor([10, 11, 12, 13]), torch.tensor([14, 15, 16]), torch.tensor([17, 18]), torch.tensor([19, 20])]
MASKS = [torch.tensor([1, 0, 1, 0]), torch.tensor([1, 0, 1]), torch.ones(2), torch.ones(2)]
SCORES = [torch.tensor(row) for row in ([-0.5, 0.0, -0.5, 0.0], [-0.1, 0.0, 0.9], [-0.5, -0.5], [-0.5, -0.5])]
SETTINGS: dict[str, Any] = {
    "batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "init_kl_coef": 0.0, "adap_kl_ctrl": False, "lam": 1.0,
}  # fmt: skip


def rewards_of(trainer: PPOTrainer, scores: list[Tensor]) -> Tensor:
    """The rewards of a step: with λ = 1 and no KL, the differences of the value targets at the actions."""
    trainer.step([QUERY] * len(scores), RESPONSES, scores, MASKS)
    assert trainer.last_batch is not None
    batch = trainer.last_batch[0]
    rewards = torch.zeros_like(batch.returns)
    for row, mask in enumerate(batch.mask):
        returns = batch.returns[row][mask]
        rewards[row, mask] = returns - torch.cat([returns[1:], torch.zeros(1)])
    return rewards


def test_normalized_scores_per_token_keep_the_order_of_the_episodes() -> None:
    """Totals -1, 0.8, -1, -1: mean -0.55, deviation 0.9. The mean was once paid at every token, padding included."""
    rewards = rewards_of(trainer_of(**SETTINGS, use_score_scaling=True, use_score_norm=True), SCORES)
    expected = torch.tensor([-0.5, 1.5, -0.5, -0.5])
    torch.testing.assert_close(rewards.sum(dim=1), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rewards[1], torch.tensor([-0.1, 0.0, 1.45, 0.0]) / 0.9, atol=1e-4, rtol=0)


def test_a_single_number_beside_scores_per_token_is_earned_at_the_last_action() -> None:
    """The last token of the first response is a tool's: there it was lost."""
    rewards = rewards_of(trainer_of(**SETTINGS), [torch.tensor(3.0), *SCORES[1:]])
    torch.testing.assert_close(rewards[0], torch.tensor([0.0, 0.0, 3.0, 0.0]), atol=1e-5, rtol=0)


def test_scores_of_a_tools_tokens_move_nothing_and_enter_no_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 at a masked token: not trained on, not shown, not in the running deviation, not a reason to push."""
    paid = [torch.tensor([-0.5, 100.0, -0.5, 0.0]), *SCORES[1:]]
    results = []
    for scores in (SCORES, paid):
        trainer = trainer_of(
            **SETTINGS, use_score_scaling=True, use_score_norm=True, push_to_hub_if_best_kwargs={"repo_id": "some/body"}
        )
        monkeypatch.setattr(type(trainer), "push_to_hub", lambda self, repo_id: None)
        shown = float(trainer.step([QUERY] * 4, RESPONSES, scores, MASKS)["ppo/mean_scores"])
        results.append((weights(trainer), shown, trainer.highest_reward, float(trainer.running.mean)))
    (clean, *numbers), (other, *others) = results
    assert torch.equal(clean, other)
    assert numbers == others
    assert numbers[1] == pytest.approx(-0.55)


def test_the_doctor_names_scores_that_training_drops() -> None:
    paid = [torch.tensor([-0.5, 100.0, -0.5, 0.0]), *SCORES[1:]]
    trainer = trainer_of(**SETTINGS, diagnose=True)
    trainer.step([QUERY] * 4, RESPONSES, paid, MASKS)
    (found,) = [finding for finding in trainer.diagnosis.findings if finding.name == "masked_scores"]
    assert found.severity == "warning"
    assert "1 scores that sum to 100 are at tokens that the policy did not choose, in 1 of 4" in found.evidence
    healthy = trainer_of(**SETTINGS, diagnose=True)
    healthy.step([QUERY] * 4, RESPONSES, SCORES, MASKS)
    assert "masked_scores" not in healthy.diagnosis.names()
