"""Play the replies of finished episodes again, in new environments."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_ppo.environments.base import EnvironmentFactory, Turn
from rlhf_ppo.environments.concurrency import run_concurrently
from rlhf_ppo.environments.live import ReplayableEnvironment


def replay(
    factory: EnvironmentFactory,
    tasks: Sequence[Mapping[str, Any]],
    replies: Sequence[Sequence[str]],
    *,
    workers: int = 32,
    timeout: float | None = 120.0,
) -> list[list[Turn] | None]:
    """The turns of each episode, as far as it goes; None where the environment failed.

    Args:
        tasks: Arguments of `reset`.
        replies: Replies of each episode.
        timeout: Seconds per episode; None: no limit.
    """
    calls = [partial(_play, factory, task, texts) for task, texts in zip(tasks, replies, strict=True)]
    results = run_concurrently(calls, workers=workers, timeout=timeout)
    return [None if isinstance(result, BaseException) else result for result in results]


def _play(factory: EnvironmentFactory, task: Mapping[str, Any], replies: Sequence[str]) -> list[Turn]:
    environment = ReplayableEnvironment(factory, task)
    environment.start()
    turns: list[Turn] = []
    for reply in replies:
        turns.append(environment.step(reply))
        if turns[-1].terminated or turns[-1].truncated:
            break
    environment.close()
    return turns
