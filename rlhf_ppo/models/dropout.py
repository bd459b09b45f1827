"""Disable dropout: PPO's first pass over a batch must have probability ratio 1 exactly."""

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of `model` to 0, in modules and in float attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
