"""Model shapes of a plan, by preset or from a config.json, without weights or downloads."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.models import AutoModelForCausalLMWithValueHead
from rlhf_ppo.plan.config import PlanConfig, PlanError

PRESETS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(),
    "1b": LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "7b": LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
    "70b": LlamaConfig(
        vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Shapes of GPT-2 small (124 M) and of the Llama family: 3.2 1B, 2 7B, 2 70B."""

DTYPES = {"float32": torch.float32, "bf16-mixed": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}


def model_config(name: str) -> PreTrainedConfig:
    """The model config of a preset or path; a PlanError if it is neither, or transformers does not know its kind."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.exists():
        raise PlanError(
            f"model {name!r} is neither a preset ({', '.join(PRESETS)}) nor a local folder or file: nothing is "
            "downloaded. Download the model's config.json and give its path."
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise PlanError(f"{name} holds no config.json of a transformers model: {str(error).splitlines()[0]}") from error
    if config.is_encoder_decoder:
        raise PlanError(f"{name} is an encoder-decoder: plans are for causal models")
    return config


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Copy a config with another number of layers."""
    content = config.to_dict() | {"num_hidden_layers": layers}
    if isinstance(content.get("layer_types"), list):
        content["layer_types"] = content["layer_types"][:layers]
    name = config.attribute_map.get("num_hidden_layers")
    if name is not None:
        content[name] = layers
    return type(config)(**content)


def build_policy(config: PreTrainedConfig, plan: PlanConfig) -> Any:
    """Build the policy with value head and the plan's adapters. Call it on the meta device."""
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[plan.precision])
    adapters = None
    if plan.lora_rank:
        adapters = LoraConfig(
            r=plan.lora_rank, lora_alpha=2 * plan.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
        )  # fmt: skip
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=adapters)
    if plan.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy
