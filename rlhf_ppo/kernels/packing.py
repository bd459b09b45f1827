"""Ragged rows through a causal model's trunk: side by side in one row, or one below the other with padding.

Packed, nothing but attention knows that there are several rows, and no layer sees padding. Attention then runs once
for each length, over the rows of that length: no mask, no padding, and torch's fused causal kernel.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_ppo.batch import pad_rows
from rlhf_ppo.kernels.last_layer import last_layer_on, read_places, tokenwise_parts
from rlhf_ppo.kernels.packed_attention import fits_kernel, run_attention

logger = logging.getLogger(__name__)

NAME = "rlhf_ppo_packed"
"""Of the attention function among those of `transformers`."""
CLOSE = 1e-4
"""How far hidden states may differ from the plain ones, relative to the largest, for a short cut to be taken."""


@dataclass(frozen=True)
class Hidden:
    """Last hidden states, and where each row's first one stands among them."""

    states: Float[Tensor, "positions hidden"]
    starts: list[int]
    positions: int
    """Tokens that went through the trunk, padding included."""


def padded_hidden(model: Any, rows: Sequence[Tensor], *, first_read: Sequence[int] | None = None) -> Hidden:
    """Rows below each other. Padding stands on the right, where a causal model cannot see it.

    Args:
        first_read: The first position of each row whose state is read: those before are void. None: all are read.
    """
    ids = pad_rows(rows)
    starts = [ids.shape[1] * row for row in range(len(rows))]
    with last_layer_on(model, read_places(starts, rows, first_read)):
        # A mask of ones keeps the fast causal kernels, and without any, some models warn of padding.
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return Hidden(output.last_hidden_state.flatten(0, 1), starts, ids.numel())


def packed_hidden(
    model: Any,
    rows: Sequence[Tensor],
    *,
    first_read: Sequence[int] | None = None,
    run: Callable[..., Any] | None = None,
) -> Hidden:
    """Rows beside each other, those of one length together, through `model`, or through `run` in its place.

    Args:
        first_read: The first position of each row whose state is read: those before are void. None: all are read.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    lengths = [len(rows[row]) for row in order]
    runs = [(len(list(group)), length) for length, group in groupby(lengths)]
    ids = torch.cat([rows[row] for row in order])[None]
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None]
    starts, begin = [0] * len(rows), 0
    for row, length in zip(order, lengths, strict=True):
        starts[row] = begin
        begin += length
    with _attention(model.config, NAME), last_layer_on(model, read_places(starts, rows, first_read)):
        output = (run or model)(input_ids=ids, position_ids=positions, use_cache=False, packed_runs=runs)
    return Hidden(output.last_hidden_state[0], starts, begin)


def can_be_packed(model: Any, rows: Sequence[Tensor]) -> bool:
    """Whether this architecture computes the same packed: tried on the beginnings of two rows.

    A model whose attention is not torch's, or that carries anything else from one token to the next, is left alone.
    """
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    return _same_on_trial(model, rows, packed_hidden, first_of=lambda row: 0)


def can_skip_unread(model: Any, rows: Sequence[Tensor]) -> bool:
    """Whether this architecture computes the same with its last layer on the tokens alone that are read: tried, too."""
    if not tokenwise_parts(model):
        return False
    return _same_on_trial(model, rows, padded_hidden, first_of=lambda row: len(row) // 2)


def _same_on_trial(
    model: Any, rows: Sequence[Tensor], arrange: Callable[..., Hidden], *, first_of: Callable[[Tensor], int]
) -> bool:
    """Whether the beginnings of two rows, read from `first_of` on, get by `arrange` the states of plain padding."""
    sample = [rows[0][:7], rows[-1][:5]]
    first_read = [first_of(row) for row in sample]
    name = f"{type(model).__name__}, {arrange.__name__} read from {first_read}"
    try:
        with torch.no_grad():
            plain, other = padded_hidden(model, sample), arrange(model, sample, first_read=first_read)
    except Exception as refusal:  # whatever a foreign architecture makes of an argument that it does not know
        logger.info("%s: not taken: %s", name, refusal)
        return False
    differences = [
        float((plain.states[a + first : a + len(row)] - other.states[b + first : b + len(row)]).abs().max())
        for row, first, a, b in zip(sample, first_read, plain.starts, other.starts, strict=True)
    ]
    logger.info("%s: hidden states differ by %.1e from the plain ones", name, max(differences))
    return max(differences) <= CLOSE * float(plain.states.abs().max())


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads positions width"],
    key: Float[Tensor, "1 kv_heads positions width"],
    value: Float[Tensor, "1 kv_heads positions width"],
    attention_mask: Tensor | None,
    *,
    packed_runs: list[tuple[int, int]],
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "1 positions heads width"], None]:
    """Causal attention within each row: `packed_runs` are (rows, length) of rows that stand side by side."""
    if settings.get("position_bias") is not None or attention_mask is not None:
        raise NotImplementedError("attention with a bias or mask of its own is not packed")
    settings.pop("is_causal", None)
    windowed = sliding_window is not None and any(length > sliding_window for _, length in packed_runs)
    if not windowed and not settings.get("dropout") and fits_kernel(query, key, value):
        q, k, v = (tensor.squeeze(0) for tensor in (query, key, value))  # [0] would cost a copy on the way back
        return run_attention(q, k, v, packed_runs, scale=settings.get("scaling"))[None], None
    sizes = [count * length for count, length in packed_runs]
    parts = zip(packed_runs, *(tensor[0].split(sizes, dim=1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for (count, length), *chunk in parts:
        mask = _window(length, sliding_window, query.device)
        q, k, v = (tensor.unflatten(1, (count, length)).transpose(0, 1) for tensor in chunk)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **settings)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _window(length: int, width: int | None, device: torch.device) -> Tensor | None:
    """What a token sees through a sliding window, [1, 1, length, length]; None where it sees all before it."""
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


AttentionInterface.register(NAME, packed_attention)
