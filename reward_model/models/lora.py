"""Configure the LoRA adapters of a reward model, and load them with their scalar head."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from reward_model.models.backbone import head_name, read_classifier, separate_padding
from reward_model.models.contract import ContractError

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def lora_config(model: Any, *, rank: int, alpha: int) -> LoraConfig:
    """LoRA configuration: adapters on the backbone's linear layers; what is above it is fully trained and saved.

    Args:
        model: The classifier to be adapted.
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
    """
    head = head_name(model).removesuffix(".weight").split(".")[0]
    # DistilBERT's `pre_classifier` is as new as the head, and PEFT takes it for one by the end of its name.
    above = [name for name, part in model.named_children() if isinstance(part, nn.Linear)]
    saved = list(dict.fromkeys([head, *above]))
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's weights are transposed
        modules_to_save=saved,
        exclude_modules=[name for name in saved if name != head] or None,  # PEFT leaves out the head by itself
    )


def load_adapter(folder: Path, *, head: str | None, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load the base model with the adapter of `folder`.

    Args:
        folder: The adapter and its tokenizer.
        head: Parameter name of the scalar head; a tokenizer without a padding token of its own gets one. None: the
            model's last layer with one output, and the tokenizer as it is.
        dtype: Dtype of the weights.
        trust_remote_code: Whether Python code that comes with the base model may run.

    Raises:
        ContractError: The adapter does not hold the head, or its base model cannot be loaded. Without this check
            a missing head would silently be random.
    """
    config = PeftConfig.from_pretrained(str(folder))
    try:
        name = str(config.base_model_name_or_path)
        base, _, _ = read_classifier(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{folder} is a LoRA adapter on {config.base_model_name_or_path!r}, which cannot be loaded: {error} "
            "Restore the base model, or train with merge_adapter=True."
        ) from error
    name = head or head_name(base)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = list(file.keys())
    layer = name.removesuffix(".weight").split(".")[-1]
    if not any(f"{layer}." in key and "lora_" not in key for key in saved):
        raise ContractError(
            f"{folder}: field head names {name!r}, but the adapter holds no such weight: the head would be random. "
            "Save the adapter with modules_to_save=[head], or merged (merge_adapter=True)."
        )
    if head is not None:
        separate_padding(base, AutoTokenizer.from_pretrained(folder))
    return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
