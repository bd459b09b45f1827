"""A separate critic and a critic adapter read the states of the model's own call, whatever its architecture."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from rlhf_ppo import AutoModelForCausalLMWithValueHead, SeparateCritic
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.models.shared_base_adapters import attach_critic_adapter
from tests.models.zoo import PROMPTS, RESPONSES, build, own_scores

INPUTS = TokenInputs(prompts=PROMPTS, responses=RESPONSES)


def own_values(model: Any, head: torch.nn.Linear) -> list[torch.Tensor]:
    states = [own_scores(model, *pair)[1] for pair in zip(PROMPTS, RESPONSES, strict=True)]
    return [head(row).squeeze(-1) for row in states]


@pytest.mark.parametrize("name", ["llama4_text", "gemma3", "vision/llava", "vision/qwen2_vl"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_copy_of_a_policys_trunk_gives_values_of_its_own_states(name: str, adapters: bool) -> None:
    """With adapters, they are merged: a saved critic loads as a plain transformer."""
    model = build(name)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if adapters else None
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=config)
    critic = SeparateCritic.from_policy(policy)
    torch.nn.init.normal_(critic.head.weight)
    with torch.no_grad():
        for found, expected in zip(critic(INPUTS), own_values(model, critic.head), strict=True):
            assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not any("lora" in parameter for parameter, _ in critic.named_parameters())
    assert all(parameter.requires_grad for parameter in critic.parameters())


@pytest.mark.parametrize("name", ["llama4_text", "gemma3", "vision/llava", "vision/qwen2_vl"])
def test_a_critic_adapter_gives_values_of_the_bases_states(name: str) -> None:
    """A fresh adapter changes nothing, so the states are the base's."""
    model = build(name)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=config)
    attach_critic_adapter(policy)
    torch.nn.init.normal_(policy.critic.head.weight)
    with torch.no_grad():
        for found, expected in zip(policy.critic(INPUTS), own_values(model, policy.critic.head), strict=True):
            assert_close(found, expected, rtol=1e-3, atol=1e-3)
