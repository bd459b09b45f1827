"""Gradients that something else has left do not reach the first optimizer step of an update."""

from typing import Any

import pytest
import torch

from rlhf_ppo import Critic, PPOClip, PPOTrainer
from tests.classic.test_classic import QUERIES, RESPONSES, SCORES, policy, trainer_of


class OwnLoss(PPOTrainer):
    """Overrides a method of the classic, so that its inner methods run."""

    def loss(self, *arguments: Any, **keywords: Any) -> Any:
        return super().loss(*arguments, **keywords)


def trainer(kind: type[PPOTrainer], critic: Critic) -> PPOTrainer:
    torch.manual_seed(0)
    model = policy()
    arguments = {"algorithm": PPOClip(critic=critic)} if kind is PPOTrainer else {}
    own = trainer_of(model, arguments=arguments)
    own.__class__ = kind
    return own


@pytest.mark.parametrize(
    ("kind", "critic"),
    [(PPOTrainer, Critic()), (PPOTrainer, Critic(warmup_iterations=1)), (OwnLoss, Critic())],
    ids=["update", "critic fit", "inner methods"],
)
def test_gradients_of_a_loss_outside_of_step_are_dropped(kind: type[PPOTrainer], critic: Critic) -> None:
    """A supervised warm-up in the order zero_grad, backward, step leaves the last gradients where they are."""
    clean, left = trainer(kind, critic), trainer(kind, critic)
    for parameter in left.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    for own in (clean, left):
        own.step(QUERIES, RESPONSES, SCORES)
    for one, other in zip(clean.model.parameters(), left.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [PPOTrainer, OwnLoss])
def test_float16s_loss_scale_takes_a_step_after_an_interrupted_one(kind: type[PPOTrainer]) -> None:
    """Ctrl-C came between the unscaling and the step: every later step raised that gradients were unscaled already."""
    own = trainer(kind, Critic())
    scaler = own.accelerator.scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # makes the scale
    scaler.unscale_(own.optimizer.optimizer)
    own.step(QUERIES, RESPONSES, SCORES)
    scaler.unscale_(own.optimizer.optimizer)


def test_a_critic_fit_under_float16s_loss_scale_takes_the_gradients_as_they_are() -> None:
    """They are not scaled, so a division by the scale would make Adam's ε large beside them; nan is no step."""
    plain, scaled = (trainer(PPOTrainer, Critic(warmup_iterations=2)) for _ in range(2))
    scaled.accelerator.scaler = scaled.optimizer.scaler = torch.amp.GradScaler("cpu")
    for own in (plain, scaled):
        own.step(QUERIES, RESPONSES, SCORES)
    assert torch.equal(plain.model.v_head.summary.weight, scaled.model.v_head.summary.weight)
    before = scaled.model.v_head.summary.weight.detach().clone()
    scaled.algorithm.update.fit.parameters[0].register_hook(lambda gradient: gradient * torch.nan)
    scaled.step(QUERIES, RESPONSES, SCORES)
    assert torch.equal(before, scaled.model.v_head.summary.weight)
