"""Reward models from preference data: train, evaluate, normalize, serve, and use in PPO."""

import rlhf_ppo.utils.openmp  # noqa: F401  # isort: skip  it must come before torch
from reward_model.config import RewardModelConfig
from reward_model.contract import Contract, ContractError, Normalization, TextRule
from reward_model.data import BadRow, Comparison
from reward_model.model import RewardModel
from reward_model.on_policy import reward_on_policy
from reward_model.pairs import excerpt, pairs_from_labels
from reward_model.trainer import RewardModelResult, train_reward_model
from rlhf_ppo.utils.moved_names import forward_old_names

__all__ = [
    "BadRow",
    "Comparison",
    "Contract",
    "ContractError",
    "Normalization",
    "RewardModel",
    "RewardModelConfig",
    "TextRule",
    "RewardModelResult",
    "excerpt",
    "pairs_from_labels",
    "reward_on_policy",
    "train_reward_model",
]

forward_old_names(__name__)
