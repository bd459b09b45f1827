"""Merge a policy's adapter into its base model and save a plain transformers model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rlhf_ppo.models.adapters import merged_model
from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.models.lm_head import relative_gap
from rlhf_ppo.models.pretrained import PreTrainedModelWrapper
from rlhf_ppo.models.saving import save_language_model
from rlhf_ppo.models.small_batch import is_low_precision, small_batch
from rlhf_ppo.models.trunk import call_model


@contextmanager
def preserve_base_weights(model: nn.Module) -> Iterator[None]:
    """Context manager: on exit, restore the weights below adapters bit for bit, and unmerge what an error left merged.

    Merging and unmerging adapters leaves rounding errors in the base, which is the reference policy. The copy is on the
    CPU.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    saved = [
        (parameter, parameter.detach().to("cpu", copy=True))
        for layer in layers
        for parameter in layer.get_base_layer().parameters()
    ]
    merged = [layer for layer in layers if layer.merged]
    try:
        yield
    finally:
        for layer in layers:
            if layer.merged and layer not in merged:
                layer.unmerge()
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
        ValueError: The base is quantized, or the merged model would be another one than the policy.
    """
    language_model: Any = model.pretrained_model
    if not model.is_peft_model:
        save_language_model(language_model, os.fspath(folder))
        return
    if model.is_loaded_in_4bit or model.is_loaded_in_8bit:
        raise ValueError(
            "expected a base in float32, bfloat16 or float16, got one in 4 or 8 bits: the sum of base and adapter "
            "would be rounded to those few bits again, and would not be the policy that was trained. Save the adapter "
            "(`save_pretrained`), then merge it into the unquantized base: `python -m rlhf_ppo.merge ADAPTER FOLDER`."
        )
    try:
        merged = merged_model(language_model, str(model.policy_adapter_name))
    except (NotImplementedError, RuntimeError, TypeError) as error:  # PEFT's words for what it cannot merge
        raise ValueError(
            f"expected an adapter that PEFT can merge, got {language_model.active_peft_config.peft_type}: {error} Save "
            "it with `save_pretrained`, and load it with PEFT."
        ) from error
    prompt = torch.cat(list(small_batch(merged).prompts))[None]
    with torch.no_grad(), EvalMode(language_model):
        given = {"input_ids": prompt} | ({"decoder_input_ids": prompt} if model.is_encoder_decoder else {})
        logits = [call_model(each, **given).logits for each in (merged.eval(), language_model.get_base_model())]
    gap = relative_gap(*logits)
    if not gap <= (0.1 if is_low_precision(merged) else 1e-3):
        raise ValueError(
            f"expected the merged model to give the policy's logits, got a gap of {gap:.1e} of the largest: this "
            "kind of adapter cannot be merged. Save it with `save_pretrained`, and load it with PEFT."
        )
    save_language_model(merged, Path(folder))
