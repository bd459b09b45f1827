"""LoRA adapters of a reward model: configure, merge, and load with their scalar head."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from reward_model.backbone import head_name, separate_padding
from reward_model.contract import Contract, ContractError

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def lora_config(model: Any, *, rank: int, alpha: int) -> LoraConfig:
    """LoRA configuration: adapters on every linear layer; the head is fully trained and saved.

    Args:
        model: The classifier to be adapted.
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
    """
    head = head_name(model).removesuffix(".weight").split(".")[0]
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's weights are transposed
        modules_to_save=[head],
    )


def plain_model(trained: Any, *, merge: bool) -> tuple[Any, Any]:
    """(model to score with, model to save): merged weights, or the adapted model and its adapter."""
    if not isinstance(trained, PeftModel):
        return trained, trained
    if merge:
        merged = trained.merge_and_unload()
        return merged, merged
    return trained, trained


def load_adapter(folder: Path, contract: Contract, *, dtype: torch.dtype) -> Any:
    """Load the base model with the adapter of `folder`.

    Raises:
        ContractError: The adapter does not hold the head, or its base model cannot be loaded. Without this check
            a missing head would silently be random.
    """
    head = contract.head.removesuffix(".weight").split(".")[-1]
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = list(file.keys())
    if not any(f"{head}." in key and "lora_" not in key for key in saved):
        raise ContractError(
            f"{folder}: field head names {contract.head!r}, but the adapter holds no such weight: the head would be "
            "random. Save the adapter with modules_to_save=[head], or merged (merge_adapter=True)."
        )
    config = PeftConfig.from_pretrained(str(folder))
    try:
        base = AutoModelForSequenceClassification.from_pretrained(
            config.base_model_name_or_path, num_labels=1, dtype=dtype, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{folder} is a LoRA adapter on {config.base_model_name_or_path!r}, which cannot be loaded: {error} "
            "Restore the base model, or train with merge_adapter=True."
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(folder)
    separate_padding(base, tokenizer)
    return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
