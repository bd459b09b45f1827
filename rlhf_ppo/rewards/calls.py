"""Calling reward sources: with the keywords they take, the asynchronous ones at the same time as the others."""

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Reward: TypeAlias = float | Sequence[float] | Mapping[int, float] | None
"""Of a response, of each of its tokens, of some of them (position -> number; -1 is the last), or "leave it out"."""
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
            raise ValueError(
                f"The weight of reward source {self.name!r} must be finite, got {self.weight}: no score would come of "
                "it. Set it to a number, 1 for the source as it is."
            )


def call_sources(
    named: Sequence[WeightedSource],
    request: RewardRequest,
    *,
    timeout: float | None = None,
    keep_going: bool = False,
) -> list[object]:
    """Every source's raw answer; coroutines run on the background loop while ordinary functions run here.

    Args:
        named: The sources.
        request: What they are asked about.
        timeout: Seconds that each source has; None: as long as it likes. An ordinary function then runs in a thread
            of its own, which is left behind when it does not come back.
        keep_going: Whether a `RewardSourceError` stands in place of the answer of a source that failed; otherwise the
            first failure is raised and the others are cancelled.

    Raises:
        RewardSourceError: a source failed; coroutines that still run are cancelled.
        TypeError: a source wants an argument that is no column.
    """
    keywords = [_keywords(item, request) for item in named]
    answers: dict[int, object] = {}
    pending: dict[int, Future[object]] = {}

    def failed(index: int, error: BaseException) -> None:
        answers[index] = failure = _failure(named[index].name, request, error)
        if not keep_going:
            raise failure from error

    try:
        for index in sorted(range(len(named)), key=lambda index: not _is_async(named[index].source)):
            try:
                answer = _called(named[index].source, keywords[index], timeout)
            except Exception as error:
                failed(index, error)
                continue
            if inspect.isawaitable(answer):
                pending[index] = asyncio.run_coroutine_threadsafe(_wait_for(answer, timeout), _background_loop())
            else:
                answers[index] = answer
        for index, raised in _failures(pending, timeout, keep_going=keep_going).items():
            failed(index, raised)
        answers |= {index: future.result() for index, future in pending.items() if index not in answers}
    finally:
        for future in pending.values():
            future.cancel()
    return [answers[index] for index in range(len(named))]


def _called(source: RewardSource, keywords: Mapping[str, Any], timeout: float | None) -> object:
    """What an ordinary function returns, within the time it has; an asynchronous one returns at once."""
    if timeout is None or _is_async(source):
        return source(**keywords)
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(source(**keywords))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="reward-source", daemon=True).start()
    done, _ = wait([future], timeout)
    if not done:
        raise _no_answer(timeout)
    return future.result()


def _failures(
    pending: Mapping[int, Future[object]], timeout: float | None, *, keep_going: bool
) -> dict[int, BaseException]:
    """Wait for the coroutines, or only until the first one fails; who failed, and how."""
    # Each coroutine keeps its own time; ours only ends when one of them blocks their loop.
    patience = None if timeout is None else timeout + _GRACE
    done, _ = wait(pending.values(), patience, return_when=ALL_COMPLETED if keep_going else FIRST_EXCEPTION)
    found: dict[int, BaseException] = {}
    for index, future in pending.items():
        error = CancelledError() if future.cancelled() else future.exception() if future in done else None
        if error is not None:
            found[index] = error
    late = [index for index, future in pending.items() if future not in done]
    if timeout is not None and late and (keep_going or not found):
        _background_loop.cache_clear()  # a loop that is blocked answers nobody: the next call gets a new one
        found |= {index: _no_answer(timeout) for index in late}
    return found


def _no_answer(timeout: float) -> TimeoutError:
    return TimeoutError(f"no answer within {timeout:g} s")


async def _wait_for(answer: Awaitable[object], timeout: float | None) -> object:
    if timeout is None:
        return await answer
    task = asyncio.ensure_future(answer)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if not done:
            raise _no_answer(timeout)
        return task.result()
    finally:
        task.cancel()


_GRACE = 5.0
"""Seconds beyond the time-out after which coroutines are given up that do not even notice it."""


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


def _failure(name: str, request: RewardRequest, error: BaseException) -> RewardSourceError:
    failure = RewardSourceError(
        f"Reward source {name!r} raised {type(error).__name__} on {len(request.prompts)} samples: {error}. "
        "To leave single samples out, let it return None for them; to try again, or to go on without the samples, set "
        "`TrainConfig.reward_failures`."
    )
    failure.__cause__ = error
    return failure
