"""Load a language model from a name, folder or object, with or without adapters, quantized or not."""

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from rlhf_ppo.models.adapters import checkpoint_context_fn, match_vocabulary
from rlhf_ppo.models.value_head import HUB_ARGUMENTS, VALUE_HEAD_PREFIX, find_file
from rlhf_ppo.utils.installed import accepts_argument
from rlhf_ppo.utils.model_names import check_model_name, is_missing_folder

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
    """Load the language model `source`, with the adapter saved there or a fresh one.

    Args:
        parent_class: An `AutoModelFor...` class.
        source: A hub name, a folder (of a model or of an adapter), or a model.
        peft_config: Config of a fresh adapter; ignored, with a log line, when `source` already is an adapter.
        is_trainable: Whether a loaded adapter is trained further.
        arguments: The other keyword arguments of `from_pretrained`; weights are float32 unless `dtype` is among them.

    Raises:
        ValueError: `source` or `peft_config` has another type, or `source` is a path without a folder.
    """
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"The `peft_config` argument should be an instance of `peft.PeftConfig` class, got {type(peft_config)}: "
            "there is nothing to build an adapter from. Pass e.g. LoraConfig(task_type='CAUSAL_LM')."
        )
    arguments = dict(arguments)
    kbit = {name: arguments.pop(name) for name in KBIT_ARGUMENTS if name in arguments}
    if isinstance(source, PeftModel):
        if peft_config is not None:
            logger.warning("`peft_config` is ignored: the model already has an adapter, which is trained instead.")
        return source
    if isinstance(source, str | os.PathLike):
        check_model_name(os.fspath(source))
        hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
        arguments = {"trust_remote_code": False, **with_quantization_config(arguments)}  # None would ask at a prompt
        if find_file(source, "adapter_config.json", **hub) is not None:
            if peft_config is not None:
                logger.warning(
                    "`peft_config` is ignored: %s already holds an adapter, which is loaded instead.", source
                )
            return _load_adapter(parent_class, source, *model_args, is_trainable=is_trainable, hub=hub, **arguments)
        with _suppress_value_head_report():
            model = _class_for(parent_class, source, arguments).from_pretrained(source, *model_args, **arguments)
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
    check_transformers_adapters(model)
    _check_adapter(peft_config)
    if any(quantized_bits(model)):
        model = prepare_model_for_kbit_training(model, **kbit)  # type: ignore[no-untyped-call]
    return get_peft_model(model, peft_config)


def _class_for(parent_class: Any, source: str | os.PathLike[str], arguments: dict[str, Any]) -> Any:
    """`parent_class`, or the class that the model's config names where an auto class does not know its type.

    Language models of several modalities, and their text models, are trained on text alone and load again so.
    """
    known = {name: arguments[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in arguments}
    try:
        config = arguments.get("config") or AutoConfig.from_pretrained(source, **known)
    except (OSError, ValueError):  # whose words the loader itself has
        return parent_class
    names = getattr(config, "architectures", None) or [""]
    named = getattr(transformers, names[0], None)
    is_known = type(config) in parent_class._model_mapping or hasattr(config, "auto_map")
    return parent_class if is_known or named is None else named


def with_quantization_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace `load_in_8bit`/`load_in_4bit` by the `quantization_config` that transformers 5 expects.

    A quantized model is placed on this process's device unless `device_map` is given. Other models are loaded in
    float32 unless `dtype` is given: PPO's small steps are lost in the rounding of bfloat16 weights.
    """
    arguments = dict(arguments)
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if arguments.pop(name, False)}
    if bits:
        arguments.setdefault("quantization_config", BitsAndBytesConfig(**bits))
    if arguments.get("quantization_config") is not None:
        device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
        arguments.setdefault("device_map", {"": device})
    elif "torch_dtype" not in arguments:
        arguments.setdefault("dtype", torch.float32)
    return arguments


def without_dtype(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` without `dtype` and `torch_dtype`, which a model that is loaded already does not take: says so."""
    late = sorted({"dtype", "torch_dtype"} & set(arguments))
    if late:
        logger.warning("Ignored %s: the model is loaded already. Pass it to `from_pretrained` with a name.", late)
    return {name: value for name, value in arguments.items() if name not in late}


def quantized_bits(model: LanguageModel) -> tuple[bool, bool]:
    """Whether the weights are stored in 8 bits, and whether in 4 bits."""
    return bool(getattr(model, "is_loaded_in_8bit", False)), bool(getattr(model, "is_loaded_in_4bit", False))


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Position ids from a mask: 0 at the first real token, with padding on either side."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def takes_position_ids(model: LanguageModel) -> bool:
    """Whether the model accepts 2-D position ids: not ALiBi models, nor those with image positions."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    text_only = base.config.get_text_config() is base.config
    return text_only and "position_ids" in inspect.signature(base.forward).parameters


def keep_4bit_layers_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers on CPUs from switching to an inference kernel without backward.

    With AVX-512-BF16 a layer in eval mode packs its weight for that kernel at its first pass, and all layers below it
    get no gradient. PPO trains in eval mode, so that passes are deterministic.

    Raises:
        ValueError: A layer has already packed its weight.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"expected 4-bit weights as they were loaded, got {name} packed for inference by an earlier pass: "
                    "it has no gradient any more. Load the model again, and run no pass before you hand it over."
                )


def device_map_of(model: LanguageModel) -> dict[str, Any]:
    """Device of each part of the model under `device_map`; empty without one."""
    return getattr(model, "hf_device_map", None) or {}


def check_language_model(model: LanguageModel) -> None:
    """Raise ValueError for a model that PPO cannot train."""
    keep_4bit_layers_differentiable(model)
    check_transformers_adapters(model)
    if isinstance(model, PeftModel):
        _check_adapter(model.active_peft_config)
        active = getattr(model.base_model, "active_adapters", [])
        if len(active) > 1:
            raise ValueError(
                f"expected one active adapter, got {active}: PPO trains and saves one, and the policy would lose the "
                "others. Merge them into the base (`merge_and_unload`) before you add the one to train."
            )
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ValueError(
            "The model does not have a language model head, please use a model that has one: "
            f"{type(model).__name__} gives no probabilities of tokens. Load it with AutoModelForCausalLM (or "
            "AutoModelForSeq2SeqLM)."
        )
    devices = {str(device) for device in device_map_of(model).values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError(
            f"The model is offloaded on CPU or disk (device map: {sorted(devices)}) - CPU & disk offloading is not "
            "supported for ValueHead models: offloaded weights cannot be trained. Use a smaller model, more devices, "
            "`load_in_4bit=True` with LoRA, or FSDP."
        )


def _check_adapter(config: PeftConfig) -> None:
    """Raise ValueError for adapters that act in PEFT's own call alone."""
    if config.is_prompt_learning:
        raise ValueError(
            f"PromptLearningConfig is not supported for PPO training, got {type(config).__name__}: "
            "its virtual tokens shift every position of the value head. Use LoraConfig."
        )
    if getattr(config, "alora_invocation_tokens", None) is not None:
        raise ValueError(
            "expected an adapter that is always active, got one with `alora_invocation_tokens`: PEFT switches it on in "
            "its own call alone, so PPO would train nothing but the value head. Use LoraConfig without them."
        )


def check_transformers_adapters(model: Any) -> None:
    """Raise ValueError if `model` carries adapters of transformers' own (`add_adapter`), outside of a PEFT model."""
    if not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"expected a PEFT model or one without adapters, got {type(model).__name__} with adapters of transformers' "
            "own (`add_adapter`, or `from_pretrained` of an adapter's folder): what is saved would lack the value "
            "head, and a fresh adapter would replace them. Load the folder with AutoModelForCausalLMWithValueHead."
            "from_pretrained(folder, is_trainable=True), or wrap the base with `peft_config=`."
        )


def cache_argument(model: LanguageModel) -> str:
    """Name of the forward argument that takes the cache of keys and values: transformers 5.24 renamed it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "cache" if accepts_argument(base.forward, "cache") else "past_key_values"


def set_gradient_checkpointing(
    model: LanguageModel, switch: Literal["enable", "disable"], settings: dict[str, Any] | None = None
) -> None:
    """Enable or disable gradient checkpointing, by the method name of new or old transformers versions.

    A method of the old name that a script has set on the model goes first: it takes the old arguments alone.
    """
    if isinstance(model, PeftModel) and settings is not None and settings.get("use_reentrant") is False:
        settings = {"context_fn": checkpoint_context_fn(model), **settings}
    old_name, new_name = f"gradient_checkpointing_{switch}", f"activation_checkpointing_{switch}"
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    replaced = old_name in vars(base) or not hasattr(model, new_name)
    method = getattr(model, old_name if replaced else new_name)
    method(*([] if settings is None else [settings]))


def strip_wrapper_prefix(_: nn.Module, keys: Any) -> None:
    """Strip `pretrained_model.` from missing keys, as in `state_dict()`: safetensors identifies tied weights by it."""
    keys.missing_keys[:] = [name.replace("pretrained_model.", "", 1) for name in keys.missing_keys]


def _load_adapter(
    parent_class: Any,
    source: str | os.PathLike[str],
    *model_args: Any,
    is_trainable: bool,
    hub: dict[str, Any],
    **arguments: Any,
) -> PeftModel:
    """Load the adapter in `source` on the base model that its config names."""
    config = PeftConfig.from_pretrained(os.fspath(source), **hub)
    base_name = config.base_model_name_or_path
    if not base_name or is_missing_folder(base_name):
        problem = (
            f"names {base_name} as its base model, which is no folder here" if base_name else "names no base model"
        )
        raise ValueError(
            f"The adapter in {source} {problem}: there is nothing to put it on. Load the base model, put the adapter "
            "on it with PeftModel.from_pretrained(base, adapter), and pass that object; or correct "
            "base_model_name_or_path in its adapter_config.json."
        )
    base_arguments = {name: value for name, value in arguments.items() if name not in ("revision", "subfolder")}
    with _suppress_value_head_report():
        base = _class_for(parent_class, base_name, base_arguments).from_pretrained(
            base_name, *model_args, **base_arguments
        )
    match_vocabulary(base, os.fspath(source), **hub)
    return PeftModel.from_pretrained(base, os.fspath(source), is_trainable=is_trainable, **hub)


class _ValueHeadReportFilter(logging.Filter):
    """Logging filter: drops transformers' loading report if it lists only the value head."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        rows = [line for line in text.splitlines() if "|" in line and not line.startswith("Key")]
        return "LOAD REPORT" not in text or not all(row.startswith(VALUE_HEAD_PREFIX) for row in rows)


@contextmanager
def _suppress_value_head_report() -> Iterator[None]:
    """Context manager: silences the loader's report of unexpected `v_head.*` keys, which are loaded afterwards."""
    loader_log, filter_ = logging.getLogger("transformers.modeling_utils"), _ValueHeadReportFilter()
    loader_log.addFilter(filter_)
    try:
        yield
    finally:
        loader_log.removeFilter(filter_)
