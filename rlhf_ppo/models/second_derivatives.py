"""Whether a language model's forward pass can be differentiated twice, as Fisher products need."""

from typing import Any

import torch
from torch import nn


def check_twice_differentiable(model: nn.Module, language_model: Any, *, autocast: torch.dtype | None = None) -> None:
    """Raise ValueError if the forward pass cannot be differentiated twice.

    Args:
        autocast: Dtype of its matrix products under autocast.

    Raises:
        ValueError: Matrix products are in bfloat16, or the attention kernel has no second derivative.
    """
    if autocast is not None or any(getattr(module, "matmul_dtype", None) is not None for module in model.modules()):
        raise ValueError(
            "expected float32 products, got half-precision ones: their second derivative, which Fisher products need, "
            "would be noise. Set precision='float32' and bf16=False, or use PPOClip."
        )
    kernel = getattr(language_model.config, "_attn_implementation", None)
    if kernel not in (None, "eager", "sdpa"):
        raise ValueError(
            f"expected attention 'sdpa' or 'eager', got {kernel!r}: its kernel has no second derivative, which "
            "Fisher products need. Load the model with attn_implementation='sdpa', or use PPOClip."
        )
