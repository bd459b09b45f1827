"""Held-out evaluation: sample responses, score them, and measure KL to the reference, with standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.learner.statistics import row_sums
from rlhf_ppo.rewards.sources import RewardSources, named_sources
from rlhf_ppo.rollout.collect import Collector, DecodedResponses
from rlhf_ppo.rollout.episodes import NumberedEpisodes, episode_rows, responses_of_episodes
from rlhf_ppo.rollout.experience import Scorer
from rlhf_ppo.rollout.prompts import PromptDataset

REFERENCE_MEASURES = ("kl", "kl_k3", "reference_nll", "length")
"""What `reference_measures` returns."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Responses to held-out prompts, with one number per response for every measure."""

    prompts: list[str]
    responses: list[str]
    measures: dict[str, list[float]] = field(default_factory=dict)
    """Name of a measure -> one number per response."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and standard error of the mean of each measure, over responses."""
        return {name: mean_and_stderr(values) for name, values in self.measures.items()}


def evaluate(
    collector: Collector,
    scorer: Scorer,
    prompts: PromptDataset | NumberedEpisodes,
    rewards: RewardSources | None,
    *,
    judges: RewardSources | None = None,
    rows: Sequence[int] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Sample one response per held-out prompt, and score them; deterministic given the seed.

    Args:
        collector: Samples responses and calls reward sources.
        scorer: Log-probabilities under policy and reference.
        rewards: Reward sources of training; their total is the measure `score`.
        judges: Reward sources that are not trained on; each is a measure under its name.
        rows: Rows of `prompts` for this process; None: all.
    """
    single_response = replace(
        collector, sampling=replace(collector.sampling, num_return_sequences=1), overlong=None, best_of=None
    )
    batch = prompts.batch(list(range(len(prompts))) if rows is None else list(rows))
    collected = single_response.sample(batch, torch.Generator().manual_seed(seed))
    scores = single_response.score(collected, rewards)
    measures = {"score": scores.total.masked_fill(scores.skipped, math.nan).tolist()}
    if judges is not None:
        judged = single_response.score(collected, judges).per_source
        measures |= {name: judged[name].tolist() for name in judge_names(judges)}
    if not collected.prompts:  # every episode of this process failed
        row = [torch.zeros(1, dtype=torch.long, device=collector.device)]
        scorer(TokenInputs(prompts=row, responses=row))  # the passes of sharded models are collective
        return Evaluation(prompts=[], responses=[])
    measures |= reference_measures(scorer, collected)
    if collected.episodes is None:
        return Evaluation(prompts=collected.prompts, responses=collected.responses, measures=measures)
    numbers = [episode.numbers() for episode in collected.episodes]
    names = dict.fromkeys(name for row in numbers for name in row)
    measures = {name: [row.get(name, math.nan) for row in numbers] for name in names} | measures
    transcripts = [str(text) for text in collected.columns["transcripts"]]
    return Evaluation(prompts=collected.prompts, responses=transcripts, measures=measures)


def judge_names(judges: RewardSources | None) -> list[str]:
    """Names of the judges, which are those of their measures."""
    return [] if judges is None else [item.name for item in named_sources(judges)]


def merge_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """Merge the evaluations of all processes; process i of n has the prompts i, i + n, i + 2n, ..."""
    missing = object()

    def interleave(columns: list[list[Any]]) -> list[Any]:
        return [item for row in zip_longest(*columns, fillvalue=missing) for item in row if item is not missing]

    def values(part: Evaluation, name: str) -> list[float]:
        return part.measures.get(name, [math.nan] * len(part.prompts))  # a number that no episode there has

    names = dict.fromkeys(name for part in parts for name in part.measures)
    return Evaluation(
        prompts=interleave([part.prompts for part in parts]),
        responses=interleave([part.responses for part in parts]),
        measures={name: interleave([values(part, name) for part in parts]) for name in names},
    )


def mean_and_stderr(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error of the mean (n - 1 in the deviation), without nan."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return {"mean": math.nan, "stderr": math.nan}
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return {"mean": mean, "stderr": math.nan}
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return {"mean": mean, "stderr": math.sqrt(variance / len(known))}


@torch.no_grad()
def reference_measures(scorer: Scorer, collected: DecodedResponses) -> dict[str, list[float]]:
    """KL to the reference and likelihood under it, one number per response or episode, over the policy's own tokens.

    `kl` is the k1 estimate summed over a response, nats; `kl_k3` the non-negative k3 estimate (Schulman 2020);
    `reference_nll` the mean negative log-likelihood of a token under the reference, nats: its exponential is the
    perplexity; `length` the number of the policy's tokens. Without a reference, `length` alone.
    """
    if collected.episodes is None:
        inputs = TokenInputs(prompts=collected.samples.prompts, responses=collected.samples.responses)
        own, owner = [torch.ones(len(row)) for row in inputs.responses], list(range(len(inputs)))
    else:
        rows = responses_of_episodes(collected.episodes, collected.samples.prompts[0].device)
        inputs, own = rows.inputs, list(rows.mask.float())
        owner = [row.episode for row in episode_rows(collected.episodes)]
    scored = scorer(inputs)
    mask = pad_rows(own).bool().to(scored.logprobs.device)
    sums = {"length": mask.sum(dim=1).double()}
    if scored.ref_logprobs is not None:
        log_ratio = (scored.ref_logprobs - scored.logprobs).masked_fill(~mask, 0.0)
        sums = {
            "kl": row_sums(-log_ratio, mask),
            "kl_k3": row_sums(torch.expm1(log_ratio) - log_ratio, mask),
            "reference_nll": row_sums(-scored.ref_logprobs, mask),
        } | sums  # fmt: skip
    index = torch.tensor(owner, device=mask.device)
    totals = {
        name: torch.zeros(len(collected.prompts), dtype=torch.double, device=mask.device).index_add(0, index, values)
        for name, values in ((name, values.double()) for name, values in sums.items())
    }
    if "reference_nll" in totals:
        totals["reference_nll"] /= totals["length"]
    return {name: values.tolist() for name, values in totals.items()}
