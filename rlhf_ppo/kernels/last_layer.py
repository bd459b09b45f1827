"""The last layer of a trunk, where nobody reads most of a prompt: behind its keys and values no token sees another.

A policy reads the states from a prompt's last token on. For the tokens before, the last layer's queries, the product
behind its attention and its feed-forward layer are multiplied for nothing; here they are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

OF_LAYER = ("mlp", "feed_forward", "fc1", "fc2")
"""Names that architectures give the feed-forward part of a layer."""
OF_ATTENTION = ("q_proj", "o_proj", "out_proj", "c_proj", "dense")
"""Names of products inside attention that take each token by itself and are no keys and values."""


def tokenwise_parts(layers: Any) -> list[nn.Module]:
    """What takes each token by itself in the last of `layers`, as far as its names tell; a trial must confirm it.

    Args:
        layers: The `base_model` of a causal architecture.
    """
    stacks = [module for module in layers.modules() if isinstance(module, nn.ModuleList)]
    stacks = [stack for stack in stacks if len(stack) == layers.config.num_hidden_layers]
    if len(stacks) != 1:
        return []
    children = dict(stacks[0][-1].named_children())
    found = [children.pop(name) for name in OF_LAYER if name in children]
    return found + [
        part for child in children.values() for name, part in child.named_children() if name in OF_ATTENTION
    ]


@contextmanager
def last_layer_on(layers: Any, places: Int[Tensor, " read"] | None) -> Iterator[None]:
    """Inside, the last layer is computed at `places` of the flattened positions alone; elsewhere its states are void.

    Outside, a gradient may be taken, twice if need be. None: everywhere.
    """
    if places is None:
        yield
        return
    parts = tokenwise_parts(layers)
    before = [vars(part).get("forward") for part in parts]  # somebody else's exchange
    for part in parts:
        part.forward = partial(_forward, part.forward, places)
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            if own is None:
                del part.forward
            else:
                part.forward = own


def read_places(
    starts: Sequence[int], rows: Sequence[Tensor], first_read: Sequence[int] | None
) -> Int[Tensor, " read"] | None:
    """Where the tokens from each row's `first_read` on stand, of rows that begin at `starts`; None: all are read."""
    if first_read is None:
        return None
    spans = zip(starts, rows, first_read, strict=True)
    places = torch.cat([torch.arange(start + first, start + len(row)) for start, row, first in spans])
    return places.to(rows[0].device)


def _forward(
    plain: Callable[[Tensor], Any], places: Int[Tensor, " read"], x: Float[Tensor, "*positions width"]
) -> Float[Tensor, "*positions outputs"]:
    """`plain` at `places`, 0 elsewhere."""
    positions = x.shape[:-1]
    result = plain(x.flatten(0, -2).index_select(0, places)[None])
    if not isinstance(result, Tensor):
        raise NotImplementedError(f"a part of the last layer gives a {type(result).__name__}, expected a tensor")
    everywhere: Tensor = result.new_zeros(positions.numel(), result.shape[-1]).index_copy(0, places, result[0])
    return everywhere.view(*positions, -1)
