"""A decoding step on tensors with fixed addresses, which a GPU can replay as a CUDA graph.

Launching the hundreds of kernels of a step takes the host longer than a GPU needs to run them. A graph launches them at
once, but reads and writes the same memory each time: keys and values have their final size, the mask says which of them
there are, and finished rows stay until a quarter of the rows has finished. Plain twin: a forward pass over
`kv_cache.InPlaceCacheLayer`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.functional.masked import HALF_PRECISION
from rlhf_ppo.models.loading import cache_argument
from rlhf_ppo.samplers.kv_cache import InPlaceCacheLayer, drop_rows

logger = logging.getLogger(__name__)

BUCKET = 256
"""The number of positions that attention reads is a multiple of this: a longer row needs another graph."""
ROWS_LEFT = 0.75
"""Finished rows leave when no more than this share of the rows is left: fewer rows need another graph."""
MIN_STEPS = 8
"""Fewest steps to come for which a graph is captured: that takes the host about two steps."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""How far a graph's first logits may differ from those of the same step without it, relative to the largest."""


@dataclass
class _Window:
    """What a step reads of the buffers, and where it writes."""

    slot: Int[Tensor, "1"]
    rows: int
    length: int = 0


class StaticCacheLayer(InPlaceCacheLayer):
    """Keys and values of a prefilled layer, written at a position that is on the device, and read up to a bucket."""

    def __init__(self, filled: InPlaceCacheLayer, window: _Window) -> None:
        super().__init__(filled.capacity)
        vars(self).update(vars(filled))
        self.window = window
        for buffer in self._buffers:  # masked, but a nan times 0 is a nan
            buffer[:, :, filled.length :] = 0.0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values; return those of the bucket, which the mask is for."""
        keys, values = (buffer[: self.window.rows, :, : self.window.length] for buffer in self._buffers)
        return (
            keys.index_copy_(2, self.window.slot, key_states),
            values.index_copy_(2, self.window.slot, value_states),
        )

    def get_seq_length(self) -> int:
        return self.window.length

    def compact_rows(self, count: int, holes: Int[Tensor, "n"], movers: Int[Tensor, "n"]) -> None:
        """Copy rows `movers` to rows `holes`; the window then reads the first `count`."""
        for buffer in self._buffers:
            buffer[holes] = buffer[movers]


class StaticStep:
    """The steps of a batch of rows after its prefill.

    Args:
        model: Its cache has full attention in every layer (`static_unsupported_reason`).
        cache: Filled with the prompts, with room for the responses.
        mask: Of the prompts, padded on the left; the columns of the responses are not read.
        positions: Of the last token of each prompt.
        width: Number of columns of the prompts.
        head_inputs: The list that a hook fills with the LM head's input (`contiguous_head_inputs`).
        settings: Further arguments of the model.
    """

    def __init__(
        self, model: Any, cache: DynamicCache, mask: Int[Tensor, "rows positions"], positions: Int[Tensor, "rows 1"],
        *, width: int, head_inputs: list[Tensor], settings: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.settings, self.head_inputs = model, settings, head_inputs
        rows, self.capacity = mask.shape
        self.end = width
        self.window = _Window(torch.full((1,), width - 1, device=mask.device), rows)
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [StaticCacheLayer(layer, self.window) for layer in cache.layers]  # type: ignore[arg-type]
        self.positions = positions.clone()
        self.ids = torch.zeros_like(self.positions)
        self.mask = mask.bool()
        self.mask[:, width:] = False
        self.captures = mask.device.type == "cuda"
        self._replay: Callable[[], Tensor] | None = None
        self._is_tried = False

    def __call__(self, ids: Int[Tensor, "rows 1"]) -> Float[Tensor, "rows vocab"]:
        """Run the last token of each row through the model."""
        window, self.end = self.window, self.end + 1
        self.ids[: window.rows] = ids
        self.positions[: window.rows] += 1
        window.slot += 1
        length = min(-(-self.end // BUCKET) * BUCKET, self.capacity)
        if length != window.length:
            window.length, self._replay = length, None
        if self._replay is not None:
            return self._replay()
        with self._autocast():
            logits = self._run()
            if self.captures and min(self.capacity, length) - self.end >= MIN_STEPS:
                self._replay = self._captured(logits)
        return logits

    def drop(self, alive: Sequence[bool]) -> Int[Tensor, "alive"] | None:
        """Keep the rows that are alive; their old indices, or None if too few have finished."""
        if sum(alive) > ROWS_LEFT * self.window.rows:
            return None
        kept = drop_rows(self.cache, alive, self.mask.device)
        self.window.rows, self._replay = len(kept), None
        for buffer in (self.positions, self.mask):
            buffer[: len(kept)] = buffer[kept]
        return kept

    def _run(self) -> Float[Tensor, "rows vocab"]:
        rows, length = self.window.rows, self.window.length
        mask = self.mask[:rows, :length].index_fill_(1, self.window.slot, True)
        output = self.model(
            input_ids=self.ids[:rows], attention_mask=mask[:, None, None, :], position_ids=self.positions[:rows],
            use_cache=True, return_dict=True, **{cache_argument(self.model): self.cache}, **self.settings,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits

    def _autocast(self) -> torch.autocast:
        """The caller's autocast without its cache, whose tensors a graph would read after they are freed."""
        kind = self.mask.device.type
        return torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )

    def _captured(self, expected: Float[Tensor, "rows vocab"]) -> Callable[[], Tensor] | None:
        """The step as a graph; the first one after a trial: run once more, it must give the same logits."""
        try:
            replay, logits = capture(self._run)
            inputs = list(self.head_inputs)  # the hook does not run in a replay
            problem = None if self._is_tried else self._difference(replay, logits, expected)
        except RuntimeError as refusal:
            problem = f"it refuses ({str(refusal).splitlines()[0][:120]})"
        if problem is not None:
            self.captures = False
            logger.warning("decoding without CUDA graphs on this GPU: a captured step is not the step, %s", problem)
            return None
        self._is_tried = True

        def step() -> Tensor:
            replay()
            self.head_inputs[:] = inputs
            return logits

        return step

    @staticmethod
    def _difference(replay: Callable[[], None], logits: Tensor, expected: Tensor) -> str | None:
        replay()
        gap = float((logits - expected).abs().max() / expected.abs().max())
        return None if gap <= TOLERANCE[logits.dtype] else f"its logits differ by {gap:.1e} of the largest"


def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record the kernels of a call on the GPU, without running them: what runs them, and the result that it fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def static_unsupported_reason(model: Any) -> str | None:
    """Why a model's steps cannot run over tensors that stay where they are, as a phrase; None: nothing is known."""
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "its cache keeps a window of positions"
    attention = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    return None if attention == "sdpa" else f"its attention is {attention!r}, not 'sdpa'"


@contextmanager
def weights_in_autocast_dtype(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager: while active, linear layers hold their weights in autocast's dtype, once for all steps.

    Autocast itself would cast them in every replay. Embeddings keep theirs; a head that is tied to one gets a copy.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules() if dtype in HALF_PRECISION else ():
            for name, weight in list(module._parameters.items()) if type(module) in (nn.Linear, Conv1D) else ():
                if weight is not None and weight.dtype == torch.float32:
                    replaced.append((module, name, weight))
                    module._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for module, name, weight in replaced:
            module._parameters[name] = weight
