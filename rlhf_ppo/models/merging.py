"""Merge a policy's adapter into its base model and save a plain transformers model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf_ppo.models.pretrained import PreTrainedModelWrapper


@contextmanager
def preserve_base_weights(model: nn.Module) -> Iterator[None]:
    """Context manager: on exit, restore the weights below adapters bit for bit.

    Merging and unmerging adapters leaves rounding errors in the base, which is the reference policy. The copy is on the
    CPU.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    saved = [
        (parameter, parameter.detach().to("cpu", copy=True))
        for layer in layers
        for parameter in layer.get_base_layer().parameters()
    ]
    try:
        yield
    finally:
        for parameter, value in saved:
            parameter.data.copy_(value)


def save_merged(model: PreTrainedModelWrapper, folder: str | os.PathLike[str]) -> None:
    """Save the policy as a plain transformers model: its adapter merged into the base, without value head.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it without PEFT. The policy itself does not change: it can be
    trained further, and its reference stays the same bit for bit. Parameters must not be sharded.

    Args:
        model: A policy with adapters, or without (then its language model is saved unchanged).
        folder: Created if missing.

    Raises:
        ValueError: The base is quantized.
    """
    language_model: Any = model.pretrained_model
    if not model.is_peft_model:
        language_model.save_pretrained(os.fspath(folder))
        return
    if model.is_loaded_in_4bit or model.is_loaded_in_8bit:
        raise ValueError(
            "expected a base in float32, bfloat16 or float16, got one in 4 or 8 bits: the sum of base and adapter "
            "would be rounded to those few bits again, and would not be the policy that was trained. Save the adapter "
            "(`save_pretrained`), then merge it into the unquantized base: `python -m rlhf_ppo.merge ADAPTER FOLDER`."
        )
    name = str(model.policy_adapter_name)
    with preserve_base_weights(language_model):
        language_model.base_model.merge_adapter(adapter_names=[name])
        try:
            state = merged_state_dict(language_model, name)
            language_model.get_base_model().save_pretrained(Path(folder), state_dict=state)
        finally:
            language_model.base_model.unmerge_adapter()


def merged_state_dict(model: PeftModel, name: str) -> dict[str, Tensor]:
    """The merged weights of `model` under the names of a model without adapters.

    Args:
        model: A model whose adapter is merged.
        name: The adapter, whose full copies of modules (`modules_to_save`) replace those of the base.
    """
    tuner: Any = model.base_model
    state: dict[str, Tensor] = tuner.model.state_dict()
    copies = f".modules_to_save.{name}."
    merged = {key.replace(copies, "."): tensor for key, tensor in state.items() if copies in key}
    for key, tensor in state.items():
        if tuner.prefix not in key and ".modules_to_save." not in key:
            merged.setdefault(key.replace(".base_layer.", ".").replace(".original_module.", "."), tensor)
    return merged
