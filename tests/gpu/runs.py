"""Small runs for the pretended device: eight responses, one batch."""

from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_ppo import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.models.critic import SeparateCritic, attach_critic
from tests.support.tiny_models import tiny_llama, tiny_tokenizer

LENGTHS = (3, 1, 5, 7, 2, 8, 4, 6)


def trainer(
    model: PreTrainedModel | None = None, *, algorithm: Any = None, peft: Any = None, shared: int | None = None,
    critic: bool = False, **settings: Any,
):  # fmt: skip
    """A trainer of a two-layer model on the device."""
    torch.manual_seed(0)
    model = tiny_llama() if model is None else model
    kind = AutoModelForSeq2SeqLMWithValueHead if model.config.is_encoder_decoder else AutoModelForCausalLMWithValueHead
    wrapped = kind.from_pretrained(model, peft_config=peft)
    if critic:
        attach_critic(wrapped, SeparateCritic.from_policy(wrapped))
    defaults: dict[str, Any] = {"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 1, "learning_rate": 1e-3}
    config = PPOConfig(**defaults | settings)
    return PPOTrainer(config, wrapped, tokenizer=tiny_tokenizer(), algorithm=algorithm, num_shared_layers=shared)


def batch(*, on_device: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Queries, responses of unequal length, scores."""
    device = "cuda" if on_device else "cpu"
    queries = [torch.tensor([5, 6, 7][: 1 + row % 3], device=device) for row in range(8)]
    responses = [torch.arange(8, 8 + length, device=device) for length in LENGTHS]
    return queries, responses, [torch.tensor(float(row), device=device) for row in range(8)]


def weights(of: PPOTrainer) -> torch.Tensor:
    """All weights in one vector on the CPU."""
    return torch.cat([parameter.detach().cpu().flatten() for parameter in of.model.parameters()])
