"""Train, evaluate and serve reward models from preference data, and use them in PPO."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import rlhf_ppo.utils.openmp  # noqa: F401  # isort: skip  it must come before torch
from rlhf_ppo.utils.moved_names import forward_old_names

if TYPE_CHECKING:
    from reward_model.data.comparisons import BadRow, Comparison
    from reward_model.data.pairs import excerpt, pairs_from_labels
    from reward_model.models.contract import Contract, ContractError, Normalization, TextRule
    from reward_model.models.model import RewardModel
    from reward_model.models.on_policy import reward_on_policy
    from reward_model.training.config import RewardModelConfig
    from reward_model.training.trainer import RewardModelResult, train_reward_model

__all__ = [
    "BadRow", "Comparison", "Contract", "ContractError", "Normalization", "RewardModel", "RewardModelConfig",
    "TextRule", "RewardModelResult", "excerpt", "pairs_from_labels", "reward_on_policy", "train_reward_model",
]  # fmt: skip

_MODULES = {
    "data.comparisons": ("BadRow", "Comparison"),
    "data.pairs": ("excerpt", "pairs_from_labels"),
    "models.contract": ("Contract", "ContractError", "Normalization", "TextRule"),
    "models.model": ("RewardModel",),
    "models.on_policy": ("reward_on_policy",),
    "training.config": ("RewardModelConfig",),
    "training.trainer": ("RewardModelResult", "train_reward_model"),
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: the help of the commands does not."""
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


forward_old_names(__name__)
