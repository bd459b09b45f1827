"""A small batch for any language model, and what a trial of the model needs to know and to leave alone."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rlhf_ppo.batch import TokenInputs

SMALL_BATCH_TOKENS = 6
"""Tokens of its longest row."""


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold shards of the parameters (FSDP2, ZeRO-3): passes are then collective."""
    return any(hasattr(weight, "ds_id") or isinstance(weight.data, DTensor) for weight in model.parameters())


def is_low_precision(model: nn.Module) -> bool:
    """Whether weights are half precision or quantized, or products run in bfloat16."""
    if any(getattr(module, "matmul_dtype", None) is not None for module in model.modules()):
        return True
    return any(not weight.is_floating_point() or weight.element_size() < 4 for weight in model.parameters())


def small_batch(model: Any) -> TokenInputs:
    """Three rows of unequal lengths, the second one the beginning of the first, of ids without a special meaning."""
    device = next(model.parameters()).device
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    special = {value for name, value in _settings(model.config) if "token" in name and isinstance(value, int)}
    usable = [token for token in range(min(vocab, 4096)) if token not in special] or [0]
    ids = torch.tensor([usable[(7 * step + 3) % len(usable)] for step in range(10)], device=device)
    first, third = ids[:SMALL_BATCH_TOKENS], ids[SMALL_BATCH_TOKENS:]
    return TokenInputs(prompts=[first[:3], first[:3], third[:2]], responses=[first[3:], first[3:5], third[2:]])


def _settings(config: Any) -> list[tuple[str, Any]]:
    parts = [config, config.get_text_config(decoder=True)]
    return [item for part in parts for item in vars(part).items()]
