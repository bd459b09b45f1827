"""Calling reward sources: with the keywords they take, the asynchronous ones at the same time as the others."""

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

Reward: TypeAlias = float | Sequence[float] | None
RewardSource: TypeAlias = Callable[..., Sequence[Reward] | Awaitable[Sequence[Reward]]]


class RewardSourceError(RuntimeError):
    """A reward source raised an exception; the message names the source, `__cause__` is the exception."""


@dataclass(frozen=True, kw_only=True)
class RewardRequest:
    """The samples to be scored; item i of every field belongs to sample i."""

    prompts: list[str]
    """What the policy read, as text."""
    responses: list[str]
    """What the policy wrote, decoded from the sampled tokens."""
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    """The dataset's other columns."""
    response_lengths: list[int] | None = None
    """Tokens in each response, the stop token included; needed by sources with one number per token."""

    def __post_init__(self) -> None:
        lengths = {"responses": self.responses, "response_lengths": self.response_lengths, **self.columns}
        for name, values in lengths.items():
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(f"RewardRequest has {len(self.prompts)} prompts, but {len(values)} items in {name!r}.")
        if clash := {"prompts", "responses"}.intersection(self.columns):
            raise ValueError(f"Column {min(clash)!r} has the name of a keyword of reward sources. Rename the column.")


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """One source, the name it has in metrics and errors, and its factor in the sum."""

    name: str
    source: RewardSource
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.source):
            raise TypeError(
                f"Reward source {self.name!r} must be a callable (prompts=, responses=, **columns) -> list of "
                f"scores, got {type(self.source).__name__}."
            )
        if not math.isfinite(self.weight):
            raise ValueError(f"The weight of reward source {self.name!r} must be finite, got {self.weight}.")


def ask_sources(named: Sequence[WeightedSource], request: RewardRequest) -> list[object]:
    """Every source's raw answer; coroutines run on the background loop while ordinary functions run here.

    Raises:
        RewardSourceError: a source raised; coroutines that still run are cancelled.
        TypeError: a source wants an argument that is no column.
    """
    answers: dict[int, object] = {}
    pending: dict[int, Future[object]] = {}
    try:
        for index in sorted(range(len(named)), key=lambda index: not _is_async(named[index].source)):
            keywords = _keywords(named[index], request)
            try:
                answer = named[index].source(**keywords)
            except Exception as error:
                _fail(named[index].name, request, error)
            if inspect.isawaitable(answer):
                pending[index] = asyncio.run_coroutine_threadsafe(_wait_for(answer), _background_loop())
            else:
                answers[index] = answer
        done, _ = wait(pending.values(), return_when=FIRST_EXCEPTION)
        for index, future in pending.items():
            raised = CancelledError() if future.cancelled() else future.exception() if future in done else None
            if isinstance(raised, Exception):
                _fail(named[index].name, request, raised)
        answers |= {index: future.result() for index, future in pending.items()}
    finally:
        for future in pending.values():
            future.cancel()
    return [answers[index] for index in range(len(named))]


async def _wait_for(answer: Awaitable[object]) -> object:
    return await answer


@functools.cache
def _background_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole process: a client that a source keeps between batches is bound to its loop.

    It has a thread of its own, so that sources also work where a loop is already running, as in a notebook.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward-sources", daemon=True).start()
    return loop


def _is_async(source: RewardSource) -> bool:
    return inspect.iscoroutinefunction(source) or inspect.iscoroutinefunction(getattr(source, "__call__", None))  # noqa: B004


def _keywords(item: WeightedSource, request: RewardRequest) -> dict[str, Any]:
    """prompts, responses, and those columns that the source takes: all of them if it has `**columns`."""
    given: dict[str, Any] = {"prompts": request.prompts, "responses": request.responses, **request.columns}
    try:
        parameters = inspect.signature(item.source).parameters.values()
    except (TypeError, ValueError):  # Some builtins have no signature; they get everything.
        return given
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in by_name:
        if parameter.name not in given and parameter.default is parameter.empty:
            raise TypeError(
                f"Reward source {item.name!r} wants {parameter.name!r}, which is no column of the dataset "
                f"(it is given {', '.join(given)}). Rename the argument, give it a default, or add the column."
            )
    accepted = {parameter.name for parameter in by_name}
    return {name: value for name, value in given.items() if name in accepted}


def _fail(name: str, request: RewardRequest, error: Exception) -> NoReturn:
    raise RewardSourceError(
        f"Reward source {name!r} raised {type(error).__name__} on {len(request.prompts)} samples: {error}. "
        "To leave single samples out, let it return None for them."
    ) from error
