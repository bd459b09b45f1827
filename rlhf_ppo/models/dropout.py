"""Dropout, which PPO does without: the first pass of an update has probability ratio 1 exactly."""

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of `model` to 0, modules and plain attributes alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
