"""The last layer computed only at the positions whose hidden states are read.

A policy reads the states from a prompt's last token on. In the last layer, the other tokens of a prompt only need keys
and values; their queries, attention output and feed-forward layer are left out. Plain twin: the whole layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

FEED_FORWARD_NAMES = ("mlp", "feed_forward", "fc1", "fc2")
"""Names of the feed-forward part of a layer, by architecture."""
PROJECTION_NAMES = ("q_proj", "o_proj", "out_proj", "c_proj", "dense")
"""Names of projections inside attention that take each token by itself, without keys and values."""


def tokenwise_modules(layers: Any) -> list[nn.Module]:
    """Modules of the last layer that compute each token by itself, found by name; a trial must confirm it.

    Args:
        layers: The `base_model` of a causal architecture.
    """
    stacks = [module for module in layers.modules() if isinstance(module, nn.ModuleList)]
    depth = getattr(layers.config.get_text_config(), "num_hidden_layers", None)
    stacks = [stack for stack in stacks if len(stack) == depth]
    if len(stacks) != 1:
        return []
    children = dict(stacks[0][-1].named_children())
    found = [children.pop(name) for name in FEED_FORWARD_NAMES if name in children]
    return found + [
        part for child in children.values() for name, part in child.named_children() if name in PROJECTION_NAMES
    ]


@contextmanager
def last_layer_at(layers: Any, positions: Int[Tensor, " read"] | None) -> Iterator[None]:
    """Context manager: while active, the last layer is computed only at `positions` of the flattened batch.

    Its states elsewhere are meaningless. Gradients, second ones too, may be computed after it. None: everywhere.
    """
    if positions is None:
        yield
        return
    parts = tokenwise_modules(layers)
    before = [vars(part).get("forward") for part in parts]  # a forward that something else put there
    for part in parts:
        part.forward = partial(_forward, part.forward, positions)
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            if own is None:
                del part.forward
            else:
                part.forward = own


def positions_to_read(
    starts: Sequence[int], rows: Sequence[Tensor], first_read: Sequence[int] | None
) -> Int[Tensor, " read"] | None:
    """Flattened positions of each row's tokens from `first_read` on, for rows that begin at `starts`; None: all."""
    if first_read is None:
        return None
    spans = zip(starts, rows, first_read, strict=True)
    positions = torch.cat([torch.arange(start + first, start + len(row)) for start, row, first in spans])
    return positions.to(rows[0].device)


def _forward(
    plain: Callable[[Tensor], Any], positions: Int[Tensor, " read"], x: Float[Tensor, "*positions width"]
) -> Float[Tensor, "*positions outputs"]:
    """`plain` at `positions`, 0 elsewhere."""
    shape = x.shape[:-1]
    result = plain(x.flatten(0, -2).index_select(0, positions)[None])
    if not isinstance(result, Tensor):
        raise NotImplementedError(f"a part of the last layer gives a {type(result).__name__}, expected a tensor")
    everywhere: Tensor = result.new_zeros(shape.numel(), result.shape[-1]).index_copy(0, positions, result[0])
    return everywhere.view(*shape, -1)
