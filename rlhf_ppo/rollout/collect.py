"""Prompts -> responses -> scores: what happens before `learn`, in training and evaluation alike."""

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


def _alone(prepare: Prepare, score: Score, postprocess: Postprocess) -> RewardScores:
    return postprocess(score(prepare()))


@dataclass(frozen=True, kw_only=True)
class MissingEOS:
    """What a response costs that ran to its limit without a stop token."""

    penalty: float
    mode: Literal["replace", "subtract"] = "replace"
    """Whether the negative penalty replaces the score (Ziegler et al. 2019) or is subtracted from it."""


@dataclass(frozen=True, kw_only=True)
class CollectedResponses:
    """Responses with their texts."""

    samples: Samples
    prompts: list[str]
    """One a response."""
    responses: list[str]
    """Decoded once, for people and reward sources; training goes on with the sampled tokens."""
    columns: dict[str, list[object]]


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Draws and scores responses.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        sampler: Who draws.
        sampling: How.
        device: Where the policy is.
        failures: What happens when a reward source fails.
        fresh_weights: Surrounds every draw: inside, the sampler sees the policy whole and as it is.
        limits: What the model can take: a sampler of somebody else's is held to it. None: it is trusted.
        scoring: Who asks the reward sources, where several processes draw.
        sources_context: Surrounds every question to the sources: inside, their models are on their devices.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    sampling: SamplingConfig
    device: torch.device
    failures: RewardFailures = RAISE_ON_FAILURE
    fresh_weights: Callable[[], AbstractContextManager[object]] = nullcontext
    limits: ModelLimits | None = None
    scoring: Scoring = _alone
    sources_context: Callable[[], AbstractContextManager[object]] = nullcontext

    def draw(self, batch: PromptBatch, generator: torch.Generator) -> CollectedResponses:
        """`num_return_sequences` responses to each prompt, side by side."""
        prompts = [prompt.to(self.device) for prompt in batch.input_ids]
        with self.fresh_weights():
            samples = self.sampler(self.model, prompts, self.sampling, generator=generator)
        repeat = self.sampling.num_return_sequences
        check_count(samples, len(prompts) * repeat)
        return CollectedResponses(
            samples=samples,
            prompts=[text for text in batch.texts for _ in range(repeat)],
            responses=self.tokenizer.batch_decode(
                [response.tolist() for response in samples.responses], skip_special_tokens=True
            ),
            columns={name: [item for item in column for _ in range(repeat)] for name, column in batch.columns.items()},
        )

    def score(
        self, collected: CollectedResponses, sources: RewardSources, missing_eos: MissingEOS | None = None
    ) -> RewardScores:
        """Check what was drawn, ask the sources about the texts; then charge responses that never stopped."""
        return self.scoring(
            lambda: self._request(collected),
            lambda request: self._asked(sources, request),
            lambda scores: self._charged(scores, collected, missing_eos),
        )

    def _asked(self, sources: RewardSources, request: RewardRequest) -> RewardScores:
        with self.sources_context():
            return score_batch(sources, request, self.failures)

    def _request(self, collected: CollectedResponses) -> RewardRequest:
        if self.limits is not None:
            check_samples(collected.samples, self.limits, device=self.device)
        return RewardRequest(
            prompts=collected.prompts,
            responses=collected.responses,
            columns=collected.columns,
            response_lengths=[len(response) for response in collected.samples.responses],
        )

    def _charged(
        self, scores: RewardScores, collected: CollectedResponses, missing_eos: MissingEOS | None
    ) -> RewardScores:
        if missing_eos is None:
            return scores
        if scores.per_token is not None:
            raise ValueError("missing_eos takes one score a response, the reward source gave one a token")
        finished = torch.tensor(collected.samples.finished)
        total = missing_eos_penalty(scores.total, finished, penalty=missing_eos.penalty, mode=missing_eos.mode)
        return replace(scores, total=total)

    def kept(self, scores: RewardScores) -> list[int]:
        """Rows to learn from: no source skipped them, nor another response to the same prompt where those are compared.

        A group that lost a member would be compared with the responses to another prompt.
        """
        groups = scores.skipped.view(-1, self.sampling.num_return_sequences)
        return [
            row for row, skipped in enumerate(groups.any(1).repeat_interleave(groups.shape[1]).tolist()) if not skipped
        ]

    def responses(self, samples: Samples, scores: RewardScores) -> Responses | None:
        """The samples to learn from, as `learn` takes them; None where every sample was skipped."""
        kept = self.kept(scores)
        if not kept:
            return None
        responses: list[Tensor] = [samples.responses[row].to(self.device) for row in kept]
        known = samples.logprobs
        values = samples.values if self.sampling.samples_from_policy else None
        return Responses(
            inputs=TokenInputs(prompts=[samples.prompts[row].to(self.device) for row in kept], responses=responses),
            mask=pad_rows([torch.ones(len(response)) for response in responses]).bool().to(self.device),
            scores=scores.scores[kept].to(self.device),
            group_size=self.sampling.num_return_sequences,
            sampler_logprobs=None if known is None else pad_rows([known[row].to(self.device) for row in kept]),
            sampler_values=None if values is None else pad_rows([values[row].to(self.device) for row in kept]),
        )
