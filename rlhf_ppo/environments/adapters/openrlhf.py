"""Agents of OpenRLHF: `AgentInstance`."""

from collections.abc import Callable
from typing import Any

from rlhf_ppo.environments.adapters.conversion import finite_numbers
from rlhf_ppo.environments.base import EnvironmentFactory, Turn
from rlhf_ppo.environments.concurrency import resolve_awaitable


def from_openrlhf(agent_instance: Callable[[], Any]) -> EnvironmentFactory:
    """An `AgentInstance` of OpenRLHF: each turn keeps its own reward, where OpenRLHF adds them up.

        environment = from_openrlhf(AgentInstance)   # columns of the prompts: prompt (text), label

    Its feedback is appended as it is, as there: marks of the chat template are the agent's affair.

    Args:
        agent_instance: The class.
    """

    class OpenRLHFEnvironment:
        def reset(self, prompt: str, label: Any = None) -> str:
            self.agent, self.label = agent_instance(), label
            states = resolve_awaitable(self.agent.reset({"observation": prompt, "label": label}))
            self.text = str(states["observation"])
            return self.text

        def step(self, reply: str) -> Turn:
            states = {"observation_text": self.text, "action_text": reply, "label": self.label, "sampling_params": None}
            result = resolve_awaitable(self.agent.step(states))
            if result.get("sampling_params") is not None:
                raise ValueError(
                    "an AgentInstance must leave sampling_params as they are (None), got others: replies would be "
                    "scored under another temperature than they were sampled with. Set them in SamplingConfig."
                )
            feedback = result["environment_feedback"] if "environment_feedback" in result else result["feedback"]
            self.text += reply + feedback
            info = finite_numbers({name: _number(value) for name, value in result.get("extra_logs", {}).items()})
            return Turn(feedback, float(_number(result["rewards"])), terminated=bool(result["done"]), info=info)

    return OpenRLHFEnvironment


def _number(value: Any) -> Any:
    """The number in a tensor; anything else unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "numel", lambda: 1)() == 1 else value
