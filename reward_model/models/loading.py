"""Load a classifier that this package trained, and check that its files belong together."""

from pathlib import Path
from typing import Any

import torch

from reward_model.models.backbone import head_name, longest_input, read_classifier
from reward_model.models.contract import Contract, ContractError, tokenizer_sha256
from reward_model.models.lora import ADAPTER_FILE, load_adapter


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


def check_tokenizer(tokenizer: Any, model: Any, contract: Contract, folder: Path) -> None:
    """Check that the tokenizer is that of the training, and that the model has enough positions."""
    found = tokenizer_sha256(tokenizer)
    if found != contract.tokenizer_sha256:
        raise ContractError(
            f"{folder}: field tokenizer_sha256 is {contract.tokenizer_sha256[:12]}..., the tokenizer in the folder has "
            f"{found[:12]}...: it would make other tokens than the training did. Restore the tokenizer files that "
            "training wrote; the policy's tokenizer does not belong here."
        )
    limit = longest_input(model)
    if limit is not None and contract.text.max_length > limit:
        raise ContractError(
            f"{folder}: field text.max_length is {contract.text.max_length}, the model has {limit} positions."
        )
