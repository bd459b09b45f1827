"""What the recipe's `--algorithm` names, and what each needs changed in the settings that suit the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from rlhf_ppo import GRPO, RLOO, TRPO, AlgorithmConfig, PPOClip, PPOPenalty, Reinforce
from rlhf_ppo.algorithms import Critic

AlgorithmName: TypeAlias = Literal["ppo-clip", "ppo-penalty", "trpo", "reinforce", "rloo", "grpo"]
NAMES: tuple[AlgorithmName, ...] = get_args(AlgorithmName)


@dataclass(frozen=True)
class Choice:
    """An algorithm as the recipe runs it."""

    config: Callable[[float], AlgorithmConfig]
    """From the weight of the value loss."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from those of PPO-Clip, which the model's settings were found with."""
    in_float32: bool = False
    """Whether its arithmetic bears no bfloat16."""


CHOICES: dict[AlgorithmName, Choice] = {
    "ppo-clip": Choice(lambda vf_coef: PPOClip(critic=Critic(vf_coef=vf_coef))),
    "ppo-penalty": Choice(lambda vf_coef: PPOPenalty(critic=Critic(vf_coef=vf_coef))),
    "trpo": Choice(lambda _: TRPO(max_kl=0.02, curvature_fraction=0.125), in_float32=True),
    "reinforce": Choice(lambda _: Reinforce()),
    "rloo": Choice(lambda _: RLOO(), {"group_size": 4}),
    "grpo": Choice(lambda _: GRPO(), {"group_size": 4}),
}
