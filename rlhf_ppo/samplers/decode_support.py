"""Which models the decode loop supports, and a contiguous input for their LM head."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from rlhf_ppo.kernels.packing import names_in_forward
from rlhf_ppo.models.loading import cache_argument
from rlhf_ppo.models.trunk import learned_positions
from rlhf_ppo.samplers.kv_cache import supports_row_selection

REQUIRED_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "use_cache")
START_SETTINGS = ("bos_token_id", "decoder_start_token_id")
"""Of a generation config: what an encoder-decoder's response starts from."""


def unsupported_reason(model: Any) -> str | None:
    """Why DecodeLoop does not support the model, as a sentence; None if it does."""
    config = getattr(model, "config", None)
    if config is None or not isinstance(model, nn.Module):
        return f"{type(model).__name__} is not a transformers model (it has no config)"
    base = unwrap_peft(model)
    name = type(base).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return f"{name} has virtual prompt tokens ({model.active_peft_config.peft_type})"
    parameters = inspect.signature(base.forward).parameters
    missing = [argument for argument in (*REQUIRED_ARGUMENTS, cache_argument(base)) if argument not in parameters]
    if missing:
        return f"{name}.forward does not take {', '.join(missing)}"
    if not supports_row_selection(config):
        return f"{name} keeps a state other than full or sliding-window attention's keys and values"
    if cache_window_is_too_short(base):
        return f"{name} attends to all tokens, but its cache keeps a window of them"
    return None


def cache_window_is_too_short(model: Any) -> bool:
    """Whether the cache for the model's config keeps a window of tokens that the model's attention does not have."""
    config = model.config
    if config.is_encoder_decoder or getattr(config.get_text_config(), "sliding_window", None) is None:
        return False
    windowed = any(type(layer) is DynamicSlidingWindowLayer for layer in DynamicCache(config=config).layers)
    masks = {name for name in names_in_forward(model) if name.startswith("create_") and "mask" in name}
    return windowed and masks == {"create_causal_mask"}


@contextmanager
def plain_generation_config(model: Any) -> Iterator[None]:
    """Context manager: while active, the model's generation config says only which token its decoder starts with.

    The forced tokens, beams, minimum lengths and filters of such a config would act beside a call's own settings.
    """
    owners = [unwrap_peft(model), *([model] if "generation_config" in vars(model) else [])]
    configs = [owner.generation_config for owner in owners]
    defaults = {name: value for name, value in vars(GenerationConfig()).items() if name not in START_SETTINGS}
    for owner, own in zip(owners, configs, strict=True):
        owner.generation_config = copy.copy(own)
        vars(owner.generation_config).update(defaults)
    try:
        yield
    finally:
        for owner, own in zip(owners, configs, strict=True):
            owner.generation_config = own


@contextmanager
def contiguous_head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Context manager: while active, the LM head gets contiguous inputs; the yielded list holds its latest input.

    The last position of a prefill is a strided slice, on which torch runs a batched product and copies the head's
    weights for every row: gigabytes at a vocabulary of 50,000.
    """
    head_inputs: list[Tensor] = []

    def make_contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        head_inputs[:] = [inputs[0].contiguous()]
        return (head_inputs[0], *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(make_contiguous)
    try:
        yield head_inputs
    finally:
        hook.remove()


def check_positions(model: Any, length: int) -> None:
    """Raise ValueError if a learned position table is shorter than `length`; rotary models pass."""
    limit = learned_positions(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"The longest prompt plus max_new_tokens must be at most max_position_embeddings = {limit}, got {length}: "
            "the model has no embedding for the positions beyond. Shorten the prompts or lower max_new_tokens."
        )


def check_ids(model: Any, prompts: Sequence[Tensor]) -> None:
    """Raise ValueError if a prompt has a token id that the model has no embedding for."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if size is None or not prompts:
        return
    lowest, highest = torch.stack([torch.stack([p.min(), p.max()]) for p in prompts]).aminmax()
    for index, prompt in enumerate(prompts if int(lowest) < 0 or int(highest) >= size else ()):
        if int(prompt.min()) < 0 or int(prompt.max()) >= size:
            raise ValueError(
                f"expected token ids below the model's {size} embeddings, got {int(prompt.max())} in prompts[{index}]: "
                "the model cannot read it. Encode prompts with the model's own tokenizer, or resize its embeddings."
            )


def supports_logits_to_keep(model: Any) -> bool:
    """Whether `forward` takes `logits_to_keep`: it can run the LM head on the last position only."""
    return "logits_to_keep" in inspect.signature(unwrap_peft(model).forward).parameters


def unwrap_peft(model: Any) -> Any:
    """The model below PEFT's wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
