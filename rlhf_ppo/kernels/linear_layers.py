"""Replace layers of a `transformers` model, in place, by ones that compute the same faster on a CPU.

Only the class of a module changes: its parameters, its name in the model and what is saved stay as they are, adapters
still find an `nn.Linear`, and a copy of the model is fast as well.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.kernels.fused_modules import fused_class, plain_class
from rlhf_ppo.kernels.low_precision_linear import low_precision_linear
from rlhf_ppo.kernels.matmul import bfloat16_is_faster, is_eager_float32_on_cpu, onednn_is_faster, onednn_linear
from rlhf_ppo.kernels.tied_embedding import TiedGradient, tied_embedding

logger = logging.getLogger(__name__)

MIN_WIDTH = 16
"""Fewest inputs and outputs of a layer that may run in a lower precision."""


class LowPrecisionState:
    """Attributes of a fast layer beyond those of its plain class."""

    matmul_dtype: torch.dtype | None = None
    """Dtype of its matrix products; None: that of its weights."""
    low_precision_weight: Tensor | None = None
    """Its weight in that dtype, while the weights do not change."""


class FastLinear(LowPrecisionState, nn.Linear):
    """`nn.Linear` whose float32 products on a CPU are oneDNN's, or run in a lower precision."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # their name
        """Return x W^T + b."""
        if not is_eager_float32_on_cpu(input, self.weight, self.bias):
            return super().forward(input)
        if self.matmul_dtype is not None:
            return low_precision_linear(
                input, self.weight, self.bias, dtype=self.matmul_dtype, low_precision_weight=self.low_precision_weight
            )
        return onednn_linear(input, self.weight, self.bias)


class FastConv1D(LowPrecisionState, Conv1D):
    """GPT-2's `Conv1D` (a linear layer with a transposed weight), exchanged likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + b."""
        if not is_eager_float32_on_cpu(x, self.weight, self.bias):
            result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # transformers' own
            return result
        if self.matmul_dtype is not None:
            settings: Any = {"dtype": self.matmul_dtype, "low_precision_weight": self.low_precision_weight}
            return low_precision_linear(x, self.weight, self.bias, transposed=True, **settings)
        return onednn_linear(x, self.weight, self.bias, transposed=True)


class FusedGELU(NewGELUActivation):
    """GPT-2's activation in one kernel instead of eight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # their name
        """Return 0.5 x (1 + tanh(sqrt(2 / π) (x + 0.044715 x³)))."""
        return nn.functional.gelu(input, approximate="tanh")


FAST_LINEAR_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, Conv1D: FastConv1D}
FAST_CLASSES = FAST_LINEAR_CLASSES | {NewGELUActivation: FusedGELU}
PLAIN_CLASSES = {fast: plain for plain, fast in FAST_CLASSES.items()}


def use_fast_layers(model: nn.Module, *, matmul_dtype: torch.dtype | None = None) -> int:
    """Exchange the layers of `model` that a faster class computes, where this CPU has one; how many were exchanged.

    Subclasses (quantized layers, layers of an engine) stay as they are, and so do models on other devices.

    Args:
        model: Changed in place.
        matmul_dtype: Run the products of linear layers in this precision (bfloat16), everything else and the weights
            themselves in float32; narrow layers, such as a value head, stay as they are.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return 0
    if matmul_dtype is not None and not bfloat16_is_faster():
        logger.warning("products stay in float32: on this CPU those in %s are not faster", matmul_dtype)
        matmul_dtype = None
    products = matmul_dtype is not None or onednn_is_faster()
    count = 0
    for module in list(model.modules()):
        faster = FAST_CLASSES.get(type(module)) or fused_class(module)
        if faster is None or module in _declined or (type(module) in FAST_LINEAR_CLASSES and not products):
            continue
        module.__class__ = faster
        count += 1
        if isinstance(module, FastLinear | FastConv1D) and min(module.weight.shape) >= MIN_WIDTH:
            module.matmul_dtype = matmul_dtype
    return count


_declined: "WeakSet[nn.Module]" = WeakSet()
"""Modules that stay plain, because their model computes something else with the fast ones."""


def has_fast_layers(model: nn.Module) -> bool:
    """Whether some layers of `model` are fast ones now."""
    return bool(_exchanged(model))


def decline_fast_layers(model: nn.Module) -> None:
    """Undo `use_fast_layers`, and keep it from exchanging these layers again."""
    _declined.update(_exchanged(model))
    use_plain_layers(model)


def use_plain_layers(model: nn.Module) -> None:
    """Undo `use_fast_layers`."""
    for module, plain in _exchanged(model).items():
        module.__class__ = plain


def _exchanged(model: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    """The modules that are fast ones now, with the classes that they had."""
    plain = {module: PLAIN_CLASSES.get(type(module)) or plain_class(module) for module in model.modules()}
    return {module: kind for module, kind in plain.items() if kind is not None}


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Context manager: while active, the layers of `model` are fast ones; afterwards as they were before.

    The weights must not change meanwhile: low-precision products use a copy of them made at the start.
    """
    before = _exchanged(model)
    use_fast_layers(model)
    layers = [layer for layer in model.modules() if isinstance(layer, LowPrecisionState)]
    low = [layer for layer in layers if layer.matmul_dtype is not None]
    for layer in low:
        layer.low_precision_weight = cast("nn.Linear", layer).weight.detach().to(layer.matmul_dtype)
    try:
        yield
    finally:
        for layer in low:
            layer.low_precision_weight = None
        for module, plain in _exchanged(model).items():
            if module not in before:
                module.__class__ = plain


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Context manager: while active, the layers of `model` are the plain ones; afterwards as they were before."""
    fast = [(module, type(module)) for module in _exchanged(model)]
    use_plain_layers(model)
    try:
        yield
    finally:
        for module, kind in fast:
            module.__class__ = kind


def is_plain_head(head: object) -> bool:
    """Whether an LM head is an `nn.Linear` with its whole weight: no adapter, no hook, not sharded."""
    if not isinstance(head, nn.Linear) or type(head) not in (nn.Linear, FastLinear):
        return False
    if head._forward_hooks or head._forward_pre_hooks:
        return False
    weight = head.weight
    whole = type(weight.data) in (Tensor, FakeTensor)  # FakeTensor: a plan's weights, which have no content
    return isinstance(weight, Tensor) and weight.numel() > 0 and whole


@contextmanager
def tied_embedding_gradient(model: Any) -> Iterator[TiedGradient | None]:
    """Context manager: while active, the embedding of a model with tied weights adds its gradient to the LM head's.

    Yields None where the two are not one plain trained weight on a CPU: each then has a gradient of its own.
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
    tied_gradient = TiedGradient()
    settings: Any = {"weight": weight, "tied_gradient": tied_gradient, "padding_idx": embedding.padding_idx}
    embedding.forward = partial(tied_embedding, **settings)
    try:
        yield tied_gradient
    finally:
        del embedding.forward
