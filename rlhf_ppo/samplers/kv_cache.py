"""A key-value cache that is written in place and whose rows can leave."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

GROWTH = 128  # columns added at least, when the storage is full


class InPlaceCacheLayer(DynamicLayer):
    """`DynamicLayer` that writes new keys into spare columns instead of copying the whole cache at every token."""

    def __init__(self, columns: int) -> None:
        """Reserve `columns` positions; more are added when they are used up."""
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self.columns = columns
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append along the third axis and return all keys and values so far, as views of the storage."""
        start, self.length = self.length, self.length + key_states.shape[2]
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            self._store = [self._new_store(key_states), self._new_store(value_states)]
        elif self.length > self._store[0].shape[2]:
            self.columns = max(self.length, self._store[0].shape[2] + GROWTH)
            self._store = [self._moved(store, store[:, :, :start]) for store in self._store]
        self._store[0][:, :, start : self.length] = key_states
        self._store[1][:, :, start : self.length] = value_states
        return self._show()

    def batch_select_indices(self, indices: Int[Tensor, "rows"]) -> None:
        """Make row i what row `indices[i]` was; rows may repeat."""
        self._store = [self._moved(store, store[:, :, : self.length][indices]) for store in self._store]
        self._show()

    def keep_front(self, count: int, holes: Int[Tensor, "n"], movers: Int[Tensor, "n"]) -> None:
        """Move rows `movers` into `holes` and keep the first `count` rows: copies only what moves."""
        for store in self._store:
            store[holes, :, : self.length] = store[movers, :, : self.length]
        self._store = [store[:count] for store in self._store]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (store[:, :, : self.length] for store in self._store)
        self.keys, self.values = keys, values
        return keys, values

    def _new_store(self, like: Tensor) -> Tensor:
        rows, heads, _, width = like.shape
        return like.new_empty(rows, heads, max(self.columns, self.length), width)

    def _moved(self, store: Tensor, content: Tensor) -> Tensor:
        grown = store.new_empty(content.shape[0], store.shape[1], max(self.columns, self.length), store.shape[3])
        grown[:, :, : content.shape[2]] = content
        return grown


def new_cache(config: PreTrainedConfig, columns: int) -> DynamicCache:
    """The cache that `config` asks for, its full-attention layers writing in place."""
    cache = DynamicCache(config=config)
    cache.layers = [InPlaceCacheLayer(columns) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def supports_row_selection(config: PreTrainedConfig) -> bool:
    """Whether rows can be selected from every layer's cache: full or sliding-window attention, no recurrent state."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _attention_layers(cache: DynamicCache) -> list[DynamicLayer]:
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def select_rows(cache: DynamicCache, indices: Int[Tensor, "rows"]) -> None:
    """Make row i of every layer what row `indices[i]` was."""
    for layer in _attention_layers(cache):
        layer.batch_select_indices(indices)


def drop_rows(cache: DynamicCache, alive: Bool[Tensor, "rows"]) -> Int[Tensor, "alive"]:
    """Keep the rows that are alive, packed to the front, and return where each of them was.

    The last living rows fill the holes that the dead ones leave, so that the cost is that of the dead rows.
    """
    count = int(alive.sum())
    holes = (~alive[:count]).nonzero().squeeze(1)
    movers = alive[count:].nonzero().squeeze(1) + count
    kept = torch.arange(count, device=alive.device)
    kept[holes] = movers
    for layer in _attention_layers(cache):
        if isinstance(layer, InPlaceCacheLayer):
            layer.keep_front(count, holes, movers)
        else:
            layer.batch_select_indices(kept)
    return kept


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that one position of one row takes: keys and values of all layers."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)
