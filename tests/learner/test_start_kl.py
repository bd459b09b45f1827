"""The KL of the first batch is 0 under adapters, or the run does not begin."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.tiny_models import tiny_llama, tiny_tokenizer
from tests.support.tiny_run import TEXTS, config, parameters, share_of_e

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def trainer(model: Any, **settings: Any) -> PPOTrainer:
    tokenizer = tiny_tokenizer()
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(model, **settings)
    sizes = PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=0.01)
    return PPOTrainer(sizes, wrapped, tokenizer=tokenizer, dataset=PromptDataset.from_texts(TEXTS, tokenizer))


def fresh(model: Any = None) -> PPOTrainer:
    torch.manual_seed(0)
    return trainer(model or tiny_llama(), peft_config=LoraConfig(**LORA))


def move_adapters(own: PPOTrainer) -> None:
    with torch.no_grad():
        for name, parameter in own.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize(
    "adapters",
    [LoraConfig(**LORA), LoraConfig(**LORA, use_dora=True), LoraConfig(**LORA, init_lora_weights="pissa"),
     IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")],
    ids=["LoRA", "DoRA", "PiSSA", "IA3"],
)  # fmt: skip
def test_the_first_kl_is_zero_whatever_the_kind_of_adapter(adapters: Any) -> None:
    own = trainer(tiny_llama(), peft_config=adapters)
    state = own.train(share_of_e, config(iterations=2))
    assert abs(state.history[0]["objective/kl"]) < 1e-4 < abs(state.history[1]["objective/kl"])
    assert not own.start_kl_check.is_due


def test_an_adapter_that_left_the_reference_before_the_first_batch_is_refused_and_nothing_moves() -> None:
    own = fresh()
    move_adapters(own)
    before = parameters(own).clone()
    with pytest.raises(ValueError, match=r"agree before .* nats a token: the reference is the base with"):
        own.train(share_of_e, config(iterations=1))
    assert torch.equal(parameters(own), before) and own.start_kl_check.is_due


@pytest.mark.slow
def test_a_resumed_run_and_one_that_goes_on_from_a_saved_policy_may_start_away_from_the_reference(
    tmp_path: Path,
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    first = fresh(str(tmp_path / "base"))
    first.train(share_of_e, config(tmp_path / "run", iterations=1, save_every=1))
    resumed = fresh(str(tmp_path / "base"))
    state = resumed.train(share_of_e, config(tmp_path / "run", iterations=2))
    assert [abs(row["objective/kl"]) > 1e-3 for row in state.history] == [True]
    first.model.save_pretrained(tmp_path / "policy")
    again = trainer(str(tmp_path / "policy"), is_trainable=True)
    state = again.train(share_of_e, config(iterations=1))
    assert abs(state.history[0]["objective/kl"]) > 1e-3, "its reference is the base, as before"
    assert again.diagnosis is not None and "reference" not in again.diagnosis.names()


def test_a_trained_base_cannot_be_the_reference() -> None:
    """`bias='all'` trains the base's own biases: with adapters off, they stay trained."""
    biased = tiny_llama()
    biased.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match=r"got trained parameters of the base, such as .*bias.* Use bias='none'"):
        trainer(biased, peft_config=LoraConfig(**LORA, bias="all"))
