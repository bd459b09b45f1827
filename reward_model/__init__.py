"""Train, evaluate and serve reward models from preference data, and use them in PPO."""

import rlhf_ppo.utils.openmp  # noqa: F401  # isort: skip  it must come before torch
from reward_model.data.comparisons import BadRow, Comparison
from reward_model.data.pairs import excerpt, pairs_from_labels
from reward_model.models.contract import Contract, ContractError, Normalization, TextRule
from reward_model.models.model import RewardModel
from reward_model.models.on_policy import reward_on_policy
from reward_model.training.config import RewardModelConfig
from reward_model.training.trainer import RewardModelResult, train_reward_model
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
