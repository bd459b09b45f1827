"""Layers of a `transformers` model exchanged, in place, for ones that compute the same faster on a CPU.

Only the class of a module changes: its parameters, its name in the model and what is saved stay as they are, adapters
still find an `nn.Linear`, and a copy of the model is fast as well.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.kernels.fused_modules import fused_class, plain_class
from rlhf_ppo.kernels.low_precision_linear import low_linear
from rlhf_ppo.kernels.matmul import bfloat16_is_faster, fits_onednn, linear, onednn_is_faster
from rlhf_ppo.kernels.tied_embedding import SharedGradient, shared_embedding

logger = logging.getLogger(__name__)

NARROW = 16
"""Layers of fewer inputs or outputs keep the precision of their weights."""


class _Low:
    """What a fast layer knows beyond its plain class."""

    product_dtype: torch.dtype | None = None
    """Of its products; None: that of its weights."""
    kept: Tensor | None = None
    """Its weight in that dtype, while nobody moves the weights."""


class FastLinear(_Low, nn.Linear):
    """`nn.Linear` whose float32 products on a CPU are oneDNN's, or run in a lower precision."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # their name
        """Return x W^T + b."""
        if not fits_onednn(input, self.weight, self.bias):
            return super().forward(input)
        if self.product_dtype is not None:
            return low_linear(input, self.weight, self.bias, dtype=self.product_dtype, kept=self.kept)
        return linear(input, self.weight, self.bias)


class FastConv1D(_Low, Conv1D):
    """GPT-2's `Conv1D` (a linear layer with a transposed weight), exchanged likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + b."""
        if not fits_onednn(x, self.weight, self.bias):
            result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # transformers' own
            return result
        if self.product_dtype is not None:
            settings: dict[str, Any] = {"dtype": self.product_dtype, "kept": self.kept, "transposed": True}
            return low_linear(x, self.weight, self.bias, **settings)
        return linear(x, self.weight, self.bias, transposed=True)


class FusedGELU(NewGELUActivation):
    """GPT-2's activation in one kernel instead of eight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # their name
        """Return 0.5 x (1 + tanh(sqrt(2 / π) (x + 0.044715 x³)))."""
        return nn.functional.gelu(input, approximate="tanh")


PRODUCTS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, Conv1D: FastConv1D}
FASTER = PRODUCTS | {NewGELUActivation: FusedGELU}
PLAIN = {fast: plain for plain, fast in FASTER.items()}


def use_fast_layers(model: nn.Module, *, product_dtype: torch.dtype | None = None) -> int:
    """Exchange the layers of `model` that a faster class computes, where this CPU has one; how many were exchanged.

    Subclasses (quantized layers, layers of an engine) stay as they are, and so do models on other devices.

    Args:
        model: Changed in place.
        product_dtype: Run the products of linear layers in this precision (bfloat16), everything else and the weights
            themselves in float32; narrow layers, a value head above all, stay as they are.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return 0
    if product_dtype is not None and not bfloat16_is_faster():
        logger.warning("products stay in float32: on this CPU those in %s are not faster", product_dtype)
        product_dtype = None
    products = product_dtype is not None or onednn_is_faster()
    count = 0
    for module in list(model.modules()):
        faster = FASTER.get(type(module)) or fused_class(module)
        if faster is None or (type(module) in PRODUCTS and not products):
            continue
        module.__class__ = faster
        count += 1
        if isinstance(module, FastLinear | FastConv1D) and min(module.weight.shape) >= NARROW:
            module.product_dtype = product_dtype
    return count


def use_plain_layers(model: nn.Module) -> None:
    """Undo `use_fast_layers`."""
    for module, plain in _exchanged(model).items():
        module.__class__ = plain


def _exchanged(model: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    """The modules that are fast ones now, with the classes that they had."""
    plain = {module: PLAIN.get(type(module)) or plain_class(module) for module in model.modules()}
    return {module: kind for module, kind in plain.items() if kind is not None}


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the layers of `model` are fast ones; those that were not before are plain again afterwards.

    Nobody may move the weights inside: products of a lower precision use a copy made at the entrance.
    """
    before = _exchanged(model)
    use_fast_layers(model)
    low = [layer for layer in model.modules() if isinstance(layer, _Low) and layer.product_dtype is not None]
    for layer in low:
        layer.kept = cast("nn.Linear", layer).weight.detach().to(layer.product_dtype)
    try:
        yield
    finally:
        for layer in low:
            layer.kept = None
        for module, plain in _exchanged(model).items():
            if module not in before:
                module.__class__ = plain


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the layers of `model` are torch's and transformers' own; those that were fast are so again afterwards."""
    fast = [(module, type(module)) for module in _exchanged(model)]
    use_plain_layers(model)
    try:
        yield
    finally:
        for module, kind in fast:
            module.__class__ = kind


def is_plain_head(head: object) -> bool:
    """Whether an LM head is one linear map whose weight is at hand: no adapter, no hook, no part of it elsewhere."""
    if not isinstance(head, nn.Linear) or type(head) not in (nn.Linear, FastLinear):
        return False
    if head._forward_hooks or head._forward_pre_hooks:
        return False
    weight = head.weight
    whole = type(weight.data) in (Tensor, FakeTensor)  # FakeTensor: a plan's weights, which have no content
    return isinstance(weight, Tensor) and weight.numel() > 0 and whole


@contextmanager
def shared_with_head(model: Any) -> Iterator[SharedGradient | None]:
    """Inside, an embedding that is also the LM head's weight adds its gradient to the head's, which it is handed.

    None where the two are not one plain trained weight on a CPU: each then has a gradient of its own.
    """
    embedding, weight = model.get_input_embeddings(), model.get_output_embeddings().weight
    tied = type(embedding) is nn.Embedding and embedding.weight is weight and weight.requires_grad
    if (
        not tied
        or embedding.sparse
        or embedding.scale_grad_by_freq
        or embedding.max_norm
        or weight.device.type != "cpu"
    ):
        yield None
        return
    shared = SharedGradient()
    embedding.forward = partial(shared_embedding, weight=weight, shared=shared, padding_idx=embedding.padding_idx)
    try:
        yield shared
    finally:
        del embedding.forward
