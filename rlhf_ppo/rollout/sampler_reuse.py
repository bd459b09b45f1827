"""Log-probabilities and values that the sampler found on its way, taken for the policy's own once they proved equal."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_ppo.batch import PolicyOutput
from rlhf_ppo.rollout.experience import Responses, ScoredResponses, Scorer

CLOSE = 1e-4
"""Nats; values by as much, relative above 1. The same function summed in another order differs by about 1e-6."""


@dataclass
class SamplerReuse:
    """Spares the policy its pass over a rollout that it has just drawn itself.

    The first rollout is scored by both; where they agree, the sampler's word is taken from then on, on all processes
    alike. Never reused: tokens drawn with filters or by another engine, products of a lower precision, responses cut
    off (their last value is not read on the way).

    Args:
        enabled: Whether to reuse at all.
        reduce_max: The largest number over processes.
    """

    enabled: bool
    reduce_max: Callable[[Tensor], Tensor]
    proven: bool | None = None
    """Whether the two agreed; None before the first rollout."""
    difference: float = math.nan
    """The largest at the first rollout."""
    reused: bool = False
    """Whether the last call took the sampler's word."""

    def __call__(self, scorer: Scorer, responses: Responses) -> ScoredResponses:
        """`scorer(responses.inputs)`, with or without the policy's own pass."""
        known = _told(responses) if self.enabled and self.proven is not False else None
        self.reused = known is not None and self.proven is True
        scored = scorer(responses.inputs, known if self.reused else None)
        if known is None or self.reused:
            return scored
        off = (known.logprobs - scored.logprobs).abs().amax()
        values = scored.values[:, :-1].masked_fill(~responses.mask, 0.0)
        apart = (known.values[:, :-1] - values).abs() / values.abs().clamp(min=1.0)
        self.difference = float(self.reduce_max(torch.stack([off, apart.masked_fill(~responses.mask, 0.0).amax()])))
        self.proven = self.difference <= CLOSE
        return scored

    def state_dict(self) -> dict[str, Any]:
        """What was found out, so that a resumed run does not ask again."""
        return {"proven": self.proven, "difference": None if math.isnan(self.difference) else self.difference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.proven = state["proven"]
        self.difference = math.nan if state["difference"] is None else float(state["difference"])

    def metrics(self) -> dict[str, float]:
        """What happened at the last rollout, and how close the first one was; empty where nothing was compared."""
        if math.isnan(self.difference):
            return {}
        return {"sampler/reused": float(self.reused), "sampler/first_difference": self.difference}


def _told(responses: Responses) -> PolicyOutput | None:
    """The policy's view of its own rollout as the sampler saw it; None where that is not all of it."""
    logprobs, values = responses.sampler_logprobs, responses.sampler_values
    if logprobs is None or values is None or responses.truncated is not None:
        return None
    return PolicyOutput(logprobs=logprobs, values=F.pad(values, (0, 1)))
