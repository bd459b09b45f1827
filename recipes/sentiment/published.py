"""What the recipe's `--preset` names: the numbers of a published run in place of those that suit the model."""

from __future__ import annotations

from typing import Any

from rlhf_ppo import PPOConfig
from rlhf_ppo.presets import PresetName as PresetName
from rlhf_ppo.presets import published_run as published_run

_RENAMED = {
    "batch_size": "batch_size", "mini_batch_size": "mini_batch_size", "ppo_epochs": "ppo_epochs",
    "learning_rate": "learning_rate", "vf_coef": "vf_coef", "init_kl_coef": "kl_coef", "target": "kl_target",
    "horizon": "kl_horizon",
}  # fmt: skip
"""Settings of `PPOConfig` that the recipe has flags for, under the flags' names."""


def flags(name: PresetName | None) -> dict[str, Any]:
    """Those of the recipe's own settings that the preset sets."""
    settings = {} if name is None else published_run(name).settings
    return {_RENAMED[key]: value for key, value in settings.items() if key in _RENAMED}


def further(name: PresetName | None) -> dict[str, Any]:
    """Those of `PPOConfig`'s other settings that the preset sets; how long a run is stays the recipe's."""
    settings = {} if name is None else published_run(name).settings
    return {key: value for key, value in settings.items() if key not in _RENAMED and key != "steps"}


def adam_settings(name: PresetName | None) -> dict[str, Any]:
    """For `rlhf_ppo.updates.optimizers.adam`."""
    config = PPOConfig(**further(name))
    return {"eps": config.adam_eps, "tensorflow": config.optimizer == "adam_tensorflow"}
