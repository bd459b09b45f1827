"""What is optimised: one frozen config each, one place that chooses."""

from rlhf_ppo.algorithms.build import Algorithm, build_algorithm
from rlhf_ppo.algorithms.config import GAE, GRPO, RLOO, TRPO, AlgorithmConfig, Critic, PPOClip, PPOPenalty, Reinforce

__all__ = [
    "GAE", "GRPO", "RLOO", "TRPO", "Algorithm", "AlgorithmConfig", "Critic", "PPOClip", "PPOPenalty", "Reinforce",
    "build_algorithm",
]  # fmt: skip
