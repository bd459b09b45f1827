"""KV cache that is written in place and can drop rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_ppo.models.device import free_memory
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.utils.transfer import upload

GROWTH = 128  # minimum number of positions added when the buffers are full


class InPlaceCacheLayer(DynamicLayer):
    """`DynamicLayer` that writes into preallocated buffers instead of copying the whole cache at every token."""

    def __init__(self, capacity: int) -> None:
        """Reserve `capacity` positions; the buffers grow when they are full."""
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self.capacity = capacity
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append along the third axis and return all keys and values so far, as views of the buffers."""
        start, self.length = self.length, self.length + key_states.shape[2]
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [self._new_buffer(key_states), self._new_buffer(value_states)]
        elif self.length > self._buffers[0].shape[2]:
            self.capacity = max(self.length, self._buffers[0].shape[2] + GROWTH)
            self._buffers = [self._reallocated(buffer, buffer[:, :, :start]) for buffer in self._buffers]
        self._buffers[0][:, :, start : self.length] = key_states
        self._buffers[1][:, :, start : self.length] = value_states
        return self._update_views()

    def reserve(self, capacity: int) -> None:
        """Move keys and values to buffers with room for `capacity` positions."""
        self.capacity = capacity
        contents: list[Any] = [self.keys, self.values]
        self._buffers = [self._reallocated(content, content) for content in contents]
        self._update_views()

    def compact_rows(self, count: int, holes: Int[Tensor, "n"], movers: Int[Tensor, "n"]) -> None:
        """Copy rows `movers` to rows `holes`, then truncate to the first `count` rows."""
        for buffer in self._buffers:
            buffer[holes, :, : self.length] = buffer[movers, :, : self.length]
        self._buffers = [buffer[:count] for buffer in self._buffers]
        self._update_views()

    def _update_views(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, : self.length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def _new_buffer(self, like: Tensor) -> Tensor:
        rows, heads, _, width = like.shape
        return like.new_empty(rows, heads, max(self.capacity, self.length), width)

    def _reallocated(self, buffer: Tensor, content: Tensor) -> Tensor:
        larger = buffer.new_empty(content.shape[0], buffer.shape[1], max(self.capacity, self.length), buffer.shape[3])
        larger[:, :, : content.shape[2]] = content
        return larger


def new_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """Make the cache for `config`, with in-place full-attention layers."""
    cache = DynamicCache(config=config)
    cache.layers = [InPlaceCacheLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def supports_row_selection(config: PreTrainedConfig) -> bool:
    """Whether rows can be selected from every layer's cache: full or sliding-window attention, no recurrent state."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _attention_layers(cache: DynamicCache) -> list[DynamicLayer]:
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def merge_rows(caches: Sequence[DynamicCache], indices: Int[Tensor, "rows"], capacity: int) -> DynamicCache:
    """One cache whose row i is row `indices[i]` of all caches' together, which lose theirs layer by layer."""
    for layers in zip(*(_attention_layers(cache) for cache in caches), strict=True):
        keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
        for layer in layers:
            layer.keys = layer.values = None
            vars(layer).pop("_buffers", None)
        first = layers[0]
        first.keys, first.values = (
            torch.cat(parts)[indices] if parts[1:] else parts[0][indices] for parts in (keys, values)
        )
        if isinstance(first, InPlaceCacheLayer):
            first.reserve(capacity)
    return caches[0]


def drop_rows(cache: DynamicCache, alive: Sequence[bool], device: torch.device) -> Int[Tensor, "alive"]:
    """Keep the rows that are alive, packed to the front; return their old indices.

    The last alive rows move into the slots of dropped ones, so the cost is proportional to the dropped rows.
    """
    count = sum(alive)
    into = [row for row in range(count) if not alive[row]]
    kept = list(range(count))
    for hole, mover in zip(into, (row for row in range(count, len(alive)) if alive[row]), strict=True):
        kept[hole] = mover
    old_rows = upload(torch.tensor(kept, dtype=torch.long), device)
    holes = upload(torch.tensor(into, dtype=torch.long), device)
    movers = old_rows[holes]
    for layer in _attention_layers(cache):
        if isinstance(layer, InPlaceCacheLayer):
            layer.compact_rows(count, holes, movers)
        else:
            layer.batch_select_indices(old_rows)
    return old_rows


def default_budget(device: torch.device) -> int:
    """Bytes for the KV cache: half of the free memory of a GPU, where logits and activations need some; else 4 GiB."""
    return free_memory(device) // 2 if device.type == "cuda" else 4 * 2**30


def computed_dtype(model: Any) -> torch.dtype:
    """Dtype of a model's keys and values: that of autocast, where it is on."""
    kind = model.device.type
    autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if autocast else model.dtype
    return dtype


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the KV cache per position and row: keys and values of all layers."""
    text_config = config.get_text_config(decoder=True)
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    try:
        width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    except AttributeError:  # a setting of each layer, such as in Gemma 4
        width = text_config.hidden_size // text_config.num_attention_heads
    return int(2 * text_config.num_hidden_layers * heads * width * dtype.itemsize)


def row_batches(
    lengths: list[int], config: SamplingConfig, model: Any, *, max_rows: int, budget: int
) -> Iterator[list[int]]:
    """Yield the row indices of each batch: longest prompts first, as many rows as the limits allow."""
    num_copies = config.num_return_sequences
    per_token = bytes_per_token(model.config, computed_dtype(model))
    order = sorted(range(len(lengths)), key=lambda prompt: (-lengths[prompt], prompt))
    rows = [prompt * num_copies + copy for prompt in order for copy in range(num_copies)]
    start = 0
    while start < len(rows):
        width = lengths[rows[start] // num_copies] + config.max_new_tokens
        count = max(1, min(max_rows, budget // (per_token * width)))
        yield rows[start : start + count]
        start += count
