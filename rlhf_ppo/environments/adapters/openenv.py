"""Clients of OpenEnv servers."""

from collections.abc import Callable
from typing import Any

from rlhf_ppo.environments.adapters.conversion import as_observation
from rlhf_ppo.environments.base import EnvironmentFactory, Observation, Turn, accepted_columns
from rlhf_ppo.environments.concurrency import resolve_awaitable


def from_openenv(
    connect: Callable[[], Any], *, action: Callable[[str], Any], text: Callable[[Any], str] = str, chat: bool = True
) -> EnvironmentFactory:
    """A client of OpenEnv, whose `reset` and `step` return `.observation`, `.reward` and `.done`; it may be async.

        environment = from_openenv(
            lambda: EchoEnv(base_url="..."), action=lambda reply: EchoAction(message=reply),
            text=lambda observation: observation.echoed_message,
        )

    Args:
        connect: Makes the client of an episode.
        action: Turns a reply into an action.
        text: Turns an observation into text.
        chat: Whether an observation is the message of a user, rendered by the chat template; otherwise it is appended
            as it is.
    """

    class OpenEnvEnvironment:
        def reset(self, **columns: Any) -> Observation:
            self.client = connect()
            result = resolve_awaitable(self.client.reset(**accepted_columns(self.client.reset, columns)))
            return as_observation(text(result.observation), chat=chat)

        def step(self, reply: str) -> Turn:
            result = resolve_awaitable(self.client.step(action(reply)))
            observation = as_observation(text(result.observation), chat=chat)
            return Turn(observation, float(result.reward or 0.0), terminated=bool(result.done))

        def close(self) -> None:
            resolve_awaitable(self.client.close())

    return OpenEnvEnvironment
