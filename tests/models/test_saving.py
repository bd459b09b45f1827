"""What transformers thinks of a generation config never keeps trained weights from being saved."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.models.merging import save_merged
from rlhf_ppo.models.saving import save_language_model
from tests.support.tiny_models import tiny_gpt2


def like_llama_2() -> Any:
    """A model whose published settings are for sampling and do not ask for it."""
    model = tiny_gpt2()
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6, eos_token_id=1, pad_token_id=0)
    return model


@pytest.mark.parametrize("merged", [False, True])
def test_a_policy_is_saved_with_a_generation_config_that_transformers_would_refuse(
    merged: bool, tmp_path: Path
) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True) if merged else None
    base = like_llama_2()
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        base.generation_config.save_pretrained(tmp_path)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora)
    save_merged(policy, tmp_path) if merged else policy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.temperature, loaded.top_p, loaded.do_sample) == (0.9, 0.6, base.generation_config.do_sample)
    assert type(base.generation_config) is GenerationConfig


def test_a_model_without_a_generation_config_is_saved_as_ever(tmp_path: Path) -> None:
    save_language_model(tiny_gpt2().transformer, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "generation_config.json").exists()
