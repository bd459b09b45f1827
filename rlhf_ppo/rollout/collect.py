"""Sample and score responses, in training and evaluation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.functional import missing_eos_penalty
from rlhf_ppo.rewards.failures import RAISE_ON_FAILURE, RewardFailures
from rlhf_ppo.rewards.gather import Postprocess, Prepare, Score, Scoring
from rlhf_ppo.rewards.sources import RewardRequest, RewardScores, RewardSources, score_batch
from rlhf_ppo.rollout.checks import ModelLimits, check_count, check_samples
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.prompts import PromptBatch
from rlhf_ppo.samplers.base import Sampler, Samples, SamplingConfig


def _score_in_one_process(prepare: Prepare, score: Score, postprocess: Postprocess) -> RewardScores:
    return postprocess(score(prepare()))


@dataclass(frozen=True, kw_only=True)
class MissingEOS:
    """Penalty for a response that reached its maximum length without a stop token."""

    penalty: float
    mode: Literal["replace", "subtract"] = "replace"
    """Whether the negative penalty replaces the score (Ziegler et al. 2019) or is subtracted from it."""


@dataclass(frozen=True, kw_only=True)
class CollectedResponses:
    """Sampled responses with their texts and dataset columns."""

    samples: Samples
    prompts: list[str]
    """Prompt of each response, as text."""
    responses: list[str]
    """Decoded responses, for people and reward sources; training uses the sampled tokens."""
    columns: dict[str, list[object]]


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Samples responses and scores them.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        sampler: Samples the responses.
        sampling: Sampling settings.
        device: The policy's device.
        failures: Retries of reward sources, and what to do when one fails.
        synced_weights: Context for sampling: while active, the sampler has the current, unsharded weights.
        limits: Limits of the model, which sampled responses are checked against. None: no check.
        scoring: How processes share the scoring; see `make_scoring`.
        sources_context: Context for calling reward sources: while active, their models are on their devices.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    sampling: SamplingConfig
    device: torch.device
    failures: RewardFailures = RAISE_ON_FAILURE
    synced_weights: Callable[[], AbstractContextManager[object]] = nullcontext
    limits: ModelLimits | None = None
    scoring: Scoring = _score_in_one_process
    sources_context: Callable[[], AbstractContextManager[object]] = nullcontext

    def sample(self, batch: PromptBatch, generator: torch.Generator) -> CollectedResponses:
        """Sample `num_return_sequences` adjacent responses to each prompt."""
        prompts = [prompt.to(self.device) for prompt in batch.input_ids]
        with self.synced_weights():
            samples = self.sampler(self.model, prompts, self.sampling, generator=generator)
        num_copies = self.sampling.num_return_sequences
        check_count(samples, len(prompts) * num_copies)
        return CollectedResponses(
            samples=samples,
            prompts=[text for text in batch.texts for _ in range(num_copies)],
            responses=self.tokenizer.batch_decode(
                [response.tolist() for response in samples.responses], skip_special_tokens=True
            ),
            columns={
                name: [item for item in column for _ in range(num_copies)] for name, column in batch.columns.items()
            },
        )

    def score(
        self, collected: CollectedResponses, sources: RewardSources, missing_eos: MissingEOS | None = None
    ) -> RewardScores:
        """Check the responses, score their texts, and apply `missing_eos` to those without a stop token."""
        return self.scoring(
            lambda: self._make_request(collected),
            lambda request: self._call_sources(sources, request),
            lambda scores: self._penalize_missing_eos(scores, collected, missing_eos),
        )

    def _call_sources(self, sources: RewardSources, request: RewardRequest) -> RewardScores:
        with self.sources_context():
            return score_batch(sources, request, self.failures)

    def _make_request(self, collected: CollectedResponses) -> RewardRequest:
        if self.limits is not None:
            check_samples(collected.samples, self.limits, device=self.device)
        return RewardRequest(
            prompts=collected.prompts,
            responses=collected.responses,
            columns=collected.columns,
            response_lengths=[len(response) for response in collected.samples.responses],
        )

    def _penalize_missing_eos(
        self, scores: RewardScores, collected: CollectedResponses, missing_eos: MissingEOS | None
    ) -> RewardScores:
        if missing_eos is None:
            return scores
        if scores.per_token is not None:
            raise ValueError(
                "missing_eos needs one score per response, but a reward source returned one per token: it is unknown "
                "which score to change. Return one number per response, or leave missing_eos at None."
            )
        finished = torch.tensor(collected.samples.finished)
        total = missing_eos_penalty(scores.total, finished, penalty=missing_eos.penalty, mode=missing_eos.mode)
        return replace(scores, total=total)

    def kept_rows(self, scores: RewardScores) -> list[int]:
        """Indices of the rows to learn from: those of groups (responses to one prompt) in which no row was skipped.

        An incomplete group would be compared with responses to another prompt.
        """
        groups = scores.skipped.view(-1, self.sampling.num_return_sequences)
        return [
            row for row, skipped in enumerate(groups.any(1).repeat_interleave(groups.shape[1]).tolist()) if not skipped
        ]

    def responses(self, samples: Samples, scores: RewardScores) -> Responses | None:
        """Select the samples to learn from, in the form that `learn` takes; None if all were skipped."""
        rows = self.kept_rows(scores)
        if not rows:
            return None
        responses: list[Tensor] = [samples.responses[row].to(self.device) for row in rows]
        logprobs = samples.logprobs
        values = samples.values if self.sampling.samples_from_policy else None
        return Responses(
            inputs=TokenInputs(prompts=[samples.prompts[row].to(self.device) for row in rows], responses=responses),
            mask=pad_rows([torch.ones(len(response)) for response in responses]).bool().to(self.device),
            scores=scores.scores[rows].to(self.device),
            group_size=self.sampling.num_return_sequences,
            sampler_logprobs=None if logprobs is None else pad_rows([logprobs[row].to(self.device) for row in rows]),
            sampler_values=None if values is None else pad_rows([values[row].to(self.device) for row in rows]),
        )
