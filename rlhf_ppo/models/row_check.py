"""Check fast paths on rows of real batches: windows, chunks and rotations that begin in long rows show only there."""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.models.fast_paths import ScoredBy
from rlhf_ppo.models.small_batch import SMALL_BATCH_TOKENS, is_low_precision, is_sharded
from rlhf_ppo.models.trunk import FastPaths

logger = logging.getLogger(__name__)

CLOSE, LOW_PRECISION_CLOSE = 1e-3, 0.1
"""How far the log-probabilities of a row may differ beside other rows, in nats."""

LIMITS = (
    "attention_chunk_size", "max_position_embeddings", "original_max_position_embeddings", "sliding_window",
)  # fmt: skip
"""Numbers of tokens at which masks change, or the rotation of all rows of a batch (LongRoPE, dynamic NTK)."""


def position_limits(model: Any) -> set[int]:
    """Numbers of tokens at which the architecture computes something else."""
    config = getattr(model, "config", None)
    text = {} if config is None else vars(config.get_text_config(decoder=True))
    rotary = text.get("rope_parameters") or {}
    nested = [part for part in rotary.values() if isinstance(part, dict)]
    found = [settings.get(name) for settings in (text, rotary, *nested) for name in LIMITS]
    return {limit for limit in found if isinstance(limit, int) and limit > 0}


class RowCheck:
    """Declines fast paths that score rows of a batch differently from each row alone, whenever rows become longer."""

    def __init__(self) -> None:
        self.longest = SMALL_BATCH_TOKENS
        """Tokens of the longest row that was checked; the next check is at twice as many."""
        self.limits_seen: set[int] = set()
        """Limits of the architecture that rows of one checked batch stood on both sides of."""

    def is_due(self, model: nn.Module, inputs: TokenInputs) -> bool:
        """Whether a pass over `inputs` should be checked first."""
        if torch.is_grad_enabled() or len(inputs) < 2:
            return False
        costs = [len(prompt) + len(response) for prompt, response in zip(inputs.prompts, inputs.responses, strict=True)]
        crossed = {limit for limit in position_limits(model) if min(costs) <= limit < max(costs)} - self.limits_seen
        due = min(costs) < max(costs) and (max(costs) > 2 * self.longest or bool(crossed)) and not is_sharded(model)
        self.limits_seen |= crossed if due else set()
        return due

    def __call__(
        self,
        model: nn.Module,
        paths: FastPaths,
        inputs: TokenInputs,
        score_by: ScoredBy,
        *,
        autocast: torch.dtype | None = None,
    ) -> FastPaths:
        """Leave out the paths that score the longest, middle or shortest row of `inputs` differently from it alone.

        Args:
            autocast: Dtype of the matrix products under autocast, in which `score_by` runs the layers.
        """
        order = inputs.costs().argsort()
        rows = inputs.select(order[[0, len(order) // 2, -1]].unique())
        self.longest = max(self.longest, int(inputs.costs().max()))
        alone = score_by(replace(paths, padding=False, packing=False, last_layer=False), rows, None)[2].logprobs

        def gap(paths: FastPaths) -> float:
            return float((score_by(paths, rows, None)[2].logprobs - alone).abs().max())

        first = found = gap(paths)
        rounded = autocast is not None or torch.is_autocast_enabled(inputs.prompts[0].device.type)
        tolerance = LOW_PRECISION_CLOSE if rounded or is_low_precision(model) else CLOSE
        declined: dict[str, str] = {}
        reason = f"rows of up to {int(rows.costs().max())} tokens differ by {first:.1e} nats from each row alone"
        for name in ("packing", "last_layer", "padding"):
            if not found <= tolerance and getattr(paths, name):
                paths = replace(paths, **{name: False})  # type: ignore[arg-type]
                declined[name] = reason
                found = gap(paths)
        if declined:
            logger.warning("declined from now on: %s: log-probabilities of %s", ", ".join(declined), reason)
        return replace(paths, declined={**paths.declined, **declined})
