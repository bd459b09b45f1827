"""Roll out a batch; with `DynamicSampling`, sample again until every group has a spread of scores."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from rlhf_ppo.batch import join_columns, select_columns
from rlhf_ppo.rewards.sources import RewardScores
from rlhf_ppo.rollout.collect import DecodedResponses
from rlhf_ppo.samplers.base import Samples
from rlhf_ppo.utils.field_types import check_fields

RolloutResult: TypeAlias = tuple[DecodedResponses, RewardScores, dict[str, float]]
"""Responses, scores, seconds."""


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """Replace groups of responses that all score the same, which teach nothing (DAPO, Yu et al. 2025).

    Groups that a reward source skipped are replaced, too.
    """

    max_rounds: int = 10
    """Maximum number of sampling rounds per iteration. After them, groups of equal scores fill the batch."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be at least 1, got {self.max_rounds}: nothing would be sampled. Use 10.")


def roll_out(
    sample: Callable[[], DecodedResponses],
    score: Callable[[DecodedResponses], RewardScores],
    is_stopped: Callable[[], bool],
    *,
    dynamic: DynamicSampling | None,
    groups: int,
    group_size: int,
    any_process: Callable[[bool], bool],
    best_of: int | None = None,
) -> RolloutResult | None:
    """Sample and score a batch; None after a stop. Collective.

    Args:
        is_stopped: Whether a signal arrived on any process.
        dynamic: Settings of dynamic sampling; None: one round.
        groups: Number of groups of a batch on this process.
        group_size: Number of adjacent responses to one prompt.
        any_process: Whether a condition holds on any process.
        best_of: Number of responses of a group that are learned from, those with the highest scores; None: all.
    """
    rounds: list[tuple[DecodedResponses, RewardScores]] = []
    times = {"time/generate": 0.0, "time/reward": 0.0}
    while True:
        start = time.perf_counter()
        collected = sample()
        times["time/generate"] += time.perf_counter() - start
        if is_stopped():
            return None
        start = time.perf_counter()
        rounds.append((collected, score(collected)))
        times["time/reward"] += time.perf_counter() - start
        if dynamic is None or is_stopped():
            return *rounds[0], times
        spread = sum(len(groups_with_spread(scores, group_size, best_of)) for _, scores in rounds)
        if len(rounds) == dynamic.max_rounds or not any_process(spread < groups):
            return *fill_batch(rounds, groups, group_size, best_of), times


def groups_with_spread(scores: RewardScores, group_size: int, best_of: int | None = None) -> list[int]:
    """Indices of the groups whose (`best_of` highest) total scores differ, and of which no response was skipped."""
    totals, skipped = scores.total.view(-1, group_size), scores.skipped.view(-1, group_size)
    totals = totals.sort(dim=1, descending=True).values[:, :best_of]
    differs = (totals != totals[:, :1]).any(dim=1) & ~skipped.any(dim=1)
    return [int(group) for group in differs.nonzero().flatten()]


def fill_batch(
    rounds: Sequence[tuple[DecodedResponses, RewardScores]], groups: int, group_size: int, best_of: int | None = None
) -> tuple[DecodedResponses, RewardScores]:
    """A batch of `groups` groups: those with a spread, and others where they are too few, in the order of sampling."""
    collected = _concatenate_responses([part for part, _ in rounds])
    scores = _concatenate_scores([part for _, part in rounds])
    sampled = len(scores.total) // group_size
    spread = groups_with_spread(scores, group_size, best_of)
    skipped = scores.skipped.view(-1, group_size).any(dim=1).tolist()
    others = sorted(set(range(sampled)) - set(spread), key=lambda group: (skipped[group], group))
    chosen = sorted([*spread, *others][:groups])
    rows = [group * group_size + copy for group in chosen for copy in range(group_size)]
    counts = collected.counts | {"env/groups_sampled": sampled, "env/groups_equal": sampled - len(spread)}
    return replace(_select_responses(collected, rows), counts=counts), scores.select(rows)


_SAMPLE_COLUMNS = ("prompts", "responses", "finished", "logprobs", "values")
_RESPONSE_COLUMNS = ("prompts", "responses", "columns", "episodes", "tasks")


def _concatenate_responses(parts: Sequence[DecodedResponses]) -> DecodedResponses:
    samples = Samples(**join_columns([part.samples for part in parts], _SAMPLE_COLUMNS))
    counts = {name: sum(part.counts.get(name, 0) for part in parts) for name in parts[0].counts}
    return DecodedResponses(samples=samples, counts=counts, **join_columns(parts, _RESPONSE_COLUMNS))


def _select_responses(collected: DecodedResponses, rows: Sequence[int]) -> DecodedResponses:
    samples = replace(collected.samples, **select_columns(collected.samples, _SAMPLE_COLUMNS, rows))
    return replace(collected, samples=samples, **select_columns(collected, _RESPONSE_COLUMNS, rows))


def _concatenate_scores(parts: Sequence[RewardScores]) -> RewardScores:
    if any(part.per_token is not None for part in parts):  # a round in which all samples were skipped has none
        parts = [
            replace(part, per_token=part.total.new_zeros(len(part.total), 0))
            if part.per_token is None and part.skipped.all()
            else part
            for part in parts
        ]
    if len({part.per_token is None for part in parts}) > 1:
        raise ValueError(
            "expected scores per token in every round of an iteration, or in none, got both: they cannot be joined. "
            "Let the reward source return one kind."
        )
    return parts[0].joined(parts[1:])
