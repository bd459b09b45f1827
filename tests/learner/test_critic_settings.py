"""The critic's own rate, further fits, frozen parts, and its place beside a saved policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf_ppo import (
    AutoModelForCausalLMWithValueHead,
    Critic,
    LearnedValue,
    PPOClip,
    PPOConfig,
    PPOTrainer,
    Reinforce,
    SeparateCritic,
    TrainConfig,
    attach_critic,
)
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.learner.optimizer import default_optimizer
from rlhf_ppo.models.critic import freeze_critic
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.classic.test_classic import QUERIES, RESPONSES, SCORES, policy, trainer_of
from tests.support.tiny_models import tiny_llama, tiny_tokenizer


def own(*, separate: bool = False, **critic: Any) -> PPOTrainer:
    model = policy()
    if separate:
        attach_critic(model, SeparateCritic.from_policy(model))
    no_kl = {"kl_penalty": "none", "init_kl_coef": 0.0}
    return trainer_of(model, **no_kl, arguments={"algorithm": PPOClip(critic=Critic(**critic))})


def parts(trainer: PPOTrainer) -> tuple[Tensor, Tensor]:
    """Language model and value head in one vector each."""
    model = trainer.model
    flat = [
        torch.cat([p.detach().flatten() for p in part.parameters()])
        for part in (model.pretrained_model, model.critic or model.v_head)
    ]
    return flat[0], flat[1]


def test_the_critic_learns_at_its_own_rate() -> None:
    """Adam's first step is its rate: 1e-3 for the trunk, 0.1 for the head."""
    trainer = own(learning_rate=0.1)
    trainer.config.ppo_epochs = 1
    before = parts(trainer)
    trainer.step(QUERIES, RESPONSES, SCORES)
    trunk, head = (float((new - old).abs().max()) for new, old in zip(parts(trainer), before, strict=True))
    assert trunk == pytest.approx(1e-3, rel=0.01)
    assert head == pytest.approx(0.1, rel=0.01)


def test_the_critic_keeps_its_rate_when_that_of_the_policy_or_the_model_changes() -> None:
    trainer = own(learning_rate=0.1)
    trainer.config.learning_rate = 2e-3
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [2e-3, 0.1]
    trainer.model = policy()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [2e-3, 0.1]


def test_a_schedule_has_a_part_for_the_critic() -> None:
    """The critic's rate halves after the first step, the policy's stays."""
    model = policy()
    optimizer = default_optimizer(model, PPOConfig(learning_rate=1e-3), critic_rate=0.1)
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in model.v_head.parameters()}
    scheduler = LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5**step])
    trainer = trainer_of(model, arguments={"optimizer": optimizer, "lr_scheduler": scheduler})
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 0.05]


def test_a_rate_beside_an_optimizer_of_the_callers_is_refused() -> None:
    model = policy()
    arguments = {"algorithm": Reinforce(baseline=LearnedValue(critic=Critic(learning_rate=0.1)))}
    one_group = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the rate would be ignored"):
        trainer_of(model, arguments=arguments | {"optimizer": one_group})
    trainer = trainer_of(model, arguments=arguments)
    with pytest.raises(ValueError, match="the rate would be ignored"):
        trainer.optimizer = one_group
    with pytest.raises(ValueError, match="the rate would be ignored"):
        trainer.optimizer = default_optimizer(model, PPOConfig(), critic_rate=0.2)
    trainer.optimizer = default_optimizer(model, PPOConfig(), critic_rate=0.1)


@pytest.mark.parametrize("separate", [False, True], ids=["head", "separate"])
def test_further_fits_move_the_critic_alone(separate: bool) -> None:
    plain, more = own(separate=separate), own(separate=separate, extra_fits=2)
    for trainer in (plain, more):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert torch.equal(parts(plain)[0], parts(more)[0])
    assert not torch.equal(parts(plain)[1], parts(more)[1])
    state = more.algorithm.update.state_dict()
    assert set(state) == {"update", "fits"}
    own(separate=separate, extra_fits=2).algorithm.update.load_state_dict(state)


@pytest.mark.parametrize(("part", "moving"), [("attention", True), ("trunk", False)])
def test_frozen_parts_of_a_separate_critic_stay(part: Any, moving: bool) -> None:
    trainer = own(separate=True, freeze=part)
    critic: Any = trainer.model.critic
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    for _ in range(2):
        trainer.step(QUERIES, RESPONSES, SCORES)
    moved = {name for name, p in critic.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("head.") for name in moved)
    assert not any("attn" in name for name in moved)
    assert any(name.startswith("backbone.") for name in moved) == moving


def test_the_norm_behind_an_attention_is_not_frozen_with_it() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama())
    attach_critic(model, SeparateCritic.from_policy(model))
    freeze_critic(model, "attention")
    critic: Any = model.critic
    frozen = {name.split(".")[-2] for name, p in critic.named_parameters() if not p.requires_grad}
    assert frozen == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_value_head_on_the_policys_trunk_has_nothing_to_freeze() -> None:
    with pytest.raises(ValueError, match="shares the policy's trunk"):
        own(freeze="trunk")


@pytest.mark.parametrize("settings", [{"learning_rate": 0.0}, {"extra_fits": -1}])
def test_settings_with_which_the_critic_would_not_learn_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the critic would not learn"):
        Critic(**settings)


def test_a_critic_is_saved_with_the_policy_and_found_again(tmp_path: Path) -> None:
    trainer = own(separate=True)
    trainer.step(QUERIES, RESPONSES, SCORES)
    nn.init.normal_(trainer.model.critic.head.weight)  # type: ignore[union-attr]
    trainer.save_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    in_parent = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path.parent), subfolder=tmp_path.name)
    assert in_parent.critic is not None
    inputs = TokenInputs(prompts=QUERIES, responses=RESPONSES)
    assert again.critic is not None and trainer.model.critic is not None
    for mine, theirs in zip(again.critic(inputs), trainer.model.critic(inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert trainer_of(again).model.critic is again.critic
    plain = tmp_path / "plain"
    own().save_pretrained(plain)
    assert not (plain / "critic").exists()
    assert AutoModelForCausalLMWithValueHead.from_pretrained(plain).critic is None


def test_the_bias_of_the_critic_is_measured_by_position() -> None:
    """V = 0 everywhere, γ = λ = 1, no KL: the bias is minus the score at every token."""
    trainer = trainer_of(lam=1.0, init_kl_coef=0.0, adap_kl_ctrl=False)
    nn.init.zeros_(trainer.model.v_head.summary.weight)
    nn.init.zeros_(trainer.model.v_head.summary.bias)
    trainer.step(QUERIES, RESPONSES, [torch.tensor(2.0)] * 2)
    found = [trainer.metrics[f"ppo/val/bias_{part}"] for part in range(1, 6)]
    assert found == pytest.approx([-2.0] * 4 + [0.0]), "of 2 and 4 tokens none is in the last fifth"


def test_the_values_of_a_separate_critic_are_its_own_in_every_rollout() -> None:
    """Head and critic both start at V = 0: the sampler's values, the head's, agree then and must not be taken."""
    model, tokenizer = policy(), tiny_tokenizer()
    nn.init.zeros_(model.v_head.summary.weight)
    nn.init.zeros_(model.v_head.summary.bias)
    attach_critic(model, SeparateCritic.from_policy(model))
    prompts = PromptDataset.from_texts(["The movie", "I liked"], tokenizer)
    config = PPOConfig(batch_size=4, mini_batch_size=4, learning_rate=1e-3, diagnose=False)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer, dataset=prompts)
    run = TrainConfig(iterations=2, sampling=SamplingConfig(max_new_tokens=3), progress=False)
    trainer.train(lambda *, responses, **_: [3.0] * len(responses), run)
    assert trainer.last_batch is not None
    batch, _ = trainer.last_batch
    assert bool((batch.values[batch.mask] != 0).all())


@pytest.mark.parametrize("limit", [1e-3, None])
def test_fits_of_the_critic_alone_clip_its_gradient_and_leave_out_what_is_not_finite(
    limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policy()
    arguments = {
        "algorithm": PPOClip(critic=Critic(warmup_iterations=1)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
    }
    trainer = trainer_of(model, ppo_epochs=1, mini_batch_size=2, batch_size=2, max_grad_norm=limit, arguments=arguments)
    if limit is None:
        grad = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *args: [part * float("nan") for part in grad(*args)])
    before = parts(trainer)[1]
    trainer.step(QUERIES, RESPONSES, SCORES)
    moved = float((parts(trainer)[1] - before).norm())
    assert moved == pytest.approx(limit or 0.0, rel=0.01)
