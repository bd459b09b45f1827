"""Attention of packed rows on a GPU by a variable-length kernel: one call for all rows, whatever their lengths.

Plain twin: one call of `scaled_dot_product_attention` for each length (`kernels.packing`).
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from rlhf_ppo.functional.masked import HALF_PRECISION
from rlhf_ppo.utils.transfer import upload

logger = logging.getLogger(__name__)

TOLERANCE = 2e-2
"""How far results and gradients may differ in the trial, relative to the largest: a rounding or two of bfloat16."""


class RowGroups(list[tuple[int, int]]):
    """(number of rows, their length) of packed rows, those of one length side by side."""

    _offsets: Tensor | None = None

    def offsets(self, device: torch.device) -> Tensor:
        """Where each row begins, and where the last one ends, int32 [rows + 1]; copied to the device once."""
        if self._offsets is None:
            lengths = [length for count, length in self for _ in range(count)]
            self._offsets = upload(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
        return self._offsets


@cache
def kernel() -> Callable[..., Tensor] | None:
    """`varlen_attn` with windows and grouped heads (torch 2.11), else FlashAttention 2 where installed, else None."""
    if find_spec("torch.nn.attention.varlen") is not None:
        function: Callable[..., Tensor] = import_module("torch.nn.attention.varlen").varlen_attn
        if {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(function).parameters):
            return function
    if find_spec("flash_attn") is None and find_spec("kernels") is None:
        return None
    try:
        return partial(_flash_attention, lazy_import_flash_attention("flash_attention_2")[0][1])
    except Exception as refusal:  # whatever a build, a version or a hub that is out of reach refuses
        logger.info("no FlashAttention 2: %s", refusal)
        return None


def _flash_attention(
    function: Callable[..., Tensor], *given: Any, scale: float | None, window_size: tuple[int, int], enable_gqa: bool
) -> Tensor:
    """`varlen_attn` by FlashAttention's own function, which sees grouped heads by itself."""
    return function(*given, softmax_scale=scale, causal=True, window_size=window_size)


def applies_to(query: Tensor) -> bool:
    """Whether the kernel takes these queries: on a GPU, in half precision or under autocast to it."""
    return query.device.type == "cuda" and kernel() is not None and _dtype(query) in HALF_PRECISION


def varlen_attention(
    query: Float[Tensor, "1 heads positions width"],
    key: Float[Tensor, "1 kv_heads positions width"],
    value: Float[Tensor, "1 kv_heads positions width"],
    groups: RowGroups,
    *,
    scale: float | None,
    window: int | None,
) -> Float[Tensor, "1 positions heads width"]:
    """Causal attention within each row, with a sliding window where `window` tokens are seen, the own one included."""
    function, longest = kernel(), max(length for _, length in groups)
    assert function is not None  # `applies_to`
    dtype, offsets = _dtype(query), groups.offsets(query.device)
    q, k, v = (tensor.squeeze(0).transpose(0, 1).to(dtype) for tensor in (query, key, value))
    output = function(
        q, k, v, offsets, offsets, longest, longest,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return output[None]


def matches_plain_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel gives what torch's plain one gives, gradients included: a trial on two rows. Logs why not."""
    reason = _why_not(device, dtype)
    if reason is not None:
        logger.warning("rows of unequal length are padded on this GPU: %s", reason)
    return reason is None


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in HALF_PRECISION:
        return "the kernel that packs them computes in half precision alone"
    if kernel() is None:
        return f"torch {torch.__version__} has no kernel that packs them, torch 2.11 has, and the package `kernels`"
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, count, 8, 64, generator=generator).to(device, dtype) for count in (4, 2, 2, 4)]
    query, key, value, slope = (tensor.requires_grad_() for tensor in heads)
    try:
        found = varlen_attention(query, key, value, RowGroups([(1, 3), (1, 5)]), scale=None, window=None)
        gradients = torch.autograd.grad((found.transpose(1, 2) * slope).sum(), (query, key, value))
        parts = []
        for row in (slice(0, 3), slice(3, 8)):
            own_key, own_value = (tensor[:, :, row].repeat_interleave(2, dim=1) for tensor in (key, value))
            parts.append(F.scaled_dot_product_attention(query[:, :, row], own_key, own_value, is_causal=True))
        expected = torch.cat(parts, dim=2)
        expected_gradients = torch.autograd.grad((expected * slope).sum(), (query, key, value))
    except Exception as refusal:  # whatever a driver, a card or a build refuses
        return f"its kernel refuses them ({type(refusal).__name__}: {str(refusal).splitlines()[0][:120]})"
    pairs = zip((found.transpose(1, 2), *gradients), (expected, *expected_gradients), strict=True)
    gap = max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)
    return None if gap <= TOLERANCE else f"its results differ by {gap:.1e} of the largest"


def _dtype(query: Tensor) -> torch.dtype:
    kind: Any = query.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return dtype
