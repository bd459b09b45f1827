"""Policy and reference run by the same layers, whatever becomes of the fast ones."""

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, SeparateCritic, attach_critic
from rlhf_ppo.kernels import fused_layers, fused_modules
from rlhf_ppo.kernels.linear_layers import has_fast_layers
from rlhf_ppo.models import scoring
from rlhf_ppo.models.fast_paths import prove_fast_paths
from tests.support.tiny_models import tiny_llama, tiny_tokenizer


def test_layers_that_are_declined_in_the_policy_are_declined_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_in_models(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return fused_layers.rms_norm(x, weight, eps) * (
            1.0 if x.dim() == 2 else 1.1
        )  # its own trial has two dimensions

    monkeypatch.setattr(fused_modules, "rms_norm", wrong_in_models)
    monkeypatch.setattr(scoring, "prove_fast_paths", prove_fast_paths)  # no proof of another test's
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama())
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2, diagnose=False), model, tokenizer=tiny_tokenizer())
    assert trainer.ref_model is not None
    assert not has_fast_layers(trainer.model)
    assert not has_fast_layers(trainer.ref_model)
    metrics = trainer.step(*([torch.tensor([5, 6]), torch.tensor([7])] for _ in range(2)), [torch.tensor(1.0)] * 2)
    assert metrics["objective/kl"] == 0


def test_a_frozen_bfloat16_base_stays_so_beside_a_separate_critic_that_gets_float32_masters() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama(dtype=torch.bfloat16), peft_config=config)
    attach_critic(model, SeparateCritic.from_policy(model))
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2, diagnose=False), model, tokenizer=tiny_tokenizer())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer.step(*([torch.tensor([5, 6]), torch.tensor([7])] for _ in range(2)), [torch.tensor(1.0)] * 2)
    dtypes = {weight.requires_grad: weight.dtype for name, weight in model.named_parameters() if "v_head" not in name}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    moved = {
        name.partition(".")[0] for name, weight in model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert moved == {"pretrained_model", "critic"}
