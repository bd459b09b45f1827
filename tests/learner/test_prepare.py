"""Policy and reference run by the same layers, whatever becomes of the fast ones."""

import pytest
import torch
from torch import Tensor

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
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
