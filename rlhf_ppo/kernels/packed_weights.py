"""Weights of linear layers in oneDNN's own layout, kept while a model decodes on a CPU.

At a few rows a product reads the whole weight for little arithmetic, and torch hands oneDNN a plain weight, which it
lays out anew in every call. Packed once, it is only read. Plain twin: the layers' own products.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.kernels.linear_layers import FAST_LINEAR_CLASSES
from rlhf_ppo.kernels.matmul import MIN_SPEEDUP, measure_seconds

logger = logging.getLogger(__name__)

ROWS = {torch.float32: range(4, 65), torch.bfloat16: range(2, 65)}
"""Rows of a product that take less time with a packed weight: fewer are no matrix product for oneDNN, and with more the
layout is a small part."""
MIN_WEIGHTS = {torch.float32: 2**19, torch.bfloat16: 2**16}
"""Fewest entries of a weight that is packed: below, the call itself takes longer than torch's."""
MIN_STEPS = {torch.float32: 48, torch.bfloat16: 16}
"""Fewest steps for which packing pays: it takes the time that some 20 steps gain in float32, some 10 in bfloat16."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
"""How far a product may differ in the trial, relative to the largest entry."""


class PackedWeights:
    """Packs the weights of a model when asked, and computes with them where that is faster.

    Args:
        model: Its linear layers; adapters' layers are too small.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[nn.Module] = []
        """Layers that compute with packed weights now."""
        self._tried = False

    def pack(self, *, steps: int) -> None:
        """Pack the weights, once; they must not change until `release`. Takes the memory of a second copy of them.

        Args:
            steps: Steps that may follow; with few, nothing is packed.
        """
        if self._tried:
            return
        self._tried = True
        equal: dict[tuple[Any, ...], bool] = {}
        for layer in self.model.modules():
            weight = _weight(layer)
            if weight is None or steps < MIN_STEPS[weight.dtype]:
                continue
            kind = (type(layer), weight.shape, weight.dtype)
            if equal.get(kind, True):
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
                forward = partial(_forward, layer, packed, weight.dtype, type(layer).forward)
                equal.setdefault(kind, _is_equal(layer, forward))
                if equal[kind]:
                    vars(layer)["forward"] = forward
                    self.layers.append(layer)
        if self.layers:
            logger.info("decoding with packed weights in %d layers", len(self.layers))

    def release(self) -> None:
        """Forget the packed weights; the layers compute as before."""
        for layer in self.layers:
            vars(layer).pop("forward", None)
        self.layers = []


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[PackedWeights]:
    """Context manager: yields the packed weights of `model`, none yet, and releases them at its end."""
    packed = PackedWeights(model)
    try:
        yield packed
    finally:
        packed.release()


@cache
def packing_is_faster(dtype: torch.dtype) -> bool:
    """Whether packed weights win clearly here; measured once a process."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    x, weight = torch.randn(12, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        ours, theirs = measure_seconds(lambda: _product(x, packed, None), lambda: nn.functional.linear(x, weight))
    except RuntimeError as refusal:
        logger.info("decoding in %s with plain weights: %s", dtype, refusal)
        return False
    logger.info("a product of 12 rows with a packed weight takes 1/%.2f of the time in %s", theirs / ours, dtype)
    return theirs / ours > MIN_SPEEDUP


def _weight(layer: nn.Module) -> Tensor | None:
    """The [out, in] weight of a layer in the dtype of its products; None where it is not packed."""
    plain = FAST_LINEAR_CLASSES.keys() | set(FAST_LINEAR_CLASSES.values())
    if type(layer) not in plain or "forward" in vars(layer):
        return None
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    dtype = getattr(layer, "matmul_dtype", None) or weight.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    small = weight.numel() < MIN_WEIGHTS.get(dtype, weight.numel() + 1)
    if small or weight.device.type != "cpu" or type(weight) is not Tensor or not packing_is_faster(dtype):
        return None
    return (weight.t() if isinstance(layer, Conv1D) else weight).to(dtype).contiguous()


def _forward(
    layer: Any, packed: Tensor, dtype: torch.dtype, plain: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> Tensor:
    """The layer's output: by the packed weight where that is faster, else its own."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows not in ROWS[dtype] or torch.is_grad_enabled():
        return plain(layer, x)
    bias = layer.bias
    inside = bias if bias is not None and bias.dtype == dtype else None
    flat = _product(x.reshape(rows, -1).to(dtype), packed, inside)
    if not torch.is_autocast_enabled("cpu"):
        flat = flat.to(x.dtype)
    if bias is not None and inside is None:
        flat = flat + bias.to(flat.dtype)
    return flat.view(*x.shape[:-1], flat.shape[-1])


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _is_equal(layer: Any, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether a layer gives the same with its packed weight: a trial on some rows."""
    width = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
    x = torch.linspace(-1, 1, 5 * width).view(5, width).sin().to(layer.weight.dtype)
    try:
        plain, other = type(layer).forward(layer, x), forward(x)  # hooks of the layer read a model's own states
    except RuntimeError as refusal:
        logger.info("%s keeps its plain weight: %s", type(layer).__name__, refusal)
        return False
    dtype = forward.args[2] if isinstance(forward, partial) else plain.dtype
    difference, largest = (plain - other).abs().max(), plain.abs().max()
    return other.dtype == plain.dtype and bool(difference <= TOLERANCE[dtype] * largest)
