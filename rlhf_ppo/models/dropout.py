"""Disable dropout: PPO's first pass over a batch must have probability ratio 1 exactly."""

import inspect
from itertools import chain

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def disable_dropout(model: nn.Module) -> None:
    """Set every probability of dropout and layer dropout of `model` to 0, in modules and in float attributes.

    A config keeps its probabilities, because it is saved with the model: a module that reads them from there runs in
    eval mode.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if _reads_dropout_from_config(module):
            _run_in_eval_mode(module)


def _reads_dropout_from_config(module: nn.Module) -> bool:
    config = vars(module).get("config", module)
    values = getattr(config, "__dict__", {})  # a module may call something else its config (Idefics)
    names = {name for name, value in values.items() if "drop" in name and isinstance(value, float) and value > 0}
    methods = chain.from_iterable(vars(kind).items() for kind in type(module).__mro__)
    codes = [inspect.unwrap(f).__code__ for name, f in methods if inspect.isfunction(f) and name != "__init__"]
    return any((names - vars(module).keys()).intersection(code.co_names) for code in codes)


def _run_in_eval_mode(module: nn.Module) -> None:
    """Switch the module's own flag in each pass, not that of its children; a recomputed pass runs the hooks, too."""
    training: list[bool] = []

    def enter(module: nn.Module, inputs: object) -> None:
        training.append(module.training)
        module.training = False

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        module.training = training.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


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
