"""Claims of docs/migrating-from-trl.md beyond its table of defects, which has tests/classic/test_classic_defects.py."""

from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from peft import LoraConfig

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("per_token", [False, True])
def test_integer_and_per_token_scores_are_welcome(per_token: bool) -> None:
    """The response of two tokens earns 3, as one number or as 1 + 2."""
    config = PPOConfig(batch_size=2, mini_batch_size=2)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    trainer = PPOTrainer(config, model, None, tiny_tokenizer())
    score = torch.tensor([1, 2]) if per_token else torch.tensor(3)
    stats = trainer.step([torch.tensor([60, 61])] * 2, [torch.tensor([70, 71])] * 2, [score] * 2)
    assert stats["ppo/mean_scores"] == 3.0


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        PPOConfig(learning_rat=1.0)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="learning_rat"):
        PPOConfig().learning_rat = 1.0  # type: ignore[attr-defined]


def trainer_of(model: Any = None, ref_model: Any = None) -> PPOTrainer:
    config = PPOConfig(batch_size=2, mini_batch_size=2, diagnose=False, ppo_epochs=1, kl_penalty="mse")
    return PPOTrainer(config, model or policy(), ref_model, tiny_tokenizer())


def policy(**adapter: Any) -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama() if adapter else tiny_gpt2(), **adapter)


def adapted(**settings: Any) -> AutoModelForCausalLMWithValueHead:
    return policy(peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, **settings))


def statistics(trainer: PPOTrainer) -> dict[str, Any]:
    queries, responses = [torch.tensor([60, 61, 62])] * 2, [torch.tensor([70]), torch.tensor([71, 72])]
    return dict(trainer.step(queries, responses, [torch.tensor(1.0)] * 2))


def test_difference_1_one_object_as_policy_and_reference_is_refused() -> None:
    model = policy()
    with pytest.raises(ValueError, match=r"the KL penalty would always be 0\. Pass `ref_model=None`"):
        trainer_of(model, model)


def test_difference_2_a_reference_beside_adapters_is_used() -> None:
    assert statistics(trainer_of(adapted(), policy()))["objective/kl"] > 0.01
    trainer = trainer_of(adapted(), policy())
    trainer.is_peft_model = True
    assert statistics(trainer)["objective/kl"] == pytest.approx(0.0, abs=1e-6)


def test_difference_3_trained_biases_of_the_base_are_refused() -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, bias="lora_only", fan_in_fan_out=True)  # GPT-2 has biases
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora)
    with pytest.raises(ValueError, match=r"trained parameters of the base.*Use bias='none'"):
        trainer_of(model)


@pytest.mark.parametrize(("name", "value"), [("steps", 1e4), ("seed", None), ("learning_rate", "1e-5")])
def test_difference_4_settings_have_their_types(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user meets is our own message
    with pytest.raises(TypeError, match=rf"PPOConfig\.{name} must be a (whole )?number"):
        PPOConfig(**{name: value})


def test_difference_5_statistics_hold_response_tokens_only() -> None:
    """Responses of 1 and 2 tokens behind prompts of 3: arrays of 2 x 2, and 3 actions."""
    result = statistics(trainer_of())
    assert result["objective/logprobs"].shape == result["objective/ref_logprobs"].shape == (2, 2)
    assert result["ppo/policy/advantages"].shape == result["ppo/policy/ratio"].shape == (3,)
    assert sum(isinstance(value, np.ndarray) for value in result.values()) == 7
    assert all(isinstance(value, np.ndarray | float) for value in result.values())


def test_difference_6_the_token_is_called_token(tmp_path: Path) -> None:
    policy().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="use_auth_token"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, use_auth_token=None)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, token=None)


def test_difference_7_every_returned_sequence_is_returned() -> None:
    queries = [torch.tensor([60, 61]), torch.tensor([62])]
    settings = {"do_sample": True, "max_new_tokens": 2, "num_return_sequences": 2}
    responses = trainer_of().generate(queries, **settings)
    assert [response[:1].tolist() for response in responses] == [[60], [60], [62], [62]]
