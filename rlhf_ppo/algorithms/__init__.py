"""Algorithms: one frozen config per algorithm, and `build_algorithm`, which builds one from its config."""

from rlhf_ppo.algorithms.build import Algorithm, build_algorithm
from rlhf_ppo.algorithms.config import (
    GAE,
    GRPO,
    RLOO,
    TRPO,
    AlgorithmConfig,
    BatchMean,
    Critic,
    DivergenceMask,
    LearnedValue,
    MovingMean,
    PPOClip,
    PPOPenalty,
    Reinforce,
    ReinforcePlusPlus,
)

__all__ = [
    "GAE", "GRPO", "RLOO", "TRPO", "Algorithm", "AlgorithmConfig", "BatchMean", "Critic", "DivergenceMask",
    "LearnedValue", "MovingMean", "PPOClip", "PPOPenalty", "Reinforce", "ReinforcePlusPlus", "build_algorithm",
]  # fmt: skip
