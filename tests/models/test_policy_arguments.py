"""What a policy cannot be trained with is refused in a sentence before anything moves."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, SeparateCritic, attach_critic
from rlhf_ppo.models.shared_base_adapters import attach_critic_adapter
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}


def trainer_of(model: Any, *given: Any, optimizer: Any = None, dataset: Any = None, **settings: Any) -> PPOTrainer:
    config = PPOConfig(batch_size=2, mini_batch_size=2, **settings)
    return PPOTrainer(config, model, *(given or (None,)), tiny_tokenizer(), dataset, optimizer)


def policy(model: Any = None, **settings: Any) -> Any:
    return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama() if model is None else model, **settings)


def test_an_adapter_loaded_frozen_is_refused_and_loads_trainable(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "base"), peft_config=LoraConfig(**LORA))
    base.save_pretrained(tmp_path / "adapter")
    frozen = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter", peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer_of(frozen)
    trainer_of(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter", is_trainable=True))


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers' adapters need peft {MIN_PEFT_VERSION}"
)
def test_adapters_of_transformers_own_are_refused() -> None:
    model = tiny_llama()
    model.add_adapter(LoraConfig(**LORA))
    with pytest.raises(ValueError, match="adapters of transformers' own"):
        policy(model)
    with pytest.raises(ValueError, match="adapters of transformers' own"):
        policy(model, peft_config=LoraConfig(**LORA))
    model = policy()
    model.pretrained_model.add_adapter(LoraConfig(**LORA))
    with pytest.raises(ValueError, match="adapters of transformers' own"):
        trainer_of(model)


@pytest.mark.parametrize("lora", [None, LoraConfig(**LORA)])
def test_a_reference_around_the_trained_model_is_refused_and_nothing_is_frozen(lora: LoraConfig | None) -> None:
    """PEFT puts its layers into the base it is given, so that this reference would have the policy's adapter."""
    base = tiny_llama()
    reference, model = policy(base), policy(base, peft_config=lora)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="the reference would move with the policy"):
        trainer_of(model, reference)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_two_active_adapters_are_refused() -> None:
    """The trainer switched to the first, and the policy lost the other."""
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    model.add_adapter("second", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"expected one active adapter, got \['default', 'second'\]"):
        policy(model)


def test_a_reference_with_fewer_tokens_than_the_policy_is_refused() -> None:
    model, reference = policy(), policy()
    model.pretrained_model.resize_token_embeddings(330)
    with pytest.raises(ValueError, match="330 token embeddings, got 320"):
        trainer_of(model, reference)


@pytest.mark.parametrize("settings", [{"max_grad_norm": 0.0}, {"init_kl_coef": -0.1}])
def test_settings_that_stop_or_turn_learning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PPOConfig(**settings)  # type: ignore[arg-type]


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        trainer_of(policy(), optimizer=torch.optim.Adam(policy().parameters(), lr=1e-3))


def test_an_optimizer_without_the_value_head_is_said() -> None:
    model = policy()
    with pytest.warns(UserWarning, match="does not hold the value head"):
        trainer_of(model, optimizer=torch.optim.Adam(model.pretrained_model.parameters(), lr=1e-3))


@pytest.mark.parametrize(
    "attach", [lambda model: attach_critic(model, SeparateCritic.from_policy(model)), attach_critic_adapter]
)
def test_an_optimizer_that_was_built_before_the_critic_is_said(attach: Any) -> None:
    model = policy(peft_config=LoraConfig(**LORA))
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad])
    attach(model)
    with pytest.warns(UserWarning, match=r"does not hold the value head or critic \(critic\."):
        trainer_of(model, optimizer=optimizer)


def test_a_dataset_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least batch_size=2 rows"):
        trainer_of(policy(), dataset=torch.utils.data.TensorDataset(torch.ones(1, 3)))


def test_tokens_and_lengths_beyond_the_model_are_refused_in_generate() -> None:
    trainer = trainer_of(policy(tiny_gpt2()))
    for settings in ({"max_new_tokens": 4, "do_sample": False}, {"max_length": 12, "num_beams": 2}):
        with pytest.raises(ValueError, match="below the model's 320 embeddings, got 400"):
            trainer.generate([torch.tensor([5, 400])], **settings)
    with pytest.raises(ValueError, match="max_position_embeddings = 128"):
        trainer.generate([torch.arange(5, 9)], max_length=200, num_beams=2)


def test_generate_cuts_at_any_stop_token_or_string_on_every_path() -> None:
    trainer = trainer_of(policy(tiny_gpt2()))
    queries = [torch.arange(5, 9), torch.arange(20, 27), torch.arange(40, 42)]
    stops = trainer.generate(queries, return_prompt=False, max_new_tokens=12, do_sample=False)
    middle = int(stops[0][4])
    for settings in ({"num_beams": 2}, {"min_length": 1}, {"no_repeat_ngram_size": 9}, {"suppress_tokens": [300]}):
        rows = trainer.generate(
            queries, return_prompt=False, max_new_tokens=12, do_sample=False, eos_token_id=[1, middle], **settings
        )
        for row in rows:
            assert not any(token in (1, middle) for token in row[:-1].tolist())
    text = tiny_tokenizer().decode([middle])
    for settings in ({}, {"num_beams": 2}):
        (row, *_) = trainer.generate(
            queries, return_prompt=False, max_new_tokens=12, do_sample=False, stop_strings=[text],
            tokenizer=tiny_tokenizer(), **settings,
        )  # fmt: skip
        assert text not in tiny_tokenizer().decode(row[:-1])


def test_rotary_positions_go_on_beyond_the_configured_length_and_a_table_does_not() -> None:
    """A rotary model has no table that could end; `train()` and `generate()` take such rows, too."""
    rows: Any = ([torch.arange(5, 25)] * 2, [torch.arange(30, 40)] * 2, [torch.tensor(1.0), torch.tensor(0.0)])
    rotary, table = tiny_llama(), tiny_gpt2(n_positions=16)
    rotary.config.max_position_embeddings = 16
    assert trainer_of(policy(rotary), diagnose=False).step(*rows)["objective/kl"] < 1e-5
    with pytest.raises(ValueError, match="the model has 16 positions"):
        trainer_of(policy(table)).step(*rows)
