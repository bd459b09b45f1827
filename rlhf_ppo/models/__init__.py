"""Policies: language models with a value head, and their frozen references."""

import sys

from rlhf_ppo.models.critic import SeparateCritic, attach_critic
from rlhf_ppo.models.merging import save_merged
from rlhf_ppo.models.pretrained import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
)
from rlhf_ppo.models.reference import create_reference_model, prepare_reference_adapter, reference_adapter
from rlhf_ppo.models.shared_base_adapters import attach_critic_adapter, attach_reward_adapter
from rlhf_ppo.models.value_head import ValueHead
from rlhf_ppo.utils.classic_paths import CLASSIC_PATHS, lend_names
from rlhf_ppo.utils.moved_names import forward_old_names

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "SeparateCritic",
    "ValueHead",
    "attach_critic",
    "attach_critic_adapter",
    "create_reference_model",
    "prepare_reference_adapter",
    "attach_reward_adapter",
    "reference_adapter",
    "save_merged",
]

forward_old_names(__name__)
lend_names(sys.modules[__name__], "models", CLASSIC_PATHS["models"])
