"""Algorithms: one frozen config per algorithm, and `build_algorithm`, which builds one from its config."""

from rlhf_ppo.algorithms.build import Algorithm, build_algorithm
from rlhf_ppo.algorithms.config import (
    GAE,
    GRPO,
    GSPO,
    RLOO,
    TRPO,
    AlgorithmConfig,
    BatchMean,
    Critic,
    LearnedValue,
    MovingMean,
    PPOClip,
    PPOPenalty,
    Reinforce,
    ReinforcePlusPlus,
)
from rlhf_ppo.algorithms.surrogate_config import (
    CISPO,
    AdaptiveEntropy,
    ClipCovariance,
    DivergenceMask,
    PositiveNLL,
    TopEntropyTokens,
)

__all__ = [
    "CISPO", "GAE", "GRPO", "GSPO", "RLOO", "TRPO", "AdaptiveEntropy", "Algorithm", "AlgorithmConfig", "BatchMean",
    "ClipCovariance", "Critic", "DivergenceMask", "LearnedValue", "MovingMean", "PPOClip", "PPOPenalty", "PositiveNLL",
    "Reinforce", "ReinforcePlusPlus", "TopEntropyTokens", "build_algorithm",
]  # fmt: skip
