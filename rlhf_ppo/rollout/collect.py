"""Sample and score responses, in training and evaluation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.chat.encoding import continued_text, decode_tokens
from rlhf_ppo.chat.prompt import ChatPrompt
from rlhf_ppo.environments.episode import Episode
from rlhf_ppo.environments.sampler import EnvironmentSampler
from rlhf_ppo.functional import missing_eos_penalty, soft_overlong_penalty
from rlhf_ppo.rewards.failures import RAISE_ON_FAILURE, RewardFailures
from rlhf_ppo.rewards.gather import Postprocess, Prepare, Score, Scoring
from rlhf_ppo.rewards.sources import RewardRequest, RewardScores, RewardSources, score_batch, zero_scores
from rlhf_ppo.rollout.checks import ModelLimits, check_count, check_samples
from rlhf_ppo.rollout.episodes import add_environment_rewards, episode_rows, episode_tasks, responses_of_episodes
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
class SoftOverlong:
    """Penalty of long responses (DAPO, Yu et al. 2025): 0 up to the buffer, then linear to `penalty` at the limit."""

    buffer: int
    """The penalty grows over this number of tokens before `max_new_tokens`."""
    penalty: float = 1.0
    """Penalty at `max_new_tokens`, in units of the score."""

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.penalty < 0:
            raise ValueError(
                f"expected buffer >= 1 and penalty >= 0, got {self}: long responses would not be penalized, or "
                "rewarded. DAPO uses buffer=4096 of 20480 tokens and penalty=1.0."
            )


@dataclass(frozen=True, kw_only=True)
class DecodedResponses:
    """Sampled responses with their texts and dataset columns."""

    samples: Samples
    prompts: list[str]
    """Prompt of each response, as text."""
    responses: list[str]
    """Decoded responses, for people and reward sources; training uses the sampled tokens. Of an episode: the policy's
    own replies, a line each, so that no reward mistakes an environment's text for an answer."""
    columns: dict[str, list[object]]
    """Columns of the dataset; of episodes also `transcripts`, the text with all observations."""
    episodes: list[Episode] | None = None
    """The episodes, where an environment answered."""
    tasks: list[dict[str, Any]] = field(default_factory=list)
    """Arguments of `reset` of each episode."""
    counts: dict[str, int] = field(default_factory=dict)
    """Failed episodes and the like on this process."""

    def segments(self) -> Samples:
        """The samples, with a row for each segment of an episode."""
        if self.episodes is None:
            return self.samples
        rows = episode_rows(self.episodes)
        return Samples(
            prompts=[row.prompt_ids for row in rows], responses=[row.response_ids for row in rows],
            logprobs=[row.logprobs for row in rows if row.logprobs is not None] if self.samples.logprobs else None,
            finished=[not row.truncated for row in rows],
        )  # fmt: skip

    def own_tokens(self) -> list[Int[Tensor, " own"]]:
        """The tokens of each response that the policy sampled."""
        if self.episodes is None:
            return self.samples.responses
        return [episode.response_ids[episode.mask] for episode in self.episodes]


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Samples responses and scores them.

    Args:
        synced_weights: Context for sampling: while active, the sampler has the current, unsharded weights.
        limits: Limits of the model, which sampled responses are checked against. None: no check.
        scoring: How processes share the scoring; see `make_scoring`.
        sources_context: Context for calling reward sources: while active, their models are on their devices.
        overlong: Penalty of responses near the maximum length. None: no penalty.
        mask_truncated: Whether responses without a stop token are kept out of the loss.
        best_of: Number of responses per prompt to learn from, the highest scores; None: all.
        environment: Plays episodes instead of sampling one response each. None: no environment.
        episode_seeds: Seed of the run, and 0 in training, 1 in evaluation; see `episode_tasks`.
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
    overlong: SoftOverlong | None = None
    mask_truncated: bool = False
    best_of: int | None = None
    environment: EnvironmentSampler | None = None
    episode_seeds: tuple[int, int] = (0, 0)

    def for_evaluation(self, seed: int) -> "Collector":
        """A copy that plays other episodes, and drops those that time out: no value stands for the rest of a score."""
        environment = self.environment and replace(self.environment, keep_timed_out=False)
        return replace(self, environment=environment, episode_seeds=(seed, 1))

    def sample(self, batch: PromptBatch, generator: torch.Generator) -> DecodedResponses:
        """Sample `num_return_sequences` adjacent responses to each prompt, or play as many episodes."""
        if self.environment is not None:
            return self._play(self.environment, batch, generator)
        prompts = [prompt.to(self.device) for prompt in batch.input_ids]
        with self.synced_weights():
            samples = self.sampler(self.model, prompts, self.sampling, generator=generator)
        num_copies = self.sampling.num_return_sequences
        check_count(samples, len(prompts) * num_copies)
        return DecodedResponses(
            samples=samples,
            prompts=[text for text in batch.texts for _ in range(num_copies)],
            responses=self._decode(samples, batch, num_copies),
            columns={
                name: [item for item in column for _ in range(num_copies)] for name, column in batch.columns.items()
            },
        )

    def _decode(self, samples: Samples, batch: PromptBatch, copies: int) -> list[str]:
        """Texts of the responses: they continue their prompts, unless they are messages or come from a decoder."""
        rows = [response.tolist() for response in samples.responses]
        continues = [not (isinstance(text, ChatPrompt) or self.model.is_encoder_decoder) for text in batch.texts]
        prompts = [prompt.tolist() if continues[row // copies] else [] for row, prompt in enumerate(samples.prompts)]
        return [continued_text(self.tokenizer, *pair) for pair in zip(prompts, rows, strict=True)]

    def _play(
        self, environment: EnvironmentSampler, batch: PromptBatch, generator: torch.Generator
    ) -> DecodedResponses:
        """Play `num_return_sequences` adjacent episodes for each row; groups with a failed one are left out."""
        copies = self.sampling.num_return_sequences
        tasks = list(episode_tasks(batch, copies, self.episode_seeds))
        options = [kwargs for kwargs in batch.template_kwargs for _ in range(copies)]
        with self.synced_weights():
            played = environment(self.model, tasks, self.sampling, generator=generator, template_kwargs=options)
        groups = [played.episodes[start : start + copies] for start in range(0, len(tasks), copies)]
        kept = [row for row in range(len(tasks)) if None not in groups[row // copies]]
        episodes = [episode for row in kept if (episode := played.episodes[row]) is not None]
        logprobs = [episode.logprobs for episode in episodes]
        samples = Samples(
            prompts=[episode.prompt_ids.to(self.device) for episode in episodes],
            responses=[episode.response_ids.to(self.device) for episode in episodes],
            logprobs=[row for row in logprobs if row is not None] if None not in logprobs else None,
            finished=[not episode.truncated for episode in episodes],
        )  # fmt: skip

        def decode(tokens: Tensor) -> str:  # `batch_decode` makes one text of no row
            return decode_tokens(self.tokenizer, tokens.tolist(), skip_special_tokens=True)

        columns: dict[str, list[object]] = {
            name: [column[row // copies] for row in kept] for name, column in batch.columns.items()
        }
        columns["transcripts"] = [decode(episode.response_ids) for episode in episodes]
        return DecodedResponses(
            samples=samples, prompts=[decode(episode.prompt_ids) for episode in episodes],
            responses=["\n".join(map(decode, episode.replies())) for episode in episodes],
            columns=columns, episodes=episodes, counts=played.counts(), tasks=[tasks[row] for row in kept],
        )  # fmt: skip

    def score(
        self, collected: DecodedResponses, sources: RewardSources | None, missing_eos: MissingEOS | None = None
    ) -> RewardScores:
        """Check the responses, score their texts, and apply `missing_eos` to those without a stop token.

        The rewards of environments are added; with `sources` None they are all there is.
        """
        return self.scoring(
            lambda: self._make_request(collected),
            lambda request: self._call_sources(sources, request),
            lambda scores: self._complete_scores(scores, collected, missing_eos),
        )

    def _call_sources(self, sources: RewardSources | None, request: RewardRequest) -> RewardScores:
        if sources is None or not request.prompts:
            return zero_scores(len(request.prompts), sources)
        with self.sources_context():
            return score_batch(sources, request, self.failures)

    def _make_request(self, collected: DecodedResponses) -> RewardRequest:
        if self.limits is not None and collected.prompts:
            check_samples(collected.segments(), self.limits, device=self.device)
        return RewardRequest(
            prompts=collected.prompts,
            responses=collected.responses,
            columns=collected.columns,
            response_lengths=[len(response) for response in collected.samples.responses],
        )

    def _complete_scores(
        self, scores: RewardScores, collected: DecodedResponses, missing_eos: MissingEOS | None
    ) -> RewardScores:
        if collected.episodes is not None:
            return add_environment_rewards(scores, collected.episodes)
        if self.overlong is not None:
            scores = self._penalize_length(scores, collected, self.overlong)
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

    def _penalize_length(
        self, scores: RewardScores, collected: DecodedResponses, overlong: SoftOverlong
    ) -> RewardScores:
        lengths = torch.tensor([len(response) for response in collected.samples.responses])
        penalty = overlong.penalty * soft_overlong_penalty(
            lengths, max_length=self.sampling.max_new_tokens, buffer=overlong.buffer
        )
        per_token = scores.per_token
        if per_token is not None:
            per_token = per_token.scatter_add(1, lengths[:, None] - 1, penalty[:, None])
        return replace(scores, total=scores.total + penalty, per_token=per_token)

    def kept_rows(self, scores: RewardScores) -> list[int]:
        """Indices of the rows to learn from: those of groups (responses to one prompt) in which no row was skipped.

        An incomplete group would be compared with responses to another prompt. With `best_of`, the best of each group.
        """
        copies = self.sampling.num_return_sequences
        complete = ~scores.skipped.view(-1, copies).any(dim=1)
        order = scores.total.view(-1, copies).argsort(dim=1, descending=True, stable=True)
        chosen = order[:, : self.best_of].sort(dim=1).values + torch.arange(len(order))[:, None] * copies
        return [int(row) for row in chosen[complete].flatten()]

    def responses(self, collected: DecodedResponses, scores: RewardScores) -> Responses | None:
        """Select the samples to learn from, in the form that `learn` takes; None if all were skipped."""
        rows = self.kept_rows(scores)
        if not rows:
            return None
        group_size = self.best_of or self.sampling.num_return_sequences
        if collected.episodes is not None:
            episodes = [collected.episodes[row] for row in rows]
            played = responses_of_episodes(episodes, self.device, scores=scores.scores[rows], group_size=group_size)
            cut_off = [episodes[row.episode].truncated for row in episode_rows(episodes)]
            excluded = torch.tensor(cut_off, device=self.device) if self.mask_truncated else None
            return replace(played, excluded=excluded)
        samples = collected.samples
        responses: list[Tensor] = [samples.responses[row].to(self.device) for row in rows]
        logprobs = samples.logprobs
        values = samples.values if self.sampling.samples_from_policy else None
        own_scores = scores.scores[rows].to(self.device)
        if own_scores.dim() == 2:  # the longest response may be one that was skipped
            own_scores = own_scores[:, : max(map(len, responses))]
        return Responses(
            inputs=TokenInputs(prompts=[samples.prompts[row].to(self.device) for row in rows], responses=responses),
            mask=pad_rows([torch.ones(len(response)) for response in responses]).bool().to(self.device),
            scores=own_scores,
            group_size=group_size,
            excluded=torch.tensor([not samples.finished[row] for row in rows], device=self.device)
            if self.mask_truncated
            else None,
            sampler_logprobs=None if logprobs is None else pad_rows([logprobs[row].to(self.device) for row in rows]),
            sampler_values=None if values is None else pad_rows([values[row].to(self.device) for row in rows]),
        )
