"""`LiveEpisode`: an environment and the tokens of its episode so far."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlhf_ppo.chat.encoding import decode_tokens, whole_characters
from rlhf_ppo.chat.messages import read_messages
from rlhf_ppo.environments.base import (
    Environment,
    EnvironmentFactory,
    Messages,
    Observation,
    Turn,
    accepted_columns,
    check_observation,
)
from rlhf_ppo.environments.concurrency import resolve_awaitable
from rlhf_ppo.environments.config import EpisodeConfig
from rlhf_ppo.environments.episode import Episode
from rlhf_ppo.environments.rendering import Renderer


class NoRoomForReplyError(ValueError):
    """No reply fits behind the first observation."""


class ReplayError(RuntimeError):
    """An environment that was started again answered the same replies differently."""


@dataclass
class ReplayableEnvironment:
    """An environment that can be started again: with the same columns and the same replies.

    Args:
        columns: Columns of the prompt's row, and the seed.
        template_defaults: What is passed to the chat template unless the environment wants something else.
    """

    factory: EnvironmentFactory
    columns: Mapping[str, Any]
    environment: Environment | None = None
    first: Observation = ""
    """The first observation."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What is passed to the chat template: `template_defaults`, and over them what the environment wants."""
    turns: list[tuple[str, Turn]] = field(default_factory=list)
    """Replies, each with its answer."""
    template_defaults: Mapping[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Make the environment and reset it; repeat the replies of a run that failed later.

        Raises:
            ReplayError: It answers differently than before.
        """
        with self._closed_on_error():
            self.environment = environment = self.factory()
            answer = resolve_awaitable(environment.reset(**accepted_columns(environment.reset, self.columns)))
            check_observation(answer, "the result of reset()")
            first = _read(answer)
            if first == []:
                raise ValueError("reset() returned no message: there is nothing to answer. Return one, or text.")
            if self.turns and first != self.first:
                raise ReplayError("reset() returned another first observation for the same columns and seed")
            own_kwargs = getattr(environment, "chat_template_kwargs", {})
            self.first, self.template_kwargs = first, {**self.template_defaults, **own_kwargs}
            for number, (reply, turn) in enumerate(self.turns):
                if self._answer(reply) != turn:
                    raise ReplayError(f"turn {number} had another answer for the same columns, seed and replies")

    def step(self, reply: str) -> Turn:
        """Send a reply; start again first where the environment is gone."""
        if self.environment is None:
            self.start()
        with self._closed_on_error():
            return self._answer(reply)

    @property
    def has_close(self) -> bool:
        """Whether an environment is there that wants to be closed."""
        return hasattr(self.environment, "close")

    def close(self) -> None:
        """Call the environment's `close`, if it has one."""
        environment, self.environment = self.environment, None
        close: Callable[[], Any] | None = getattr(environment, "close", None)
        if close is not None and inspect.isgenerator(resolve_awaitable(close())):
            raise TypeError("close() returned a generator, whose code never ran: let it be a plain function.")

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self.close()
            raise

    def _answer(self, reply: str) -> Turn:
        assert self.environment is not None
        turn = resolve_awaitable(self.environment.step(reply))
        if not isinstance(turn, Turn):
            raise TypeError(
                f"step() must return a Turn, got {type(turn).__name__}: it would be unknown what was observed and "
                "rewarded. Return rlhf_ppo.environments.Turn(observation, reward, terminated, truncated), or wrap "
                "another library's environment: rlhf_ppo.environments.adapters.from_gem reads Gymnasium's tuples."
            )
        return turn if turn.terminated else replace(turn, observation=_read(turn.observation))


def _read(observation: Observation) -> Observation:
    """Messages as they are read everywhere, in a copy: the environment may go on with its list."""
    if isinstance(observation, str) or not observation:
        return observation
    return read_messages(_whole(observation), "observation")


def _whole(value: Any) -> Any:
    """`value` with whole characters in all its texts: an environment may repeat half of one that the policy sampled."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, Mapping):
        return {name: _whole(part) for name, part in value.items()}
    return [_whole(part) for part in value] if isinstance(value, list | tuple) else value


@dataclass
class LiveEpisode:
    """One episode in progress: the environment, and the tokens that the policy has seen and sampled.

    Args:
        max_positions: Positions of the model; None: no limit.
    """

    environment: ReplayableEnvironment
    renderer: Renderer
    config: EpisodeConfig
    reply_tokens: int
    max_positions: int | None
    prompt: list[int] = field(default_factory=list)
    response: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    contexts: list[tuple[int, list[int]]] = field(default_factory=list)
    """Where the history was rewritten: position in the response, and the token ids from there on."""
    info: dict[str, float] = field(default_factory=dict)
    error: BaseException | None = None
    """Why the episode failed."""
    ended: bool = False
    truncated: bool = False
    _finished_reply: bool = False
    _last_reply: int = 0
    _conversation: Messages | None = None
    """All messages so far, where the chat template rewrites them."""

    def begin(self) -> None:
        """Encode the first observation; a NoRoomForReplyError if no reply fits behind it."""
        first = self.environment.first
        self.prompt = self.renderer.prompt(first, self.environment.template_kwargs)
        if self.renderer.rewrites and isinstance(first, list):
            self._conversation = list(first)
        if self._room() < self.reply_tokens:
            raise NoRoomForReplyError(
                f"the first observation has {len(self.prompt)} tokens, which leaves no room for a reply of "
                f"{self.reply_tokens}: shorten it, or lower max_new_tokens (the model has {self.max_positions} "
                f"positions, EpisodeConfig.max_tokens is {self.config.max_tokens})"
            )

    def context(self) -> list[int]:
        """The token ids that the policy reads now."""
        start, prompt = self.contexts[-1] if self.contexts else (0, self.prompt)
        return prompt + self.response[start:]

    def add_reply(self, tokens: list[int], logprobs: list[float] | None, *, finished: bool) -> str:
        """Append the tokens of a reply, one or more (else a ValueError); return its text."""
        if not tokens:
            raise ValueError(
                "expected at least one token in a reply, got none from the sampler: its reward would have no action to "
                "go to. Let the sampler return the stop token, or set min_new_tokens=1."
            )
        self._append(tokens, is_own=True)
        self.logprobs = None if self.logprobs is None or logprobs is None else self.logprobs + logprobs
        self.turn_ends.append(len(self.response))
        self._finished_reply, self._last_reply = finished, len(tokens)
        return decode_tokens(self.renderer.tokenizer, tokens, skip_special_tokens=True)

    def add_turn(self, reply: str, turn: Turn) -> None:
        """Credit the reward to the last token of the reply, append the observation, and decide whether that was all."""
        self.environment.turns.append((reply, turn))
        self.rewards[-1] = float(turn.reward)
        self.info |= {name: float(value) for name, value in turn.info.items()}
        if turn.terminated:
            self.ended = True
            return
        tokens = self.renderer.continuation(
            self.environment.first, turn.observation, self.response[-1], finished=self._finished_reply,
            template_kwargs=self.environment.template_kwargs,
        )  # fmt: skip
        self._append(tokens[: int(max(0, min(self._room(), len(tokens))))], is_own=False)
        if self.logprobs is not None:
            self.logprobs += [0.0] * (len(self.response) - len(self.logprobs))
        is_last = bool(turn.truncated) or len(self.turn_ends) >= self.config.max_turns
        if not is_last:
            self._rewrite(turn.observation)
        self.ended = self.truncated = is_last or self._room() < self.reply_tokens

    def _rewrite(self, observation: Observation) -> None:
        """Begin a segment if the rendering of the whole conversation is not what the policy has seen."""
        if self._conversation is None or isinstance(observation, str):
            self._conversation = None  # bare text has no place in a rendered conversation
            return
        end = self.turn_ends[-1] - len(self.response)  # from the end: negative, or 0 where nothing was observed
        until_reply = self.context()[: end or None]
        before, reply = until_reply[: -self._last_reply], until_reply[-self._last_reply :]
        content = self.renderer.content(before, reply, finished=self._finished_reply)
        self._conversation += [{"role": "assistant", "content": content}, *observation]
        ids = self.renderer.whole(self._conversation, self.environment.template_kwargs)
        if ids != self.context():
            self.contexts.append((len(self.response), ids))

    def cut_off(self) -> None:
        """End the episode, truncated, before its last reply, which the environment has not answered."""
        self.turn_ends.pop()
        for values in (self.response, self.mask, self.rewards, self.logprobs or []):
            del values[-self._last_reply :]
        self.error, self.ended, self.truncated = None, True, True

    def episode(self) -> Episode:
        """The finished episode."""
        logprobs = self.logprobs
        return Episode(
            prompt_ids=torch.tensor(self.prompt), response_ids=torch.tensor(self.response),
            mask=torch.tensor(self.mask), rewards=torch.tensor(self.rewards), truncated=self.truncated,
            logprobs=None if logprobs is None else torch.tensor(logprobs), turn_ends=tuple(self.turn_ends),
            contexts=tuple(
                (start, torch.tensor(ids)) for start, ids in self.contexts if start < len(self.response)
            ),
            info=self.info,
        )  # fmt: skip

    def _append(self, tokens: list[int], *, is_own: bool) -> None:
        self.response += tokens
        self.mask += [is_own] * len(tokens)
        self.rewards += [0.0] * len(tokens)

    def _room(self) -> float:
        """Tokens that still fit."""
        limits = [
            math.inf if self.max_positions is None else self.max_positions - len(self.context()),
            math.inf if self.config.max_tokens is None else self.config.max_tokens - len(self.response),
        ]
        return min(*limits)
