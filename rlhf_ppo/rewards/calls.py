"""Call reward sources with the keyword arguments they accept, async ones concurrently with the others."""

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
"""Score of a response, scores of all its tokens, or of some (position -> score, -1 is the last); None: skip it."""
RewardSource: TypeAlias = Callable[..., Sequence[Reward] | Awaitable[Sequence[Reward]]]


class RewardSourceError(RuntimeError):
    """A reward source raised or timed out; the message names the source, `__cause__` is its exception."""


@dataclass(frozen=True, kw_only=True)
class RewardRequest:
    """A batch of samples to score; item i of every field belongs to sample i."""

    prompts: list[str]
    """Prompts as text, as the policy reads them."""
    responses: list[str]
    """Responses as text, decoded from the sampled tokens."""
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    """The dataset's other columns."""
    response_lengths: list[int] | None = None
    """Tokens of each response, the stop token included; needed for per-token scores."""

    def __post_init__(self) -> None:
        lengths = {"responses": self.responses, "response_lengths": self.response_lengths, **self.columns}
        for name, values in lengths.items():
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(f"RewardRequest has {len(self.prompts)} prompts, but {len(values)} items in {name!r}.")
        if clash := {"prompts", "responses"}.intersection(self.columns):
            raise ValueError(f"Column {min(clash)!r} has the name of a keyword of reward sources. Rename the column.")


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """A reward source, its name in metrics and errors, and its weight in the summed reward."""

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
                f"The weight of reward source {self.name!r} must be finite, got {self.weight}: the summed reward "
                "would not be finite. Set it to a number; 1 leaves the source's scores unchanged."
            )


def call_sources(
    sources: Sequence[WeightedSource],
    request: RewardRequest,
    *,
    timeout: float | None = None,
    keep_going: bool = False,
) -> list[object]:
    """Call every source once and return their raw results, in the order of the sources.

    Coroutines run on a background event loop while ordinary functions run here.

    Args:
        timeout: Seconds per source; None: no limit. With a limit, an ordinary function runs in its own thread, which
            is abandoned when it does not return.
        keep_going: Whether a failed source's result is its `RewardSourceError`; otherwise the first failure is raised
            and the other sources are cancelled.

    Raises:
        RewardSourceError: A source failed; coroutines that still run are cancelled.
        TypeError: A source has a required argument that is not a column.
    """
    keywords = [accepted_keywords(source, request) for source in sources]
    results: dict[int, object] = {}
    pending: dict[int, Future[object]] = {}

    def record_failure(index: int, error: BaseException) -> None:
        results[index] = failure = _source_error(sources[index].name, request, error)
        if not keep_going:
            raise failure from error

    try:
        for index in sorted(range(len(sources)), key=lambda index: not _is_async(sources[index].source)):
            try:
                result = _call(sources[index].source, keywords[index], timeout)
            except Exception as error:
                record_failure(index, error)
                continue
            if inspect.isawaitable(result):
                pending[index] = asyncio.run_coroutine_threadsafe(_wait_for(result, timeout), background_loop())
            else:
                results[index] = result
        for index, exception in _wait_for_coroutines(pending, timeout, keep_going=keep_going).items():
            record_failure(index, exception)
        results |= {index: future.result() for index, future in pending.items() if index not in results}
    finally:
        for future in pending.values():
            future.cancel()
    return [results[index] for index in range(len(sources))]


def _call(source: RewardSource, keywords: Mapping[str, Any], timeout: float | None) -> object:
    """Call a source, an ordinary function with a time limit; an async one returns its awaitable at once."""
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
        raise _timeout_error(timeout)
    return future.result()


def _wait_for_coroutines(
    pending: Mapping[int, Future[object]], timeout: float | None, *, keep_going: bool
) -> dict[int, BaseException]:
    """Wait for the coroutines, or until the first one fails; return source index -> exception."""
    # Each coroutine has its own timeout; this one only ends the wait when a coroutine blocks the event loop.
    wait_seconds = None if timeout is None else timeout + _GRACE_SECONDS
    done, _ = wait(pending.values(), wait_seconds, return_when=ALL_COMPLETED if keep_going else FIRST_EXCEPTION)
    errors: dict[int, BaseException] = {}
    for index, future in pending.items():
        error = CancelledError() if future.cancelled() else future.exception() if future in done else None
        if error is not None:
            errors[index] = error
    unfinished = [index for index, future in pending.items() if future not in done]
    if timeout is not None and unfinished and (keep_going or not errors):
        background_loop.cache_clear()  # the loop is blocked: the next call gets a new one
        errors |= {index: _timeout_error(timeout) for index in unfinished}
    return errors


def _timeout_error(timeout: float) -> TimeoutError:
    return TimeoutError(f"no answer within {timeout:g} s")


async def _wait_for(result: Awaitable[object], timeout: float | None) -> object:
    if timeout is None:
        return await result
    task = asyncio.ensure_future(result)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if not done:
            raise _timeout_error(timeout)
        return task.result()
    finally:
        task.cancel()


_GRACE_SECONDS = 5.0
"""Seconds after the timeout at which coroutines that block the event loop are abandoned."""


@functools.cache
def background_loop() -> asyncio.AbstractEventLoop:
    """The process's event loop for async sources; clients that a source keeps between batches stay bound to it.

    It runs in its own thread, so that sources also work where a loop is already running, as in a notebook.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward-sources", daemon=True).start()
    return loop


def _is_async(source: RewardSource) -> bool:
    return inspect.iscoroutinefunction(source) or inspect.iscoroutinefunction(getattr(source, "__call__", None))  # noqa: B004


def accepted_keywords(source: WeightedSource, request: RewardRequest) -> dict[str, Any]:
    """Keyword arguments that the source accepts: prompts, responses and columns; all of them if it has `**columns`."""
    available: dict[str, Any] = {"prompts": request.prompts, "responses": request.responses, **request.columns}
    try:
        parameters = inspect.signature(source.source).parameters.values()
    except (TypeError, ValueError):  # Some builtins have no signature: pass everything.
        return available
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in by_name:
        if parameter.name not in available and parameter.default is parameter.empty:
            raise TypeError(
                f"Reward source {source.name!r} wants {parameter.name!r}, which is no column of the dataset "
                f"(it is given {', '.join(available)}). Rename the argument, give it a default, or add the column."
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return available
    accepted = {parameter.name for parameter in by_name}
    return {name: value for name, value in available.items() if name in accepted}


def _source_error(name: str, request: RewardRequest, error: BaseException) -> RewardSourceError:
    failure = RewardSourceError(
        f"Reward source {name!r} raised {type(error).__name__} on {len(request.prompts)} samples: {error}. "
        "To skip single samples, return None for them; to retry, or to go on without the samples, set "
        "`TrainConfig.reward_failures`."
    )
    failure.__cause__ = error
    return failure
