"""Compare gradients with respect to some of a model's parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 2**18
"""Entries above which a parameter's gradient is looked at in part, or not at all."""


def some_trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Of each kind of module and parameter that is trained, the first one and the last.

    Large embeddings and LM heads are left out where others are trained: their gradients take longer than all the rest,
    and are products of what the others' gradients are products of.
    """
    kinds: dict[tuple[type, str], list[tuple[str, nn.Parameter]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.is_floating_point():
                kinds.setdefault((type(module), name), []).append((f"{path}.{name}", parameter))
    names = {parameter: name for found in kinds.values() for name, parameter in (found[-1], found[0])}  # tied: once
    vocab = model.config.get_text_config(decoder=True).vocab_size
    small = [weight for weight in names if len(weight.shape) < 2 or len(weight) < vocab or weight.numel() <= LARGE]
    return {names[weight]: weight for weight in small or names}


def gradients_by(parameters: Mapping[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    """Gradients of `loss` by `parameters`, without those that it does not depend on; of a large one some rows."""
    if not parameters:
        return {}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: _part(gradient) for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def gradient_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float) -> str | None:
    """The first gradient of `found` that differs from that of `expected`, as a sentence; None: none does."""
    scale = max((float(gradient.abs().max()) for gradient in expected.values()), default=0.0)
    for name, gradient in expected.items():
        other = found.get(name)
        gap = float(((0.0 if other is None else other.float()) - gradient.float()).abs().max())
        largest = max(float(gradient.abs().max()), 1e-2 * scale)
        if not gap <= tolerance * largest:
            return f"the gradient of {name} differs by {gap / largest:.1e}"
    return None


def _part(gradient: Tensor) -> Tensor:
    """All of a small gradient; of a large one some rows, evenly spaced."""
    return gradient if gradient.numel() <= LARGE else gradient[:: max(1, len(gradient) // 64)].clone()
