"""Load a classifier that this package trained, whole or as an adapter, and check that its files belong together."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoTokenizer

from reward_model.models.backbone import head_name, read_classifier, separate_padding
from reward_model.models.contract import Contract, ContractError, tokenizer_sha256
from rlhf_ppo.models.trunk import learned_positions

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_classifier(folder: Path, contract: Contract, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load the classifier of `folder`; raise if its checkpoint lacks the head.

    transformers initializes a missing head at random and only logs it: rewards would silently be noise.
    """
    if (folder / ADAPTER_FILE).is_file():
        return load_adapter(folder, head=contract.head, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        model, missing, _ = read_classifier(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ContractError(f"{folder} holds a contract, but no model that can be loaded: {error}") from error
    if missing:
        raise ContractError(
            f"{folder}: field head names {contract.head!r}, but the checkpoint lacks or misshapes {sorted(missing)}: "
            "they would be random numbers. Save the reward model again with save_pretrained, head included."
        )
    if head_name(model) != contract.head:
        raise ContractError(
            f"{folder}: field head names {contract.head!r}, but the model's scalar head is {head_name(model)!r}: the "
            "weights do not belong to this contract. Restore the folder that training wrote."
        )
    return model


def load_adapter(folder: Path, *, head: str | None, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load the base model with the adapter of `folder`.

    Args:
        folder: The adapter and its tokenizer.
        head: Parameter name of the scalar head; a tokenizer without a padding token of its own gets one. None: the
            model's last layer with one output, and the tokenizer as it is.

    Raises:
        ContractError: The adapter does not hold the head or weights that its base lacks, or the base cannot be loaded.
            Without this check they would silently be random.
    """
    config = PeftConfig.from_pretrained(str(folder))
    try:
        name = str(config.base_model_name_or_path)
        base, missing, _ = read_classifier(name, dtype=dtype, trust_remote_code=trust_remote_code)
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
    held = {key.removeprefix("base_model.model.").replace(".modules_to_save", "") for key in saved}
    if lacking := sorted(missing - held):
        raise ContractError(
            f"{folder}: neither the adapter nor its base {config.base_model_name_or_path!r} holds {lacking[:4]}: they "
            "would be random numbers. Train with merge_adapter=True, or with these layers in modules_to_save."
        )
    if head is not None:
        separate_padding(base, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
    return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)


def check_tokenizer(tokenizer: Any, model: Any, contract: Contract, folder: Path) -> None:
    """Check that the tokenizer is that of the training, and that the model has enough positions."""
    found = tokenizer_sha256(tokenizer)
    if found != contract.tokenizer_sha256:
        raise ContractError(
            f"{folder}: field tokenizer_sha256 is {contract.tokenizer_sha256[:12]}..., the tokenizer in the folder has "
            f"{found[:12]}...: it would make other tokens than the training did. Restore the tokenizer files that "
            "training wrote; the policy's tokenizer does not belong here."
        )
    check_length(model, contract, folder)


def check_length(model: Any, contract: Contract, folder: str | Path) -> None:
    """Check that learned positions reach to the end of the longest text; rotary ones go on."""
    limit = learned_positions(model)
    if limit is not None and contract.text.max_length > limit:
        raise ContractError(
            f"{folder}: field text.max_length is {contract.text.max_length}, the model has {limit} positions."
        )
