"""From a name, a folder or an object to a language model, with or without adapters, quantized or not."""

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rlhf_ppo.models.adapters import checkpoint_context_fn
from rlhf_ppo.models.value_head import HUB_ARGUMENTS, VALUE_HEAD_PREFIX, find_file

logger = logging.getLogger(__name__)

LanguageModel = PreTrainedModel | PeftModel
KBIT_ARGUMENTS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")


def load_language_model(
    parent_class: Any,
    source: Any,
    *model_args: Any,
    peft_config: Any,
    is_trainable: bool,
    arguments: dict[str, Any],
) -> LanguageModel:
    """Load what `source` names, wrapped in the adapter saved there or in a fresh one.

    Args:
        parent_class: An `AutoModelFor...` class.
        source: A hub name, a folder (of a model or of an adapter), or a model.
        model_args: Positional arguments of `from_pretrained`.
        peft_config: Of a fresh adapter; ignored, with a log line, when `source` already is an adapter.
        is_trainable: Whether an adapter that is loaded goes on training.
        arguments: The other keyword arguments of `from_pretrained`; weights are float32 unless `dtype` is among them.

    Raises:
        ValueError: For anything else than these.
    """
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"The `peft_config` argument should be an instance of `peft.PeftConfig` class, got {type(peft_config)}: "
            "there is nothing to build an adapter from. Pass e.g. LoraConfig(task_type='CAUSAL_LM')."
        )
    arguments = dict(arguments)
    kbit = {name: arguments.pop(name) for name in KBIT_ARGUMENTS if name in arguments}
    if isinstance(source, PeftModel):
        return source
    if isinstance(source, str | os.PathLike):
        hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
        arguments = {"trust_remote_code": False, **with_quantization_config(arguments)}  # None would ask at a prompt
        if find_file(source, "adapter_config.json", **hub) is not None:
            if peft_config is not None:
                logger.warning(
                    "`peft_config` is ignored: %s already holds an adapter, which is loaded instead.", source
                )
            return _load_adapter(parent_class, source, *model_args, is_trainable=is_trainable, hub=hub, **arguments)
        with _quiet_about_the_value_head():
            model = parent_class.from_pretrained(source, *model_args, **arguments)
    elif isinstance(source, PreTrainedModel):
        model = source
        if arguments:
            logger.warning("Ignored %s: the model is loaded already.", sorted(arguments))
    else:
        raise ValueError(
            "pretrained_model_name_or_path should be a string or a PreTrainedModel, "
            f"but is {type(source)}: nothing can be loaded. Pass a hub name, a folder or a transformers model."
        )
    if peft_config is None:
        return model  # type: ignore[no-any-return]
    if any(quantized_bits(model)):
        model = prepare_model_for_kbit_training(model, **kbit)  # type: ignore[no-untyped-call]
    return get_peft_model(model, peft_config)


def with_quantization_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Write `load_in_8bit`/`load_in_4bit` as the `quantization_config` that transformers 5 takes in their place.

    A quantized model goes whole onto this process's device unless `device_map` says otherwise. One that is not is
    loaded in float32 unless `dtype` is given: PPO's small steps vanish in the rounding of bfloat16 weights.
    """
    arguments = dict(arguments)
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if arguments.pop(name, False)}
    if bits:
        arguments.setdefault("quantization_config", BitsAndBytesConfig(**bits))
    if arguments.get("quantization_config") is not None:
        place = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
        arguments.setdefault("device_map", {"": place})
    elif "torch_dtype" not in arguments:
        arguments.setdefault("dtype", torch.float32)
    return arguments


def quantized_bits(model: LanguageModel) -> tuple[bool, bool]:
    """Whether the weights are stored in 8 bits, and whether in 4."""
    return bool(getattr(model, "is_loaded_in_8bit", False)), bool(getattr(model, "is_loaded_in_4bit", False))


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """How many tokens stand before each one: 0 at the first real token, wherever the padding is."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def takes_position_ids(model: LanguageModel) -> bool:
    """Whether 2-D position ids can be passed: not to ALiBi models, nor to those with positions of images."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    text_only = base.config.get_text_config() is base.config
    return text_only and "position_ids" in inspect.signature(base.forward).parameters


def keep_4bit_layers_differentiable(model: nn.Module) -> None:
    """Hold bitsandbytes' 4-bit layers to the storage that has a gradient, on CPUs where they would leave it.

    With AVX-512-BF16 a layer in eval mode packs its weight for an inference kernel at its first pass. That kernel has
    no backward, and everything below it would get no gradient. PPO trains in eval mode, so that no pass is random.

    Raises:
        ValueError: A layer has packed its weight already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"expected 4-bit weights as they were loaded, got {name} packed for inference by a pass that was "
                    "made before: it has no gradient any more. Load the model again and hand it over unused."
                )


def device_map_of(model: LanguageModel) -> dict[str, Any]:
    """Where `device_map` put each part of the model; empty when it was not used."""
    return getattr(model, "hf_device_map", None) or {}


def check_language_model(model: LanguageModel) -> None:
    """Raise ValueError for a model that PPO cannot train."""
    keep_4bit_layers_differentiable(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"PromptLearningConfig is not supported for PPO training, got {type(model.active_peft_config).__name__}: "
            "its virtual tokens shift every position of the value head. Use LoraConfig."
        )
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ValueError(
            "The model does not have a language model head, please use a model that has one: "
            f"{type(model).__name__} gives no probabilities of tokens. Load it with AutoModelForCausalLM (or "
            "AutoModelForSeq2SeqLM)."
        )
    places = {str(place) for place in device_map_of(model).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"The model is offloaded on CPU or disk (device map: {sorted(places)}) - CPU & disk offloading is not "
            "supported for ValueHead models: offloaded weights cannot be trained. Use a smaller model, more devices, "
            "`load_in_4bit=True` with LoRA, or FSDP."
        )


def set_gradient_checkpointing(
    model: LanguageModel, switch: Literal["enable", "disable"], settings: dict[str, Any] | None = None
) -> None:
    """Turn recomputation of activations on or off, under its present name or the one before."""
    if isinstance(model, PeftModel) and settings is not None and settings.get("use_reentrant") is False:
        settings = {"context_fn": checkpoint_context_fn(model), **settings}
    present = getattr(model, f"activation_checkpointing_{switch}", None)
    change = getattr(model, f"gradient_checkpointing_{switch}") if present is None else present
    change(*([] if settings is None else [settings]))


def name_missing_entries_publicly(_: nn.Module, keys: Any) -> None:
    """Name missing entries as `state_dict()` does: safetensors forgives a tied weight only under that name."""
    keys.missing_keys[:] = [name.replace("pretrained_model.", "", 1) for name in keys.missing_keys]


def _load_adapter(
    parent_class: Any,
    source: str | os.PathLike[str],
    *model_args: Any,
    is_trainable: bool,
    hub: dict[str, Any],
    **arguments: Any,
) -> PeftModel:
    """The base model that the adapter in `source` names, with that adapter on it."""
    config = PeftConfig.from_pretrained(os.fspath(source), **hub)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter in {source} does not say which base model it belongs to (base_model_name_or_path is "
            f"{config.base_model_name_or_path!r}): it cannot be loaded by its own name. Load the base model, put the "
            "adapter on it with PeftModel.from_pretrained(base, adapter), and pass that object."
        )
    base_arguments = {name: value for name, value in arguments.items() if name not in ("revision", "subfolder")}
    with _quiet_about_the_value_head():
        base = parent_class.from_pretrained(config.base_model_name_or_path, *model_args, **base_arguments)
    return PeftModel.from_pretrained(base, os.fspath(source), is_trainable=is_trainable, **hub)


class _ValueHeadReport(logging.Filter):
    """Drops transformers' loading report when all it reports is our value head."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        rows = [line for line in text.splitlines() if "|" in line and not line.startswith("Key")]
        return "LOAD REPORT" not in text or not all(row.startswith(VALUE_HEAD_PREFIX) for row in rows)


@contextmanager
def _quiet_about_the_value_head() -> Iterator[None]:
    """The language model's loader calls `v_head.*` unexpected; here it is not: we read it right after."""
    report, filter_ = logging.getLogger("transformers.modeling_utils"), _ValueHeadReport()
    report.addFilter(filter_)
    try:
        yield
    finally:
        report.removeFilter(filter_)
