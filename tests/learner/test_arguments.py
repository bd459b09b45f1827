"""The setting that names the optimizer, and arguments that cannot act."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.learner.optimizer import default_optimizer
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer


def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    layers[0].requires_grad_(False)
    return layers


@pytest.mark.parametrize("name, decay", [("adam", 0.0), ("adamw", 0.01)])
def test_the_setting_chooses_and_only_trainable_parameters_take_part(name: str, decay: float) -> None:
    """AdamW moves a parameter without gradient's pull by -lr x decay; Adam does not."""
    policy = model()
    optimizer = default_optimizer(policy, PPOConfig(optimizer=name, learning_rate=0.1))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    weight = policy[1].weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * decay))


def test_fused_and_plain_steps_are_the_same() -> None:
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        policy = model()
        optimizer = default_optimizer(policy, PPOConfig(fused_adam=fused, learning_rate=0.1))
        for _ in range(3):
            policy(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        weights.append(policy[1].weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_eight_bits_without_a_gpu_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"needs a CUDA device.*Use optimizer='adamw'"):
        default_optimizer(model(), PPOConfig(optimizer="adamw_8bit"))


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="optimizer"):
        PPOConfig(optimizer="sgd")


@pytest.mark.parametrize(
    ("settings", "adapter", "found"),
    [({"kl_penalty": "none", "init_kl_coef": 0.0}, None, "'none'"), ({}, LoraConfig(fan_in_fan_out=True), "adapters")],
)
def test_layers_to_share_without_a_copied_reference_are_refused(
    settings: dict[str, Any], adapter: LoraConfig | None, found: str
) -> None:
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=adapter)
    config = PPOConfig(batch_size=2, mini_batch_size=2, **settings)
    with pytest.raises(ValueError, match=f"expected no num_shared_layers with .*{found}"):
        PPOTrainer(config, policy, tokenizer=tiny_tokenizer(), num_shared_layers=1)
