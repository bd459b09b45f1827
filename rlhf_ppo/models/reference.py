"""The frozen reference policy: a copy, possibly with shared lower layers, or the policy with another adapter."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from peft import PeftModel
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlhf_ppo.models import adapters
from rlhf_ppo.models.pretrained import PreTrainedModelWrapper

Model = TypeVar("Model", bound=nn.Module)

LAYER_PATTERNS = (
    "transformer.h.{layer}",
    "model.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",
    "transformer.blocks.{layer}",
    "transformer.layers.{layer}",
)
"""Parameter-name patterns of layer number `layer` in common architectures."""


def create_reference_model(model: Model, num_shared_layers: int | None = None, pattern: str | None = None) -> Model:
    """A frozen copy of `model` in eval mode, the π_ref of the KL penalty.

    With `num_shared_layers`, everything below layer n, embeddings included, is shared and frozen in `model` as well;
    only the layers above are copied. Output embeddings tied to the input embeddings are then frozen, too.

    Args:
        model: The policy before training, with its value head, or a plain language model.
        num_shared_layers: n, the number of lowest layers to share; None: copy all.
        pattern: Name pattern of layers, for an architecture not in `LAYER_PATTERNS`, such as
            "transformer.h.{layer}".

    Raises:
        ValueError: The parameters are sharded by ZeRO-3, or there is no layer n.
    """
    # A model loaded before Accelerate was set up is not sharded, at any stage.
    if is_deepspeed_zero3_enabled() and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 is enabled and is not compatible with `create_reference_model()`: this process holds "
            "only a shard of each parameter, so the copy would be empty. Load the reference with `from_pretrained()`."
        )
    shared = [] if num_shared_layers is None else _parameters_below(model, num_shared_layers, pattern)
    for parameter in shared:
        parameter.requires_grad_(False)
    memory: dict[int, object] = {id(parameter): parameter for parameter in shared}
    if isinstance(model, PreTrainedModelWrapper):
        memory[id(model.critic)] = None  # a reference has no values
    reference = copy.deepcopy(model, memory)
    return reference.requires_grad_(False).eval()


def _parameters_below(model: nn.Module, layer: int, pattern: str | None) -> list[nn.Parameter]:
    """The parameters before layer `layer` in the order of the model."""
    named = list(model.named_parameters())
    patterns = LAYER_PATTERNS if pattern is None else (pattern,)
    for candidate in patterns:
        part = candidate.format(layer=layer) + "."
        starts = [index for index, (name, _) in enumerate(named) if part in name]
        if starts:
            return [parameter for _, parameter in named[: starts[0]]]
    raise ValueError(
        f"Layer pattern could not be matched: no parameter's name holds layer {layer} by {list(patterns)}, the names "
        f"look like {[name for name, _ in named[2:5]]}. Nothing can be shared. Pass num_shared_layers below the number "
        'of layers, or a `pattern` for this architecture such as "transformer.h.{layer}".'
    )


def resolve_reference(
    model: PreTrainedModelWrapper, given: PreTrainedModelWrapper | None, num_shared_layers: int | None
) -> PreTrainedModelWrapper | None:
    """The given reference, or a copy of `model`; None if `model` with another adapter, or none, is the reference."""
    if given is not None:
        if num_shared_layers is not None:
            warnings.warn("num_shared_layers is ignored when ref_model is provided.", UserWarning, stacklevel=3)
        return given
    if not model.is_peft_model:
        return create_reference_model(model, num_shared_layers=num_shared_layers)
    prepare_reference_adapter(model)
    return None


def prepare_reference_adapter(model: PreTrainedModelWrapper) -> str | None:
    """Before training, determine the reference adapter, and add a frozen copy of the policy's adapter if needed.

    - A fresh LoRA adapter equals the base model: the reference is the base, adapters off.
    - An adapter trained before (supervised fine-tuning) is PPO's start: a frozen copy, named "reference", is added.
      Without it the KL would be measured to the base and start large.
    - A folder saved by PPO (value head beside the adapter): its "reference" adapter if saved, else the base.

    Calling it again changes nothing.

    Returns:
        The name of the reference adapter, or None when the reference is the base model.

    Raises:
        ValueError: The model has no adapters, or its base is trained as well.
    """
    peft_model = _peft_model(model)
    trained = adapters.trained_base_parameters(peft_model)
    if trained:
        raise ValueError(
            f"expected training of adapters alone, got trained parameters of the base, such as {trained[0]} "
            f"({len(trained)} in all; LoraConfig(bias=...) does that): the reference is that base with adapters off, "
            "so it would move with the policy and the KL would be too small. Use bias='none', name trained modules in "
            "`modules_to_save`, or pass a `ref_model`."
        )
    if adapters.REFERENCE_ADAPTER in peft_model.peft_config:
        return adapters.REFERENCE_ADAPTER
    name = str(model.policy_adapter_name)
    if model.value_head_was_loaded or not adapters.is_trained_adapter(peft_model, name):
        return None
    adapters.add_reference_adapter(peft_model, name)
    return adapters.REFERENCE_ADAPTER


@contextmanager
def reference_adapter(model: PreTrainedModelWrapper) -> Iterator[None]:
    """Context manager: while active, `model` computes as the reference: adapters off, or its "reference" adapter on.

    Call `prepare_reference_adapter(model)` once before training. On exit, the policy's adapter is active again and
    every `requires_grad` is restored.

    Raises:
        ValueError: The model has no adapters.
    """
    peft_model = _peft_model(model)
    if adapters.REFERENCE_ADAPTER in peft_model.peft_config:
        with adapters.active_adapter(peft_model, adapters.REFERENCE_ADAPTER):
            yield
    else:
        with adapters.no_adapter(peft_model):
            yield


def _peft_model(model: PreTrainedModelWrapper) -> PeftModel:
    if not isinstance(model.pretrained_model, PeftModel):
        raise ValueError(
            f"Only a model with adapters can be its own reference, got {type(model.pretrained_model).__name__}: its "
            "weights change in training, and with them the reference. Use create_reference_model(model)."
        )
    return model.pretrained_model
