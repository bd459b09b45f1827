"""Models of reward sources that wait on the CPU between the phases that score."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rlhf_ppo.distributed.placement import OffloadedWeights
from rlhf_ppo.rewards.sources import RewardSources, named_sources


@contextmanager
def offload_sources(sources: RewardSources) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Inside, the models of reward sources wait in main memory; what is yielded brings them to their devices.

    A source's models are itself or its attributes, where these are modules.
    """
    models = [model for item in named_sources(sources) for model in _models(item.source) if _device(model) is not None]
    waiting = [OffloadedWeights(model, _device(model) or torch.device("cpu")) for model in models]

    @contextmanager
    def on_device() -> Iterator[None]:
        with ExitStack() as stack:
            for model in waiting:
                stack.enter_context(model.on_device())
            yield

    try:
        yield on_device
    finally:
        for model in waiting:
            model.load()


def _device(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def _models(source: Any) -> list[nn.Module]:
    if isinstance(source, nn.Module):
        return [source]
    return [value for value in getattr(source, "__dict__", {}).values() if isinstance(value, nn.Module)]
