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


class EvalMode:
    """Context manager: while active, every module is in eval mode (no dropout); restores each module's mode."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._training: list[nn.Module] = []

    def __enter__(self) -> None:
        self._training = [module for module in self._model.modules() if module.training]
        for module in self._training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True
