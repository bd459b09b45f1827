"""The stop tokens of a model and its tokenizer, where the sampling settings leave them open."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.samplers.base import SamplingConfig


def with_stop_tokens(config: SamplingConfig, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> SamplingConfig:
    """`config` with the end-of-sequence tokens of the generation config and the tokenizer, unless it names its own.

    Args:
        config: Where `stop_token_ids` is None, it is filled in; an empty tuple stays empty.
        model: Has a `generation_config`, as `generate` reads it.
        tokenizer: Of the model.
    """
    if config.stop_token_ids is not None:
        return config
    settings = getattr(model, "generation_config", None)
    found = [getattr(settings, "eos_token_id", None), None if tokenizer is None else tokenizer.eos_token_id]
    ids = [token for given in found if given is not None for token in torch.as_tensor(given).flatten().tolist()]
    return replace(config, stop_token_ids=tuple(dict.fromkeys(token for token in ids if token >= 0)))
