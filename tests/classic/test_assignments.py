"""What a script assigns to a trainer that is built counts: as if it had been passed to the constructor, or refused."""

import copy
import dataclasses
import pickle
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from rlhf_ppo import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    FixedKLController,
    PPOConfig,
    PPOPenalty,
    PPOTrainer,
    SeparateCritic,
    attach_critic,
)
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
RESPONSES = [torch.tensor([10, 11]), torch.tensor([12, 13, 14, 1])]
SCORES = [torch.tensor(1.0), torch.tensor(-1.0)]


def policy(seed: int = 0, *, lora: bool = False) -> AutoModelForCausalLMWithValueHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4)} if lora else {}
        model = tiny_llama(seed=seed) if lora else tiny_gpt2(seed=seed)
        return AutoModelForCausalLMWithValueHead.from_pretrained(model, **adapter)


def config_of(**settings: Any) -> PPOConfig:
    defaults: dict[str, Any] = {"batch_size": 2, "mini_batch_size": 1, "ppo_epochs": 2, "learning_rate": 1e-3}
    return PPOConfig(**{**defaults, "kl_penalty": "mse", "diagnose": False, **settings})


def trainer_of(model: Any = None, ref_model: Any = None, settings: Any = None, **arguments: Any) -> PPOTrainer:
    return PPOTrainer(config_of(**settings or {}), model or policy(), ref_model, tiny_tokenizer(), **arguments)


def step(trainer: PPOTrainer, queries: Any = QUERIES, responses: Any = RESPONSES) -> dict[str, Any]:
    return dict(trainer.step(queries, responses, SCORES))


def weights(trainer: PPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_same_steps(one: PPOTrainer, other: PPOTrainer) -> None:
    """Two steps of both: the numbers and the weights are the same."""
    for _ in range(2):
        expected, got = step(one), step(other)
        for name in expected:
            if not name.startswith("time/"):
                assert np.allclose(got[name], expected[name], equal_nan=True), name
    assert torch.equal(weights(one), weights(other))


def test_an_assigned_reference_is_the_one_that_the_kl_is_measured_to() -> None:
    assigned, built = trainer_of(), trainer_of(ref_model=policy(1))
    assigned.ref_model = policy(1)
    assert_same_steps(built, assigned)
    assert step(assigned)["objective/kl"] > 0.1


def test_an_assigned_policy_is_the_one_that_learns() -> None:
    """The default optimizer follows it; the old policy stays."""
    old, reference = policy(0), policy(2)
    assigned, built = trainer_of(old, reference), trainer_of(policy(1), policy(2))
    before = old.state_dict()["transformer.wte.weight"].clone()
    assigned.model = policy(1)
    assert_same_steps(built, assigned)
    assert torch.equal(old.state_dict()["transformer.wte.weight"], before)


def test_an_assigned_optimizer_takes_the_steps() -> None:
    """With a learning rate of 0 nothing moves."""
    trainer = trainer_of()
    before = weights(trainer)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    assert step(trainer)["ppo/learning_rate"] == 0.0
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("part", ["model", "ref_model", "optimizer"])
def test_the_size_of_a_pass_is_fitted_anew_to_the_memory_beside_an_assigned_part(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Any] = []
    monkeypatch.setattr("rlhf_ppo.learner.ppo_learner.fitted_token_budget", lambda *args: fits.append(args) or 64)
    trainer = trainer_of()
    step(trainer)
    step(trainer)
    assert len(fits) == 1
    setattr(trainer, part, torch.optim.SGD(trainer.model.parameters(), lr=0.1) if part == "optimizer" else policy(1))
    step(trainer)
    assert len(fits) == 2


def test_policy_optimizer_and_scheduler_may_be_assigned_one_after_the_other() -> None:
    """In the order of many scripts; the rate falls from step to step."""
    trainer = trainer_of()
    trainer.model = policy(1)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, gamma=0.5)
    assert [step(trainer)["ppo/learning_rate"] for _ in range(2)] == [1e-3, 5e-4]


def test_an_optimizer_of_other_parameters_and_a_scheduler_of_another_optimizer_are_refused() -> None:
    trainer = trainer_of()
    before = weights(trainer)
    trainer.optimizer = torch.optim.SGD(policy().parameters(), lr=1.0)
    with pytest.raises(ValueError, match="holds none of its 30 trained tensors"):
        step(trainer)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    other = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(other, gamma=0.5)
    with pytest.raises(ValueError, match=r"expected an lr_scheduler of trainer\.optimizer"):
        step(trainer)
    assert torch.equal(weights(trainer), before)
    with pytest.raises(ValueError, match="got one over 30 tensors of another model"):
        trainer_of(optimizer=torch.optim.SGD(policy().parameters(), lr=1.0))


def test_a_policy_with_adapters_takes_a_reference_when_it_is_told_to_be_none() -> None:
    """`is_peft_model=False` with `optional_peft_ctx`, as scripts for TRL write it, in either order."""
    for order in (1, -1):
        assigned, built = trainer_of(policy(lora=True)), trainer_of(policy(lora=True), policy(1))
        for name, value in (("is_peft_model", False), ("optional_peft_ctx", nullcontext), ("ref_model", policy(1)))[
            ::order
        ]:
            setattr(assigned, name, value)
        assert_same_steps(built, assigned)


def test_a_policy_with_adapters_is_its_own_reference_again_when_it_is_told_to_be() -> None:
    assigned, built = trainer_of(policy(lora=True), policy(1)), trainer_of(policy(lora=True))
    assigned.is_peft_model = False
    assigned.is_peft_model = True
    assert_same_steps(built, assigned)


def test_the_context_of_the_script_is_around_every_pass_of_the_reference() -> None:
    """With a context that does nothing the policy is compared with itself: the KL stays 0 while it learns."""
    trainer = trainer_of(policy(lora=True))
    trainer.optional_peft_ctx = nullcontext
    assert [step(trainer)["objective/kl"] for _ in range(2)] == [0.0, 0.0]
    learned = trainer_of(policy(lora=True))
    assert [step(learned)["objective/kl"] > 0 for _ in range(2)] == [False, True]


SETTINGS: dict[str, Any] = {
    "cliprange": 0.01, "cliprange_value": 0.01, "vf_coef": 1.0, "gamma": 0.5, "lam": 0.5, "ent_coef": 0.1,
    "temperature": 0.9, "kl_penalty": "abs", "kl_placement": "loss", "init_kl_coef": 2.0, "adap_kl_ctrl": False,
    "target": 0.1, "horizon": 10.0, "learning_rate": 2e-3, "max_grad_norm": 0.01, "ppo_epochs": 1,
    "mini_batch_size": 2, "forward_batch_size": 2, "score_clip": 0.1, "whiten_rewards": True, "use_score_scaling": True,
}  # fmt: skip


def test_settings_changed_later_are_those_of_a_trainer_built_with_them() -> None:
    several = {name: SETTINGS[name] for name in list(SETTINGS)[:7]}
    assigned, built = trainer_of(ref_model=policy(1)), trainer_of(ref_model=policy(1), settings=several)
    for name, value in several.items():
        setattr(assigned.config, name, value)
    assert_same_steps(built, assigned)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_changed_later_counts(name: str) -> None:
    """Two steps are those of a trainer built with it, and not those of one built without it."""
    assigned, without = (trainer_of(ref_model=policy(1)) for _ in range(2))
    built = trainer_of(ref_model=policy(1), settings={name: SETTINGS[name]})
    setattr(assigned.config, name, SETTINGS[name])
    assert_same_steps(built, assigned)
    for _ in range(2):
        step(without)
    assert not torch.equal(weights(assigned), weights(without)) or assigned.kl_ctl.value != without.kl_ctl.value


def test_every_other_setting_is_free_or_refused_and_stays_as_it_was() -> None:
    """Those that are read once: seed, trackers, precision, ...; names for trackers may change."""
    trainer = trainer_of()
    trainer.config.model_name, trainer.config.batch_size, trainer.config.output_dir = "other", 4, "runs"
    assert trainer.config.global_batch_size == 4
    for name, value in {
        "seed": 1, "log_with": "tensorboard", "accelerator_kwargs": {"cpu": True}, "optimizer": "adamw",
        "world_size": 2, "packing": False, "gradient_checkpointing": True, "adam_eps": 1e-5,
        "reference_placement": "offloaded", "is_peft_model": True, "backward_batch_size": 2,
    }.items():  # fmt: skip
        before = getattr(trainer.config, name)
        with pytest.raises(ValueError, match=rf"PPOConfig\.{name} is read when the trainer is built"):
            setattr(trainer.config, name, value)
        assert getattr(trainer.config, name) == before


def test_a_wrong_value_is_refused_at_the_assignment() -> None:
    trainer = trainer_of()
    for name, value in {"lam": 2.0, "temperature": 0.0, "mini_batch_size": 0, "cliprange": "a"}.items():
        before = getattr(trainer.config, name)
        with pytest.raises((ValueError, TypeError), match=name):
            setattr(trainer.config, name, value)
        assert getattr(trainer.config, name) == before
    step(trainer)


@pytest.mark.parametrize("name", ["mini_batch_size", "gradient_accumulation_steps"])
def test_sizes_that_do_not_divide_the_batch_are_refused_before_the_step(name: str) -> None:
    """Not at the assignment, since another one may follow: a row left over would weigh as much as all others."""
    trainer = trainer_of()
    before = weights(trainer)
    setattr(trainer.config, name, 4)
    with pytest.raises(ValueError, match=r"`batch_size` must be a multiple of .*: 2 / 4 = 0\.5"):
        step(trainer)
    assert torch.equal(weights(trainer), before)
    trainer.config.batch_size = 4
    trainer.step(QUERIES * 2, RESPONSES * 2, SCORES * 2)


def test_settings_that_are_changed_before_the_trainer_is_built_are_checked_and_derived_then() -> None:
    config = config_of()
    config.mini_batch_size = 4
    with pytest.raises(ValueError, match=r"`batch_size` must be a multiple of .*: 2 / 4 = 0\.5"):
        PPOTrainer(config, policy(), None, tiny_tokenizer())
    config.batch_size = 8
    PPOTrainer(config, policy(), None, tiny_tokenizer())
    assert (config.global_backward_batch_size, config.total_ppo_epochs) == (4, 2500)
    with pytest.raises(ValueError, match="mini_batch_size must be at least 1, got 0"):
        PPOConfig(forward_batch_size=0)


def test_settings_of_what_the_script_has_made_itself_are_refused() -> None:
    """An algorithm, an optimizer, a controller of one's own does not read them."""
    model = policy()
    trainer = trainer_of(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), algorithm=PPOPenalty())
    with pytest.raises(ValueError, match=r"cliprange does not belong to this trainer's algorithm"):
        trainer.config.cliprange = 0.5
    with pytest.raises(ValueError, match=r"learning_rate belongs to the default optimizer"):
        trainer.config.learning_rate = 0.5

    class Own(FixedKLController):
        pass

    trainer.kl_ctl = Own(0.5)
    with pytest.raises(ValueError, match=r"target does not belong to trainer\.kl_ctl, a Own of yours"):
        trainer.config.target = 1.0


def test_what_cannot_be_exchanged_is_refused_at_the_assignment() -> None:
    trainer, plain = trainer_of(), tiny_gpt2()
    seq2seq = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5())
    for name, value, message in [
        ("model", plain, "model must be a PreTrainedModelWrapper"),
        ("model", trainer.ref_model, "same object"),
        ("model", seq2seq, "cannot change between a causal model and an encoder-decoder"),
        ("ref_model", plain, "ref_model must be a PreTrainedModelWrapper"),
        ("ref_model", trainer.model, "same object"),
        ("ref_model", None, "nothing is left to measure the KL to"),
        ("is_peft_model", True, "needs a policy with adapters"),
        ("optional_peft_ctx", 1, "a function that returns a context manager"),
        ("optimizer", "adam", r"must be a torch\.optim\.Optimizer"),
        ("lr_scheduler", "cosine", "lr_scheduler must be a"),
        ("lr_scheduler", torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer), "needs no metric"),
        ("config", config_of(), r"Set the fields of trainer\.config"),
        ("accelerator", object(), "would not follow"),
        ("algorithm_config", PPOPenalty(), "would not follow"),
    ]:
        with pytest.raises(ValueError, match=message):
            setattr(trainer, name, value)
    step(trainer)


def test_an_optimizer_that_needs_a_closure_is_refused_when_it_is_given() -> None:
    trainer, model = trainer_of(), policy()
    with pytest.raises(ValueError, match="got LBFGS, whose step"):
        trainer.optimizer = torch.optim.LBFGS(trainer.model.parameters())
    with pytest.raises(ValueError, match="got LBFGS, whose step"):
        trainer_of(model, optimizer=torch.optim.LBFGS(model.parameters()))
    step(trainer)


def test_a_schedule_at_its_end_is_refused_before_the_weights_move() -> None:
    model = policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=2)
    trainer = trainer_of(model, optimizer=optimizer, lr_scheduler=schedule)
    step(trainer), step(trainer)
    before = weights(trainer).clone()
    with pytest.raises(ValueError, match="got OneCycleLR after all its 2 steps"):
        step(trainer)
    assert torch.equal(weights(trainer), before)
    trainer.lr_scheduler = None
    step(trainer)


def test_one_configuration_serves_trainer_after_trainer_and_copies_are_free() -> None:
    config = config_of()
    first = PPOTrainer(config, policy(), None, tiny_tokenizer())
    second = PPOTrainer(config, policy(lora=True), None, tiny_tokenizer())
    config.cliprange = 0.01
    assert first.algorithm_config == second.algorithm_config == config.algorithm()
    for free in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config, seed=2)):
        free.seed = 3
        assert free.cliprange == 0.01
    assert config.seed == 0


def test_a_vocabulary_that_is_resized_in_a_model_in_use_is_refused() -> None:
    """The reference has fewer tokens; where it has as many, the optimizer would move tensors that were replaced."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama())
    trainer = trainer_of(model)
    before = weights(trainer)[:100].clone()
    for resized, message in ((trainer.model, "330 token embeddings, got 320"), (trainer.ref_model, "were replaced")):
        resized.pretrained_model.resize_token_embeddings(330, mean_resizing=False)  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=message):
            step(trainer)
    assert torch.equal(weights(trainer)[:100], before)


def test_an_optimizer_may_hold_tensors_besides_the_models() -> None:
    model, own = policy(), torch.nn.Parameter(torch.zeros(1))
    step(trainer_of(model, optimizer=torch.optim.SGD([*model.parameters(), own], lr=1e-3)))


@pytest.mark.parametrize("later", ["unfrozen", "critic"])
def test_parameters_that_came_after_the_optimizer_are_refused_until_one_holds_them(later: str) -> None:
    model: Any = policy()
    model.pretrained_model.transformer.h[0].requires_grad_(False)
    trainer = trainer_of(model)
    step(trainer)
    if later == "critic":
        attach_critic(model, SeparateCritic.from_policy(model))
    else:
        model.pretrained_model.transformer.h[0].requires_grad_(True)
    with pytest.raises(ValueError, match="more, unfrozen or attached since then"):
        step(trainer)
    part: Any = model.critic if later == "critic" else model.pretrained_model.transformer.h[0]
    before = torch.cat([parameter.detach().flatten() for parameter in part.parameters()])
    trainer.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step(trainer)
    assert not torch.equal(torch.cat([parameter.detach().flatten() for parameter in part.parameters()]), before)
