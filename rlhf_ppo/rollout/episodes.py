"""Finished episodes as the responses that `learn` takes, and their rewards as scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.environments.episode import Episode
from rlhf_ppo.functional import last_action_index
from rlhf_ppo.rewards.sources import RewardScores
from rlhf_ppo.rollout.checks import ModelLimits, check_step_inputs
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.prompts import PromptBatch, PromptDataset

SOURCE = "environment"
"""Name of the environment's rewards among reward sources."""


@dataclass(frozen=True)
class NumberedEpisodes:
    """In place of prompts: `count` episodes without columns, told apart by their seeds."""

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or self.count < 1:
            raise ValueError(
                f"prompts must be a PromptDataset or a positive number of episodes, got {self.count!r}: there would be "
                "nothing to play."
            )

    def __len__(self) -> int:
        return self.count

    @property
    def lengths(self) -> list[int]:
        """Equal for all episodes: their first observations are not known yet."""
        return [1] * self.count

    @property
    def longest(self) -> int:
        return 1

    @property
    def checksum(self) -> int:
        """Episodes are made from seeds: there is nothing to compare."""
        return 0

    def batch(self, indices: Sequence[int]) -> PromptBatch:
        """A batch without texts and columns."""
        empty = [torch.zeros(0, dtype=torch.long) for _ in indices]
        return PromptBatch(indices=list(indices), input_ids=empty, texts=[""] * len(empty), columns={})


def prompt_set(prompts: PromptDataset | int) -> PromptDataset | NumberedEpisodes:
    """A number as that many episodes; a dataset unchanged."""
    return NumberedEpisodes(prompts) if isinstance(prompts, int) else prompts


def check_step_arguments(
    queries: list[Tensor] | list[Episode],
    responses: list[Tensor] | None,
    scores: list[Tensor] | None,
    masks: list[Tensor] | None,
    *,
    limits: ModelLimits,
    device: torch.device,
    truncated: Sequence[bool] | Tensor | None = None,
    group_size: int = 1,
) -> Responses:
    """Validate the arguments of `step()`, tensors or episodes; a ValueError names the first invalid sample."""
    episodes = [query for query in queries if isinstance(query, Episode)] if isinstance(queries, list) else []
    if not episodes:
        return check_step_inputs(
            cast("list[Tensor]", queries), cast("list[Tensor]", responses), cast("list[Tensor]", scores), masks,
            limits=limits, device=device, truncated=truncated, group_size=group_size,
        )  # fmt: skip
    others = (responses, scores, masks, truncated)
    if len(episodes) < len(queries) or any(other is not None for other in others):
        raise ValueError(
            f"expected nothing but a list of episodes, got {len(episodes)} among {len(queries)} queries"
            f"{' and other arguments' if len(episodes) == len(queries) else ''}: an episode has its own tokens, "
            "rewards and mask. Pass `step(episodes)`, or `step(queries, responses, scores, response_masks)`."
        )
    rows = episode_rows(episodes)
    if len(rows) > len(episodes):  # segments; an algorithm without a critic refuses them later
        size = len(rows) if limits.batch_size == len(episodes) else limits.batch_size
        limits = replace(limits, batch_size=size, needs_groups=False)
    batch = responses_of_episodes(episodes, device, group_size=group_size)
    checked = check_step_inputs(
        [row.prompt_ids for row in rows], [row.response_ids for row in rows], [row.rewards for row in rows],
        [row.mask for row in rows], limits=limits, device=device, group_size=batch.group_size,
    )  # fmt: skip
    return replace(batch, inputs=checked.inputs)


def episode_tasks(batch: PromptBatch, copies: int, seeds: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Arguments of `reset` for `copies` adjacent episodes of each row: its columns, and a seed that they share.

    Args:
        copies: Episodes per row.
        seeds: Seed of the run and kind of episode (training, evaluation): with the row's index they give its seed, on
            any number of processes. A column called "seed" replaces it.
    """
    for row, index in enumerate(batch.indices):
        seed = int(np.random.SeedSequence([*seeds, index]).generate_state(1)[0])
        task = {"seed": seed} | {name: values[row] for name, values in batch.columns.items()}
        for _ in range(copies):
            yield dict(task)


def add_environment_rewards(scores: RewardScores, episodes: Sequence[Episode]) -> RewardScores:
    """Add the rewards of the episodes to the scores of reward sources, which count at each episode's last action."""
    totals = torch.tensor([episode.total_reward for episode in episodes])
    per_source = {SOURCE: totals} | scores.per_source
    if not episodes:  # all of this process failed
        return replace(scores, per_token=torch.zeros(0, 0), per_source=per_source)
    rewards, mask = pad_rows([episode.rewards for episode in episodes]), _masks(episodes)
    last = last_action_index(mask)[:, None]
    if scores.per_token is None:
        at_the_end = scores.total
    else:  # a score per response is at the last token, which may be an observation's
        is_behind = torch.arange(mask.shape[1]) > last
        rewards = rewards + scores.per_token.masked_fill(is_behind, 0.0)
        at_the_end = scores.per_token.masked_fill(~is_behind, 0.0).sum(dim=1)
    per_token = rewards.scatter_add(1, last, at_the_end[:, None])
    return replace(scores, total=scores.total + totals, per_token=per_token, per_source=per_source)


def responses_of_episodes(
    episodes: Sequence[Episode],
    device: torch.device,
    *,
    scores: Tensor | None = None,
    group_size: int = 1,
) -> Responses:
    """The batch to learn from.

    Args:
        scores: One per token, [B, T]; None: the rewards of the episodes.
        group_size: Number of adjacent episodes of one task.
    """
    rows = episode_rows(episodes)
    logprobs = [row.logprobs for row in rows if row.logprobs is not None]
    return Responses(
        inputs=TokenInputs(
            prompts=[row.prompt_ids.to(device) for row in rows], responses=[row.response_ids.to(device) for row in rows]
        ),
        mask=_masks(rows).to(device),
        scores=pad_rows([row.rewards if scores is None else scores[row.episode, row.span].cpu() for row in rows]).to(
            device
        ),
        truncated=torch.tensor([row.truncated for row in rows], device=device),
        group_size=group_size if len(rows) == len(episodes) else 1,
        turn_starts=pad_rows([row.turn_starts.float() for row in rows]).bool().to(device),
        continues=torch.tensor([row.continues for row in rows], device=device),
        sampler_logprobs=pad_rows(logprobs).to(device) if len(logprobs) == len(rows) else None,
    )


@dataclass(frozen=True, kw_only=True)
class EpisodeRow(Episode):
    """A segment of an episode: what the policy did in one context."""

    episode: int
    """Index of the episode."""
    span: slice
    """Its tokens in the episode."""
    continues: bool
    """Whether the next row is the next segment."""


def episode_rows(episodes: Sequence[Episode]) -> list[EpisodeRow]:
    """The segments of all episodes; those of one are adjacent."""
    rows = []
    for index, episode in enumerate(episodes):
        parts = episode.segments()
        for number, (context, span) in enumerate(parts):
            continues = number + 1 < len(parts)
            ends = None if episode.turn_ends is None else [end - span.start for end in episode.turn_ends]
            rows.append(
                EpisodeRow(
                    prompt_ids=context, response_ids=episode.response_ids[span], mask=episode.mask[span],
                    rewards=episode.rewards[span],
                    logprobs=None if episode.logprobs is None else episode.logprobs[span],
                    turn_ends=None if ends is None else tuple(end for end in ends if 0 < end <= span.stop - span.start),
                    truncated=continues or episode.truncated, episode=index, span=span, continues=continues,
                )
            )  # fmt: skip
    return rows


def episode_metrics(numbers: Sequence[Mapping[str, float]], counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Metrics of the episodes of all processes.

    Args:
        numbers: `Episode.numbers` of each episode; `env/<name>` is the mean over those that have the name.
        counts: Counts of each process, under the names of their metrics.
    """
    metrics = {name: float(sum(part[name] for part in counts)) for name in (counts[0] if counts else {})}
    for name in dict.fromkeys(name for row in numbers for name in row):
        values = [float(row[name]) for row in numbers if name in row]
        metrics[f"env/{name}"] = sum(values) / len(values)
    return metrics


def _masks(episodes: Sequence[Episode]) -> Tensor:
    return pad_rows([episode.mask.float() for episode in episodes]).bool()
