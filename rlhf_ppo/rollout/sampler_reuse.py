"""Reuse the sampler's log-probabilities and values instead of a policy pass, once they proved equal."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_ppo.batch import PolicyOutput
from rlhf_ppo.models.row_check import position_limits
from rlhf_ppo.rollout.experience import Responses, ScoredResponses, Scorer

TOLERANCE = 1e-4
"""Largest accepted difference: log-probabilities in nats, values relative above 1. Rounding alone gives about 1e-6."""


@dataclass
class SamplerReuse:
    """Scores responses, skipping the policy's pass where the sampler's outputs can be used instead.

    The first rollout compares both; if they agree, later rollouts use the sampler's outputs, on all processes. Rows
    twice as long as any compared, or beyond a limit of the architecture, are compared again: windows, chunks and
    rotations show only there, and the policy's pass checks its fast paths. Never reused: tokens sampled with filters or
    by another engine, matrix products of lower precision, truncated responses (the sampler does not compute their last
    value).

    Args:
        reduce_max: Maximum over processes.
    """

    enabled: bool
    reduce_max: Callable[[Tensor], Tensor]
    proven: bool | None = None
    """Whether sampler and policy agreed; None before the first rollout."""
    difference: float = math.nan
    """Largest difference at the first rollout; nan before."""
    longest: int = 0
    """Tokens of the longest row that was compared."""
    reused: bool = False
    """Whether the last call used the sampler's outputs."""

    def __call__(self, scorer: Scorer, responses: Responses) -> ScoredResponses:
        """Call `scorer(responses.inputs)`, without the policy's pass where its output is known."""
        sampler_output = _sampler_output(responses) if self.enabled and self.proven is not False else None
        self.reused = sampler_output is not None and self.proven is True and not self._is_due(scorer, responses)
        scored = scorer(responses.inputs, sampler_output if self.reused else None)
        if sampler_output is None or self.reused:
            return scored
        logprob_difference = (sampler_output.logprobs - scored.logprobs).abs().amax()
        values = scored.values[:, :-1].masked_fill(~responses.mask, 0.0)
        relative = (sampler_output.values[:, :-1] - values).abs() / values.abs().clamp(min=1.0)
        value_difference = relative.masked_fill(~responses.mask, 0.0).amax()
        difference = float(self.reduce_max(torch.stack([logprob_difference, value_difference])))
        self.difference = difference if math.isnan(self.difference) else self.difference
        self.proven, self.longest = difference <= TOLERANCE, self._longest(responses)
        return scored

    def _is_due(self, scorer: Scorer, responses: Responses) -> bool:
        """Whether some row, of any process, is so long that both should be compared again."""
        longest, limits = self._longest(responses), position_limits(getattr(scorer.policy, "module", scorer.policy))
        return longest > 2 * self.longest or any(self.longest <= limit < longest for limit in limits)

    def _longest(self, responses: Responses) -> int:
        return int(self.reduce_max(responses.inputs.costs().max()[None]))

    def state_dict(self) -> dict[str, Any]:
        """Result of the comparison, so that a resumed run does not repeat it."""
        difference = None if math.isnan(self.difference) else self.difference
        return {"proven": self.proven, "difference": difference, "longest": self.longest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.proven, self.longest = state["proven"], state.get("longest", 0)
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
