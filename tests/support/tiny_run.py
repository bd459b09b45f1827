"""A managed loop of milliseconds an iteration: four prompts, a tiny GPT-2, a reward for one letter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo import AlgorithmConfig, AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_tokenizer

TEXTS = ["The movie", "This film was", "I liked", "My morning began with"]
SAMPLING = SamplingConfig(max_new_tokens=6, stop_token_ids=(EOS_TOKEN_ID,))


def share_of_e(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
    """A reward that a random policy can climb: the share of one letter."""
    return [response.count("e") / max(1, len(response)) for response in responses]


def trainer(*, algorithm: AlgorithmConfig | None = None, **settings: Any) -> PPOTrainer:
    """A tiny trainer with its prompts."""
    tokenizer = tiny_tokenizer()
    prompts = PromptDataset.from_texts(TEXTS, tokenizer)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0))
    defaults: dict[str, Any] = {"batch_size": 8, "mini_batch_size": 4, "learning_rate": 1e-3, "ppo_epochs": 2}
    defaults["diagnose"] = False  # the doctor has tests of its own
    return PPOTrainer(
        PPOConfig(**defaults | settings), model, tokenizer=tokenizer, dataset=prompts, algorithm=algorithm
    )


def parameters(of: PPOTrainer) -> torch.Tensor:
    """All weights in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in of.model.parameters()])


def config(folder: Path | None = None, *, iterations: int = 4, **settings: Any) -> TrainConfig:
    """Quiet settings of the loop."""
    where = None if folder is None else str(folder)
    return TrainConfig(iterations=iterations, sampling=SAMPLING, progress=False, output_dir=where, **settings)
