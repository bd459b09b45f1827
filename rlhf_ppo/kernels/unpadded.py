"""The layers of a model whose caller pads, run on the real tokens alone. Plain twin: the padded rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_ppo.kernels.packing import packed_hidden


@contextmanager
def unpadded(layers: Any) -> Iterator[None]:
    """Context manager: while active, `layers` packs rows that come padded on the right; states at padding are 0.

    The caller still gets [rows, width, hidden]. Only for layers that `packing_matches` accepts. Gradients may be
    computed after it.

    Args:
        layers: The `base_model` of a causal architecture. Calls of any other kind go through it unchanged.
    """
    own = vars(layers).get("forward")  # a forward that something else put there
    layers.forward = partial(_forward, layers, layers.forward)
    try:
        yield
    finally:
        if own is None:
            del layers.forward
        else:
            layers.forward = own


def _forward(
    layers: Any,
    plain: Callable[..., Any],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> Any:
    asked = {key for key, value in settings.items() if value is not None and value is not False} - {"return_dict"}
    if input_ids is None or attention_mask is None or asked or not _ragged_on_the_right(attention_mask):
        return plain(input_ids, attention_mask=attention_mask, **settings)
    real = attention_mask.bool()
    rows = [ids[mask] for ids, mask in zip(input_ids, real, strict=True)]
    hidden = packed_hidden(layers, rows, run=plain)
    spans = [torch.arange(start, start + len(row)) for start, row in zip(hidden.starts, rows, strict=True)]
    states = hidden.states.index_select(0, torch.cat(spans).to(hidden.states.device))
    padded = states.new_zeros(real.numel(), states.shape[-1])
    places = real.flatten().nonzero().squeeze(-1)
    return BaseModelOutputWithPast(last_hidden_state=padded.index_copy(0, places, states).unflatten(0, real.shape))


def _ragged_on_the_right(mask: Tensor) -> bool:
    """Whether each row begins with a token, ends with its padding, and some row has any."""
    if mask.dim() != 2:
        return False
    real = mask.bool()
    return bool(real[:, 0].all() and not (real[:, 1:] & ~real[:, :-1]).any() and not real[:, -1].all())
