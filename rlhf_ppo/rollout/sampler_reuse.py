"""Reuse the sampler's log-probabilities and values instead of a policy pass, once they proved equal."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_ppo.batch import PolicyOutput
from rlhf_ppo.rollout.experience import Responses, ScoredResponses, Scorer

TOLERANCE = 1e-4
"""Largest accepted difference: log-probabilities in nats, values relative above 1. Rounding alone gives about 1e-6."""


@dataclass
class SamplerReuse:
    """Scores responses, skipping the policy's pass where the sampler's outputs can be used instead.

    The first rollout compares both; if they agree, later rollouts use the sampler's outputs, on all processes. Never
    reused: tokens sampled with filters or by another engine, matrix products of lower precision, truncated responses
    (the sampler does not compute their last value).

    Args:
        enabled: Whether to reuse at all.
        reduce_max: Maximum over processes.
    """

    enabled: bool
    reduce_max: Callable[[Tensor], Tensor]
    proven: bool | None = None
    """Whether sampler and policy agreed; None before the first rollout."""
    difference: float = math.nan
    """Largest difference at the first rollout; nan before."""
    reused: bool = False
    """Whether the last call used the sampler's outputs."""

    def __call__(self, scorer: Scorer, responses: Responses) -> ScoredResponses:
        """Call `scorer(responses.inputs)`, without the policy's pass where its output is known."""
        sampler_output = _sampler_output(responses) if self.enabled and self.proven is not False else None
        self.reused = sampler_output is not None and self.proven is True
        scored = scorer(responses.inputs, sampler_output if self.reused else None)
        if sampler_output is None or self.reused:
            return scored
        logprob_difference = (sampler_output.logprobs - scored.logprobs).abs().amax()
        values = scored.values[:, :-1].masked_fill(~responses.mask, 0.0)
        relative = (sampler_output.values[:, :-1] - values).abs() / values.abs().clamp(min=1.0)
        value_difference = relative.masked_fill(~responses.mask, 0.0).amax()
        self.difference = float(self.reduce_max(torch.stack([logprob_difference, value_difference])))
        self.proven = self.difference <= TOLERANCE
        return scored

    def state_dict(self) -> dict[str, Any]:
        """Result of the comparison, so that a resumed run does not repeat it."""
        return {"proven": self.proven, "difference": None if math.isnan(self.difference) else self.difference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of the comparison."""
        self.proven = state["proven"]
        self.difference = math.nan if state["difference"] is None else float(state["difference"])

    def metrics(self) -> dict[str, float]:
        """Whether the last rollout reused outputs, and the difference at the first; {} if nothing was compared."""
        if math.isnan(self.difference):
            return {}
        return {"sampler/reused": float(self.reused), "sampler/first_difference": self.difference}


def _sampler_output(responses: Responses) -> PolicyOutput | None:
    """Sampler's log-probabilities and values as a `PolicyOutput`; None if incomplete."""
    logprobs, values = responses.sampler_logprobs, responses.sampler_values
    if logprobs is None or values is None or responses.truncated is not None:
        return None
    return PolicyOutput(logprobs=logprobs, values=F.pad(values, (0, 1)))
