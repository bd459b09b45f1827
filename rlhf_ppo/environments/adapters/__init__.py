"""Environments written for other libraries, as `Environment`: duck-typed, none of those libraries is imported."""

from rlhf_ppo.environments.adapters.gym_text import from_gem, from_skyrl_gym
from rlhf_ppo.environments.adapters.openenv import from_openenv
from rlhf_ppo.environments.adapters.openrlhf import from_openrlhf
from rlhf_ppo.environments.adapters.reasoning_gym import from_reasoning_gym
from rlhf_ppo.environments.adapters.textarena import from_textarena
from rlhf_ppo.environments.adapters.tool_calls import ToolCall
from rlhf_ppo.environments.adapters.tools import from_tools, from_trl

__all__ = [
    "ToolCall",
    "from_gem",
    "from_openenv",
    "from_openrlhf",
    "from_reasoning_gym",
    "from_skyrl_gym",
    "from_textarena",
    "from_tools",
    "from_trl",
]
