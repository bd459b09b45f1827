"""PEFT adapters on a policy: which one is active, the one that stands for the reference, the one that scores."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

REFERENCE_ADAPTER = "reference"
SCORE_HEADS = ("score",)


@contextmanager
def unchanged_requires_grad(model: nn.Module) -> Iterator[None]:
    """Give every parameter its `requires_grad` back at the end: PEFT turns it on for whichever adapter it activates."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def active_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Run with the adapter `name` instead of the active one, and come back to that."""
    previous = model.active_adapter
    with unchanged_requires_grad(model):
        model.set_adapter(name)
    try:
        yield
    finally:
        with unchanged_requires_grad(model):
            model.set_adapter(previous)


@contextmanager
def no_adapter(model: PeftModel) -> Iterator[None]:
    """Run the base model: adapters off inside, and on again after."""
    with unchanged_requires_grad(model), model.disable_adapter():
        yield


def changes_the_base(model: PeftModel, name: str) -> bool:
    """Whether a LoRA adapter is already trained: a fresh one has B = 0, so it starts as the base model exactly."""
    ends = (f"lora_B.{name}.weight", f"lora_embedding_B.{name}")
    return any(bool(parameter.any()) for key, parameter in model.named_parameters() if key.endswith(ends))


def add_reference_adapter(model: PeftModel, source: str) -> None:
    """Add a frozen copy of the adapter `source` under the name "reference"."""
    config = copy.deepcopy(model.peft_config[source])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the plain start: others (PiSSA, LoftQ) would change the base's weights
    with unchanged_requires_grad(model):
        model.add_adapter(REFERENCE_ADAPTER, config)
        weights = get_peft_model_state_dict(model, adapter_name=source)
        set_peft_model_state_dict(model, weights, adapter_name=REFERENCE_ADAPTER)
    freeze_adapter(model, REFERENCE_ADAPTER)


def load_reference_adapter(model: PeftModel, folder: str) -> None:
    """Load the adapter saved in `folder` as the frozen "reference"."""
    with unchanged_requires_grad(model):
        model.load_adapter(folder, REFERENCE_ADAPTER, is_trainable=False)
    freeze_adapter(model, REFERENCE_ADAPTER)


def freeze_adapter(model: PeftModel, name: str) -> None:
    """Take the adapter `name` out of training."""
    for key, parameter in model.named_parameters():
        if f".{name}." in f"{key}.":
            parameter.requires_grad_(False)


def check_reward_source(source: object) -> None:
    """Refuse what no adapter can be loaded from.

    Raises:
        ValueError: Not a name or a folder.
    """
    if not isinstance(source, str):
        raise ValueError(
            "The `reward_adapter` argument should be a string representing the name of local path or the Hub id "
            f"to the Reward Modeling adapter, got {type(source)}: nothing can be loaded. "
            "Save the reward model's adapter and pass its folder."
        )


def add_reward_adapter(model: PeftModel, source: str, name: str, **hub_arguments: Any) -> nn.Linear:
    """Add a reward model's adapter under `name`, frozen, and give back its score head.

    Args:
        model: Carries the policy's adapter, which stays the active one.
        source: Folder or hub name of the adapter of a sequence classifier on the same base model.
        name: Of the new adapter.
        hub_arguments: For `huggingface_hub`, such as `token`.

    Raises:
        ValueError: When the folder holds no score head.
    """
    config = PeftConfig.from_pretrained(source, **hub_arguments)
    config.inference_mode = True
    config.modules_to_save = None  # the classifier's head is no part of a causal model: it is kept beside it
    weights: dict[str, Tensor] = load_peft_weights(source, device="cpu", **hub_arguments)
    heads = {key: tensor for key, tensor in weights.items() if _is_score(key)}
    kinds = {key.rsplit(".", 1)[-1]: tensor for key, tensor in heads.items()}
    if "weight" not in kinds:
        raise ValueError(
            f"The reward adapter in {source} has no score head, got the tensors {sorted(weights)[:4]} ...: nothing "
            "could turn its hidden states into rewards. Train it as a sequence classifier "
            "(LoraConfig(task_type='SEQ_CLS')), which saves `score` with the adapter."
        )
    with unchanged_requires_grad(model):
        model.add_adapter(name, config)
        rest = {key: tensor for key, tensor in weights.items() if key not in heads}
        set_peft_model_state_dict(model, rest, adapter_name=name)
    freeze_adapter(model, name)
    n_labels, width = kinds["weight"].shape
    score = nn.Linear(width, n_labels, bias="bias" in kinds, dtype=kinds["weight"].dtype)
    score.load_state_dict(kinds)
    device = next(model.parameters()).device
    return score.requires_grad_(False).to(torch.device("cpu") if device.type == "meta" else device)


def _is_score(key: str) -> bool:
    return any(part in SCORE_HEADS for part in key.split("."))
