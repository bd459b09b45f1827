"""Weights of linear layers in oneDNN's own layout, kept while a model decodes on a CPU.

At a few rows a product reads the whole weight for little arithmetic, and torch hands oneDNN a plain weight, which it
lays out anew in every call. Packed once, it is only read. Plain twin: the layers' own products.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.kernels.linear_layers import FAST_LINEAR_CLASSES
from rlhf_ppo.kernels.matmul import MIN_SPEEDUP, measure_seconds

logger = logging.getLogger(__name__)

ROWS = {torch.float32: range(4, 65), torch.bfloat16: range(1, 65)}
"""Rows of a product that take less time with a packed weight: fewer are no matrix product for oneDNN, and with more the
layout is a small part."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input; one product with all their weights is faster than one for each."""
MIN_WEIGHTS = {torch.float32: 2**19, torch.bfloat16: 2**16}
"""Fewest entries of the weights of a product that are packed: below, the call itself takes longer than torch's."""
MIN_STEPS = {torch.float32: 24, torch.bfloat16: 16}
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
        for layers in _layers_of_one_input(self.model):
            weights = [weight for layer in layers if (weight := _weight(layer)) is not None]
            if len(weights) < len(layers) or not _pays(weights, steps):
                continue
            kind = tuple((type(layer), w.shape, w.dtype) for layer, w in zip(layers, weights, strict=True))
            if not equal.get(kind, True):
                continue
            product = _PackedProduct(layers, weights)
            forwards = [partial(product, index) for index in range(len(layers))]
            if kind not in equal:
                equal[kind] = all(map(_is_equal, layers, forwards))
            for layer, forward in zip(layers, forwards, strict=True) if equal[kind] else ():
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
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 576, generator=generator).to(dtype)
    weights = torch.randn(12, 1536, 576, generator=generator).to(dtype).unbind()  # more than caches hold
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for weight in weights]
        ours, theirs = measure_seconds(
            lambda: [_product(x, weight, None) for weight in packed],
            lambda: [nn.functional.linear(x, weight) for weight in weights],
        )
    except RuntimeError as refusal:
        logger.info("decoding in %s with plain weights: %s", dtype, refusal)
        return False
    logger.info("a product of 12 rows with a packed weight takes 1/%.2f of the time in %s", theirs / ours, dtype)
    return theirs / ours > MIN_SPEEDUP


def _weight(layer: nn.Module | None) -> Tensor | None:
    """The [out, in] weight of a layer in the dtype of its products; None where it is not packed."""
    plain = FAST_LINEAR_CLASSES.keys() | set(FAST_LINEAR_CLASSES.values())
    if type(layer) not in plain or "forward" in vars(layer):
        return None
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr,operator]
    dtype = getattr(layer, "matmul_dtype", None) or weight.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    plain_weight = type(weight) is Tensor and weight.device.type == "cpu" and dtype in MIN_WEIGHTS
    if not plain_weight or not packing_is_faster(dtype):
        return None
    return (weight.t() if isinstance(layer, Conv1D) else weight).to(dtype).contiguous()


def _pays(weights: list[Tensor], steps: int) -> bool:
    """Whether one product with all of `weights` may win back the time of packing them."""
    dtype, width = weights[0].dtype, weights[0].shape[1]
    alike = all(weight.dtype == dtype and weight.shape[1] == width for weight in weights)
    return alike and sum(map(Tensor.numel, weights)) >= MIN_WEIGHTS[dtype] and steps >= MIN_STEPS[dtype]


class _PackedProduct:
    """The product of layers that read one input, by their packed weights: the first to be called computes it for all.

    Args:
        layers: Their own `forward` is called where packed weights are not faster.
        weights: One of each layer, in the dtype of the product.
    """

    def __init__(self, layers: list[Any], weights: list[Tensor]) -> None:
        self.layers, self.dtype = layers, weights[0].dtype
        whole = torch.cat(weights) if weights[1:] else weights[0]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(whole, 16)
        self.bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
        self.sizes = [len(weight) for weight in weights]
        self.outputs: dict[int, Tensor] = {}
        self.input: Tensor | None = None
        self.version = 0

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """The output of layer `index`."""
        rows = x.numel() // max(x.shape[-1], 1)
        untracked = x.is_inference() and len(self.sizes) > 1  # nobody would know that it was changed in place
        if rows not in ROWS[self.dtype] or torch.is_grad_enabled() or untracked:
            layer = self.layers[index]
            plain: Tensor = type(layer).forward(layer, x)
            return plain
        if len(self.sizes) == 1:
            return self._product(x, rows)
        if x is not self.input or x._version != self.version or index not in self.outputs:
            self.input, self.version = x, x._version
            self.outputs = dict(enumerate(self._product(x, rows).split(self.sizes, dim=-1)))
        output = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return output

    def _product(self, x: Tensor, rows: int) -> Tensor:
        inside = self.bias if self.bias is not None and self.bias.dtype == self.dtype else None
        flat = _product(x.reshape(rows, -1).to(self.dtype), self.packed, inside)
        if flat.dtype != x.dtype and not torch.is_autocast_enabled("cpu"):
            flat = flat.to(x.dtype)
        if self.bias is not None and inside is None:
            flat = flat + self.bias.to(flat.dtype)
        return flat.view(*x.shape[:-1], flat.shape[-1])


def _layers_of_one_input(model: nn.Module) -> Iterator[list[Any]]:
    """Linear layers that read the same input, by the names that `transformers` has for them; then each one."""
    for parent in model.modules():
        for names in SIBLINGS:
            children = [parent._modules.get(name) for name in names]
            layers = [getattr(child, "base_layer", child) for child in children]  # below an adapter
            if len({getattr(layer, "bias", None) is None for layer in layers}) == 1:
                yield layers
    for layer in model.modules():
        yield [layer]


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _is_equal(layer: Any, forward: "partial[Tensor]") -> bool:
    """Whether a layer gives the same with its packed weight: a trial on some rows."""
    width = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
    x = torch.linspace(-1, 1, 5 * width).view(5, width).sin().to(layer.weight.dtype)
    dtype: torch.dtype = forward.func.dtype  # type: ignore[attr-defined]
    try:
        plain, other = type(layer).forward(layer, x), forward(x)  # hooks of the layer read a model's own states
    except RuntimeError as refusal:
        logger.info("%s keeps its plain weight: %s", type(layer).__name__, refusal)
        return False
    difference, largest = (plain - other).abs().max(), plain.abs().max()
    return other.dtype == plain.dtype and bool(difference <= TOLERANCE[dtype] * largest)
