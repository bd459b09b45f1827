"""Rows of unequal length through a causal model's layers: packed into one row, or padded.

Packed rows stand side by side, those of one length together. Only attention knows that there are several; it runs once
for each length, with torch's fused causal kernel and without a mask; on a GPU once for all. Plain twin: padded rows.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from types import CodeType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_ppo.batch import pad_rows
from rlhf_ppo.kernels.last_layer import last_layer_at, positions_to_read
from rlhf_ppo.kernels.mask_reads import right_padded_mask, skip_mask_reads
from rlhf_ppo.kernels.varlen_attention import RowGroups, applies_to, varlen_attention
from rlhf_ppo.utils.transfer import upload

logger = logging.getLogger(__name__)

ATTENTION_NAME = "rlhf_ppo_packed"
"""Of the attention function, as registered with `transformers`."""
STRANGE_MASKS = {"create_chunked_causal_mask", "create_recurrent_attention_mask", "create_mask"}
"""Functions of `transformers` that make masks which packed rows do not know."""
TOLERANCE = 1e-4
"""How far hidden states may differ from the plain ones, relative to the largest, to count as the same."""


@dataclass(frozen=True)
class HiddenStates:
    """Last hidden states of all rows, and the index of each row's first one."""

    states: Float[Tensor, "positions hidden"]
    starts: list[int]
    positions: int
    """Tokens that went through the trunk, padding included."""


def padded_hidden(model: Any, rows: Sequence[Tensor], *, first_read: Sequence[int] | None = None) -> HiddenStates:
    """Hidden states of rows padded on the right, where a causal model cannot see the padding.

    Args:
        first_read: The first position of each row whose state is read; those before are meaningless. None: all.
    """
    ids = pad_rows(rows)
    starts = [ids.shape[1] * row for row in range(len(rows))]
    with last_layer_at(model, positions_to_read(starts, rows, first_read)), skip_mask_reads(ids.device):
        output = model(input_ids=ids, attention_mask=right_padded_mask(ids), use_cache=False)
    return HiddenStates(output.last_hidden_state.flatten(0, 1), starts, ids.numel())


def packed_hidden(
    model: Any,
    rows: Sequence[Tensor],
    *,
    first_read: Sequence[int] | None = None,
    run: Callable[..., Any] | None = None,
) -> HiddenStates:
    """Hidden states of packed rows, computed by `model`, or by `run` in its place.

    Args:
        first_read: The first position of each row whose state is read; those before are meaningless. None: all.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    lengths = [len(rows[row]) for row in order]
    groups = RowGroups((len(list(group)), length) for length, group in groupby(lengths))
    ids = torch.cat([rows[row] for row in order])[None]
    positions = upload(torch.cat([torch.arange(length) for length in lengths]), ids.device)[None]
    starts, begin = [0] * len(rows), 0
    for row, length in zip(order, lengths, strict=True):
        starts[row] = begin
        begin += length
    with (
        _attention(model.config.get_text_config(), ATTENTION_NAME),
        last_layer_at(model, positions_to_read(starts, rows, first_read)),
    ):
        output = (run or model)(input_ids=ids, position_ids=positions, use_cache=False, row_groups=groups)
    return HiddenStates(output.last_hidden_state[0], starts, begin)


def reason_not_to_pack(layers: Any) -> str | None:
    """Why rows of this architecture must not be packed, as a phrase; None if nothing known speaks against it.

    Packed rows know plain causal attention and sliding windows. A short trial would not notice another mask, such as
    attention in chunks, which begins to matter in long rows.
    """
    config = layers.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return f"attention is {getattr(config, '_attn_implementation', None)!r}, not 'sdpa'"
    if strange := names_in_forward(layers) & STRANGE_MASKS:
        return f"its attention has a mask of its own ({', '.join(sorted(strange))})"
    if getattr(config, "sliding_window", None) and _has_window_in_mask_alone(layers):
        return "its sliding window is in the mask alone, which packed rows do without"
    return None


def names_in_forward(layers: Any) -> set[str]:
    """Names that the `forward` functions of the modules use; decorated ones are looked through."""
    return {name for code in _forward_codes(layers) for name in code.co_names}


def _forward_codes(layers: Any) -> list[CodeType]:
    functions = [inspect.unwrap(kind.forward) for kind in {type(module) for module in layers.modules()}]
    return [function.__code__ for function in functions if hasattr(function, "__code__")]


def _has_window_in_mask_alone(layers: Any) -> bool:
    """Whether some module makes masks of a sliding window, and no other one passes its width to the attention."""
    codes = _forward_codes(layers)
    others = [code for code in codes if "create_sliding_window_causal_mask" not in code.co_names]
    return len(others) < len(codes) and not any("sliding_window" in repr(code.co_consts) for code in others)


def packing_matches(model: Any, rows: Sequence[Tensor]) -> bool:
    """Whether this architecture computes the same when packed: a trial on the beginnings of two rows.

    False for attention other than torch's, and for models that carry other state from one token to the next.
    """
    reason = reason_not_to_pack(model)
    sample = [rows[0][:7], rows[-1][:5]]
    try:
        if reason is not None:
            raise NotImplementedError(reason)
        with torch.no_grad():
            plain, packed = padded_hidden(model, sample), packed_hidden(model, sample)
    except Exception as refusal:  # whatever a foreign architecture makes of an argument that it does not know
        logger.info("%s: not packed: %s", type(model).__name__, refusal)
        return False
    differences = [
        float((plain.states[a : a + len(row)] - packed.states[b : b + len(row)]).abs().max())
        for row, a, b in zip(sample, plain.starts, packed.starts, strict=True)
    ]
    return max(differences) <= TOLERANCE * float(plain.states.abs().max())


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads positions width"],
    key: Float[Tensor, "1 kv_heads positions width"],
    value: Float[Tensor, "1 kv_heads positions value_width"],
    attention_mask: Tensor | None,
    *,
    row_groups: list[tuple[int, int]],
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "1 positions heads value_width"], None]:
    """Causal attention within each row of `row_groups`, in the form of `transformers`' attention functions."""
    if settings.get("position_bias") is not None or attention_mask is not None:
        raise NotImplementedError("attention with a bias or mask of its own is not packed")
    settings.pop("is_causal", None)
    if applies_to(query) and not settings.get("dropout") and isinstance(row_groups, RowGroups):
        scale = settings.get("scaling")
        return varlen_attention(query, key, value, row_groups, scale=scale, window=sliding_window), None
    sizes = [count * length for count, length in row_groups]
    parts = zip(row_groups, *(tensor.squeeze(0).split(sizes, dim=1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for (count, length), *chunk in parts:
        mask = _window(length, sliding_window, query.device)
        q, k, v = (tensor.unflatten(1, (count, length)).transpose(0, 1) for tensor in chunk)
        output, _ = _attend(module, q, k, v, mask, is_causal=mask is None, **settings)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Torch's attention; in float32 under a CPU's bfloat16 autocast: backwards it takes a third of the time there."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or not torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(module, query, key, value, mask, **settings)
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)
    return output.to(query.dtype), None


def _window(length: int, width: int | None, device: torch.device) -> Tensor | None:
    """Mask of a causal sliding window, [1, 1, length, length]; None where the row is no longer than the window."""
    if width is None or length <= width:
        return None
    steps = torch.arange(length, device=device)
    distance = steps[:, None] - steps
    return ((distance >= 0) & (distance < width))[None, None]


@contextmanager
def _attention(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(ATTENTION_NAME, packed_attention)
