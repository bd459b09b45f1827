"""A curriculum by success rate: prefer the prompts that the policy solves sometimes, but not always."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.rewards.sources import RewardScores
from rlhf_ppo.rollout.prompts import PromptSampler
from rlhf_ppo.utils.field_types import check_fields

MAX_DRAWS = 10
"""Draws of prompts per batch; what is missing then is filled with prompts outside the band."""


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Settings of a curriculum by success rate: the share of the responses to a prompt that score above a threshold.

    A prompt that was never sampled is taken. When a prompt is sampled again, its rate becomes the mean of the old rate
    and the new one.
    """

    threshold: float = 0.0
    """A response is a success if it scores more."""
    low: float = 0.05
    """Prompts with a smaller rate are too hard and mostly left out."""
    high: float = 0.95
    """Prompts with a larger rate are too easy and mostly left out."""
    keep: float = 0.1
    """Probability of taking a prompt outside the band. It is not 0, because the rate changes with the policy."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not (0 <= self.low < self.high <= 1 and 0 <= self.keep <= 1):
            raise ValueError(
                f"expected 0 <= low < high <= 1 and 0 <= keep <= 1, got {self}: no prompt would be within the band. "
                "Use Curriculum()."
            )


class CurriculumSampler:
    """Batches of prompt indices from a `PromptSampler`, in which prompts outside the band are mostly replaced.

    Args:
        batch_size: Prompts per batch on this process.
        seed: Seeds which prompts outside the band are taken.
        processes: Rates are shared, and draws are made together.
    """

    def __init__(
        self, sampler: PromptSampler, config: Curriculum, batch_size: int, seed: int, processes: Processes
    ) -> None:
        self.sampler, self.config, self.batch_size, self.seed = sampler, config, batch_size, seed
        self.processes = processes
        self.rates: dict[int, float] = {}
        """Success rate of each prompt that was sampled."""
        self.draws = 0
        """Draws so far, on every process."""
        self._last: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """Next batch of this process. Collective."""
        taken: list[int] = []
        left: list[int] = []
        for _ in range(MAX_DRAWS):
            for index in next(self.sampler):
                (taken if self._is_taken(index) else left).append(index)
            self.draws += 1
            if not self.processes.any_process(len(taken) < self.batch_size):
                break
        self._last = [*taken, *left][: self.batch_size]
        return self._last

    def update(self, scores: RewardScores) -> None:
        """Measure the success rates of the last batch. Collective."""
        copies = len(scores.total) // len(self._last)
        successes = (scores.total > self.config.threshold).view(-1, copies).double().mean(dim=1).tolist()
        complete = (~scores.skipped.view(-1, copies).any(dim=1)).tolist()
        measured = zip(self._last, successes, complete, strict=True)
        for index, rate in self.processes.gather_objects([(index, rate) for index, rate, whole in measured if whole]):
            self.rates[index] = 0.5 * (self.rates.get(index, rate) + rate)

    def state_dict(self) -> dict[str, Any]:
        rates = {str(index): rate for index, rate in self.rates.items()}
        return {"sampler": self.sampler.state_dict(), "rates": rates, "draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.rates = {int(index): float(rate) for index, rate in state["rates"].items()}
        self.draws = int(state["draws"])

    def _is_taken(self, index: int) -> bool:
        rate, config = self.rates.get(index), self.config
        if rate is None or config.low <= rate <= config.high:
            return True
        return float(np.random.default_rng([self.seed, self.draws, index]).random()) < config.keep


def update_curriculum(sampler: PromptSampler | CurriculumSampler, scores: RewardScores) -> RewardScores:
    """Update the curriculum with the scores of the last batch, which are returned."""
    if isinstance(sampler, CurriculumSampler):
        sampler.update(scores)
    return scores
