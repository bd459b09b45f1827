"""Text environments with Gymnasium's methods: gem's, and skyrl-gym's."""

from collections.abc import Callable
from typing import Any

from rlhf_ppo.environments.adapters.conversion import IsolatedRandomState, as_observation, finite_numbers
from rlhf_ppo.environments.base import EnvironmentFactory, Messages, Observation, Turn


def from_gem(make: Callable[[], Any], *, chat: bool = True) -> EnvironmentFactory:
    """Environments of gem, and others whose `reset(seed)` and `step(text)` return Gymnasium's tuples.

        environment = from_gem(lambda: gem.make("game:GuessTheNumber-v0-easy"))

    Leave out wrappers that repeat earlier turns in each observation: the policy reads them anyway.

    Args:
        make: Makes the environment of an episode.
        chat: Whether an observation is the message of a user, rendered by the chat template; otherwise it is appended
            as it is.
    """

    class GemEnvironment:
        def reset(self, seed: int) -> Observation:
            self.numbers = IsolatedRandomState(seed)
            with self.numbers.active():
                self.env = make()
                text, _ = self.env.reset(seed=seed)
            return as_observation(text, chat=chat)

        def step(self, reply: str) -> Turn:
            with self.numbers.active():
                text, reward, terminated, truncated, info = self.env.step(reply)
            observation = as_observation(text, chat=chat)
            return Turn(observation, float(reward), bool(terminated), bool(truncated), finite_numbers(info))

        def close(self) -> None:
            if hasattr(self.env, "close"):
                self.env.close()

    return GemEnvironment


def from_skyrl_gym(make: Callable[..., Any]) -> EnvironmentFactory:
    """Environments of skyrl-gym: `init(prompt)`, and `step(text)` that returns a dictionary with messages.

        environment = from_skyrl_gym(
            lambda reward_spec, **_: skyrl_gym.make("gsm8k", extras={"reward_spec": reward_spec})
        )

    Args:
        make: Makes the environment of an episode from the columns of its prompt's row. The column `prompt` is the
            conversation, or its first user message.
    """

    class SkyRLEnvironment:
        def reset(self, prompt: str | Messages, **columns: Any) -> Observation:
            self.env = make(prompt=prompt, **columns)
            messages, _ = self.env.init([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
            return list(messages)

        def step(self, reply: str) -> Turn:
            output = self.env.step(reply)
            if output.get("postprocessed_action") not in (None, reply):
                raise ValueError(
                    "an environment of skyrl-gym must leave the reply as it is, got a postprocessed_action: the policy "
                    "would be trained on tokens that it did not sample. Let SamplingConfig's stop strings end replies "
                    "where it cuts them."
                )
            observation, info = list(output["observations"]), finite_numbers(output.get("metadata"))
            return Turn(observation, float(output["reward"]), terminated=bool(output["done"]), info=info)

        def close(self) -> None:
            self.env.close()

    return SkyRLEnvironment
