"""Build the optimizer that the configuration names, and check the one that is given beside a critic's settings."""

import importlib.util
import inspect
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from rlhf_ppo.algorithms import Critic
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.models.critic import freeze_critic
from rlhf_ppo.updates.optimizers import adam


def default_optimizer(model: torch.nn.Module, config: PPOConfig, critic_rate: float | None = None) -> Optimizer:
    """Build the optimizer that `config.optimizer` names over the trainable parameters; fused if their dtypes allow it.

    With `critic_rate` the critic's parameters are a second group, with that rate.

    Raises:
        ValueError: `adamw_8bit` without a CUDA device or without bitsandbytes.
    """
    groups: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = config.fused_adam and all(parameter.is_floating_point() for parameter in groups)
    if critic_rate is not None:
        ids = {id(parameter) for parameter in _critic_of(model).parameters()}
        groups = [
            {"params": [parameter for parameter in groups if id(parameter) not in ids]},
            {"params": [parameter for parameter in groups if id(parameter) in ids], "lr": critic_rate},
        ]
    rate, eps = config.learning_rate, config.adam_eps
    match config.optimizer:
        case "adamw_8bit":
            return _adamw_8bit(groups, rate, eps)
        case "adamw":
            return AdamW(groups, lr=rate, eps=eps, fused=fused or None)
        case _:
            return adam(groups, lr=rate, eps=eps, tensorflow=config.optimizer == "adam_tensorflow", fused=fused)


def _critic_of(model: Any) -> torch.nn.Module:
    critic: torch.nn.Module = model.v_head if model.critic is None else model.critic
    return critic


def make_optimizer(
    model: PreTrainedModelWrapper, config: PPOConfig, given: Optimizer | None, critic: Critic | None
) -> Optimizer:
    """The given optimizer, or the default one; freezes what `critic.freeze` names first.

    Raises:
        ValueError: The critic has settings that would be ignored, or the optimizer needs a closure.
    """
    closure = None if given is None else inspect.signature(type(given).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"expected an optimizer that steps on gradients, got {type(given).__name__}, whose step() computes the "
            "loss again through a closure: a PPO minibatch has none. Use torch.optim.AdamW or the like."
        )
    if critic is not None and critic.freeze != "nothing":
        freeze_critic(model, critic.freeze)
    rate = None if critic is None else critic.learning_rate
    if given is None:
        return default_optimizer(model, config, rate)
    ids = {id(parameter) for parameter in _critic_of(model).parameters()}
    for group in given.param_groups if rate is not None else ():
        inside = [id(parameter) in ids for parameter in group["params"]]
        if any(inside) and not (all(inside) and group.get("initial_lr", group["lr"]) == rate):
            raise ValueError(
                f"expected no optimizer beside Critic(learning_rate={rate}), got one without a group of the critic's "
                "parameters with that rate: the rate would be ignored. Add such a group, or leave the optimizer out."
            )
    return given


def _adamw_8bit(parameters: list[Any], learning_rate: float, eps: float) -> Optimizer:
    """AdamW with 8-bit moments: one byte per entry instead of four (Dettmers et al. 2022)."""
    missing = "a CUDA device" if not torch.cuda.is_available() else None
    if missing is None and importlib.util.find_spec("bitsandbytes") is None:
        missing = "the package bitsandbytes (pip install bitsandbytes)"
    if missing is not None:
        raise ValueError(
            f"optimizer='adamw_8bit' needs {missing}, which was not found: moments cannot be kept in 8 bits. Use "
            "optimizer='adamw'; to save memory on a CPU, set gradient_checkpointing=True or train LoRA adapters."
        )
    optim = importlib.import_module("bitsandbytes.optim")
    optimizer: Optimizer = optim.AdamW8bit(parameters, lr=learning_rate, eps=eps)
    return optimizer
