"""`EnvironmentSampler`: plays a batch of episodes, all replies of a turn in one call of the sampler."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.environments.base import EnvironmentFactory
from rlhf_ppo.environments.concurrency import run_concurrently
from rlhf_ppo.environments.config import EpisodeConfig
from rlhf_ppo.environments.episode import Episode
from rlhf_ppo.environments.live import LiveEpisode, NoRoomForReplyError, ReplayableEnvironment
from rlhf_ppo.environments.rendering import Renderer
from rlhf_ppo.samplers.base import Sampler, SamplingConfig, WeightSyncedSampler


@dataclass(frozen=True, kw_only=True)
class PlayedEpisodes:
    """The episodes of one call, in the order of the tasks."""

    episodes: list[Episode | None]
    """None where the environment failed."""
    errors: list[BaseException]
    """Why episodes failed."""
    retried: int
    """Number of calls of environments that were repeated."""
    timed_out: int
    """Number of episodes that were truncated because their environments exceeded the time limit."""
    drifted_turns: int
    """Number of turns for which the sampler continued other tokens than those it was given; 0 unless it is broken."""

    def counts(self) -> dict[str, int]:
        """Failed and timed out episodes, repeated calls, drifted turns, under the names of their metrics."""
        return {
            "env/failed": len(self.errors), "env/retried": self.retried, "env/timed_out": self.timed_out,
            "env/token_drift": self.drifted_turns,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EnvironmentSampler:
    """Plays episodes: samples the replies of all live episodes at once, then steps their environments concurrently.

    Every turn waits for the slowest environment, so the order in which they finish changes no result.

    Args:
        factory: Makes the environment of an episode.
        sampler: Samples the replies.
        tokenizer: The policy's tokenizer.
        device: The policy's device.
        config: Limits, concurrency, retries.
        max_positions: Positions of the model; None: no limit.
        any_process: Whether an argument is True on any process; called once a turn for samplers that all processes
            must call equally often.
        keep_timed_out: Whether an episode whose environment exceeds the time limit is kept, truncated before the reply
            that was not answered: right where a value stands for its future. Otherwise it is dropped.
        may_rewrite: Whether a chat template may rewrite the history, which begins a segment; see `EpisodeConfig`.
    """

    factory: EnvironmentFactory
    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    config: EpisodeConfig
    max_positions: int | None = None
    any_process: Callable[[bool], bool] = bool
    keep_timed_out: bool = False
    may_rewrite: bool = False

    def __call__(
        self,
        model: nn.Module,
        tasks: Sequence[Mapping[str, Any]],
        sampling: SamplingConfig,
        *,
        generator: torch.Generator | None = None,
        template_kwargs: Sequence[Mapping[str, Any]] = (),
    ) -> PlayedEpisodes:
        """Play one episode for each task.

        Args:
            model: The policy.
            tasks: Arguments of `reset`, one mapping per episode.
            sampling: Settings of a reply.
            generator: Random generator of the sampler.
            template_kwargs: One mapping per episode, passed to the chat template unless the environment has others.
        """
        renderer = Renderer(self.tokenizer, may_rewrite=self.may_rewrite and self.config.history == "auto")
        live = [
            LiveEpisode(
                ReplayableEnvironment(self.factory, task, template_defaults=options), renderer,
                self.config, sampling.max_new_tokens, self.max_positions,
            )
            for task, options in zip(tasks, template_kwargs or [{}] * len(tasks), strict=True)
        ]  # fmt: skip
        counts = _Counts()
        self._begin(live, counts)
        one_reply = replace(sampling, num_return_sequences=1)
        while self._is_anyone_playing(any(_is_playing(episode) for episode in live)):
            self._play_turn(model, [episode for episode in live if _is_playing(episode)], one_reply, generator, counts)
        errors = [episode.error for episode in live if episode.error is not None]
        if errors:
            warnings.warn(
                f"{len(errors)} of {len(live)} episodes were dropped: their environments failed, also when tried "
                f"again. The first error: {type(errors[0]).__name__}: {errors[0]}",
                stacklevel=2,
            )
        return PlayedEpisodes(
            episodes=[None if episode.error is not None else episode.episode() for episode in live],
            errors=errors, retried=counts.retried, timed_out=counts.timed_out, drifted_turns=counts.drifted,
        )  # fmt: skip

    def _is_anyone_playing(self, here: bool) -> bool:
        return self.any_process(here) if isinstance(self.sampler, WeightSyncedSampler) else here

    def _begin(self, live: list[LiveEpisode], counts: "_Counts") -> None:
        self._call(live, [lambda env: env.start()] * len(live), counts)
        started = [id(episode.environment.environment) for episode in live if episode.error is None]
        if len(set(started)) < len(started):
            raise ValueError(
                f"environment must make a new environment for each episode, got {len(set(started))} for {len(started)} "
                "episodes: they would play in one another's games. Pass the class, or a function that calls it."
            )
        for episode in live:
            if episode.error is None:
                with _dropped_if_unusable(episode):
                    episode.begin()
        self._close([episode for episode in live if episode.error is not None])

    def _play_turn(
        self,
        model: nn.Module,
        playing: list[LiveEpisode],
        sampling: SamplingConfig,
        generator: torch.Generator | None,
        counts: "_Counts",
    ) -> None:
        contexts = [episode.context() for episode in playing] or [[0]]  # [[0]]: others still play
        samples = self.sampler(
            model, [torch.tensor(ids, device=self.device) for ids in contexts], sampling, generator=generator
        )
        sampled = _to_lists(samples.responses)
        logprobs = None if samples.logprobs is None else _to_lists(samples.logprobs)
        given = _to_lists(samples.prompts)
        counts.drifted += sum(ids != context for ids, context in zip(given, contexts, strict=True)) if playing else 0
        replies = [
            episode.add_reply(sampled[row], None if logprobs is None else logprobs[row], finished=samples.finished[row])
            for row, episode in enumerate(playing)
        ]
        calls = [methodcaller("step", reply) for reply in replies]
        for episode, reply, turn in zip(playing, replies, self._call(playing, calls, counts), strict=True):
            if episode.error is None:
                with _dropped_if_unusable(episode):
                    episode.add_turn(reply, turn)
            elif self.keep_timed_out and isinstance(episode.error, TimeoutError) and episode.environment.turns:
                episode.cut_off()
                counts.timed_out += 1
        self._close([episode for episode in playing if not _is_playing(episode)])

    def _call(
        self,
        episodes: Sequence[LiveEpisode],
        calls: Sequence[Callable[[ReplayableEnvironment], Any]],
        counts: "_Counts",
    ) -> list[Any]:
        """Call the environments concurrently; set `error` on an episode whose call failed, and its retries, too."""
        results: list[Any] = [None] * len(episodes)
        pending = list(range(len(episodes)))
        for attempt in range(1 + self.config.retries):
            # A retry repeats all turns so far within its one call.
            repeated = max((len(episodes[row].environment.turns) for row in pending), default=0) if attempt else 0
            outcomes = run_concurrently(
                [partial(calls[row], episodes[row].environment) for row in pending],
                workers=self.config.max_concurrency,
                timeout=None if self.config.timeout is None else self.config.timeout * (1 + repeated),
                after_late=[episodes[row].environment.close for row in pending],
            )
            for row, outcome in zip(pending, outcomes, strict=True):
                failed = isinstance(outcome, BaseException)
                episodes[row].error, results[row] = (outcome, None) if failed else (None, outcome)
                if failed:  # an abandoned thread may still use the old one
                    environment = episodes[row].environment
                    episodes[row].environment = replace(environment, environment=None, turns=list(environment.turns))
            pending = [row for row in pending if episodes[row].error is not None]
            if not pending:
                break
            counts.retried += len(pending) if attempt < self.config.retries else 0
        return results

    def _close(self, episodes: Sequence[LiveEpisode]) -> None:
        closing = [episode.environment for episode in episodes if episode.environment.has_close]
        results = run_concurrently(
            [environment.close for environment in closing], workers=self.config.max_concurrency,
            timeout=self.config.timeout,
        )  # fmt: skip
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            warnings.warn(
                f"{len(errors)} environments failed in close(), which changes no result; they may leave processes or "
                f"files behind. The first error: {type(errors[0]).__name__}: {errors[0]}",
                stacklevel=2,
            )


@dataclass
class _Counts:
    retried: int = 0
    timed_out: int = 0
    drifted: int = 0


@contextmanager
def _dropped_if_unusable(episode: LiveEpisode) -> Iterator[None]:
    """Context manager: an observation that is too long, or that the chat template refuses, drops its episode alone."""
    try:
        yield
    except (NoRoomForReplyError, UnreadableText) as error:
        episode.error = error


def _is_playing(episode: LiveEpisode) -> bool:
    return episode.error is None and not episode.ended


def _to_lists(rows: Sequence[Tensor]) -> list[list[Any]]:
    """The rows as lists, with one copy from the device."""
    return [row.tolist() for row in torch.cat(list(rows)).cpu().split([len(row) for row in rows])]
