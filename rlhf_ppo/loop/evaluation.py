"""Held-out evaluation: sample, score, and say how far the policy has gone from its reference, with standard errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.learner.statistics import row_sums
from rlhf_ppo.rewards.sources import RewardSources
from rlhf_ppo.rollout.collect import Collector
from rlhf_ppo.rollout.experience import Scorer
from rlhf_ppo.rollout.prompts import PromptDataset


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Responses to held-out prompts with one number each for every measure."""

    prompts: list[str]
    responses: list[str]
    measures: dict[str, list[float]] = field(default_factory=dict)
    """Measure -> one number a response."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and standard error of the mean of each measure, over responses."""
        return {name: mean_and_stderr(values) for name, values in self.measures.items()}


def evaluate(
    collector: Collector,
    scorer: Scorer,
    prompts: PromptDataset,
    rewards: RewardSources,
    *,
    judges: RewardSources | None = None,
    rows: Sequence[int] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Answer held-out prompts with the policy as it is, once each; the same seed draws the same random numbers.

    Args:
        collector: Draws and scores.
        scorer: Policy and reference.
        prompts: Held-out prompts.
        rewards: What the policy is trained on: measure `score`.
        judges: Sources that take no part in training, each a measure of its own name.
        rows: Rows of `prompts` that this process answers; None: all.
        seed: Of the draws.
    """
    one_each = replace(collector, sampling=replace(collector.sampling, num_return_sequences=1))
    batch = prompts.batch(list(range(len(prompts))) if rows is None else list(rows))
    collected = one_each.sample(batch, torch.Generator().manual_seed(seed))
    scores = one_each.score(collected, rewards)
    measures = {"score": scores.total.masked_fill(scores.skipped, math.nan).tolist()}
    if judges is not None:
        for name, values in one_each.score(collected, judges).per_source.items():
            measures[name] = values.tolist()
    measures |= reference_measures(scorer, collected.samples.prompts, collected.samples.responses)
    return Evaluation(prompts=collected.prompts, responses=collected.responses, measures=measures)


def merge_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of all processes in the order of the prompts, which were dealt out one by one."""
    nothing = object()

    def dealt(columns: list[list[Any]]) -> list[Any]:
        return [item for row in zip_longest(*columns, fillvalue=nothing) for item in row if item is not nothing]

    return Evaluation(
        prompts=dealt([part.prompts for part in parts]),
        responses=dealt([part.responses for part in parts]),
        measures={name: dealt([part.measures[name] for part in parts]) for name in parts[0].measures},
    )


def mean_and_stderr(values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error (n - 1 in the deviation), nan left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return {"mean": math.nan, "stderr": math.nan}
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return {"mean": mean, "stderr": math.nan}
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return {"mean": mean, "stderr": math.sqrt(variance / len(known))}


@torch.no_grad()
def reference_measures(
    scorer: Scorer, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> dict[str, list[float]]:
    """KL to the reference and perplexity under it, one number a response.

    `kl` is the k1 estimate summed over a response, nats; `kl_k3` its non-negative relative (Schulman 2020);
    `reference_nll` the mean negative log-likelihood of a token under the reference, nats: its exponential is the
    perplexity.
    """
    inputs = TokenInputs(prompts=list(prompts), responses=list(responses))
    scored = scorer(inputs)
    lengths = inputs.response_lengths().to(scored.logprobs.device)
    mask = torch.arange(inputs.width(), device=lengths.device)[None, :] < lengths[:, None]
    log_ratio = (scored.ref_logprobs - scored.logprobs).masked_fill(~mask, 0.0)
    measures: Mapping[str, Tensor] = {
        "kl": row_sums(-log_ratio, mask),
        "kl_k3": row_sums(torch.expm1(log_ratio) - log_ratio, mask),
        "reference_nll": row_sums(-scored.ref_logprobs, mask) / lengths,
        "length": lengths.float(),
    }
    return {name: values.tolist() for name, values in measures.items()}
