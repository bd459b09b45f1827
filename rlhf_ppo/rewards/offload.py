"""Offload the models of reward sources to the CPU between scoring phases."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rlhf_ppo.distributed.placement import OffloadedWeights
from rlhf_ppo.rewards.sources import RewardSources, named_sources


@contextmanager
def offload_sources(sources: RewardSources) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Context manager: while active, models of reward sources are on the CPU; yields the context that loads them.

    A source's models are the source itself or its attributes that are `nn.Module`s.
    """
    models = [model for item in named_sources(sources) for model in _models(item.source) if _device(model) is not None]
    offloaded = [OffloadedWeights(model, _device(model) or torch.device("cpu")) for model in models]

    @contextmanager
    def on_device() -> Iterator[None]:
        with ExitStack() as stack:
            for model in offloaded:
                stack.enter_context(model.on_device())
            yield

    try:
        yield on_device
    finally:
        for model in offloaded:
            model.load()


def _device(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def _models(source: Any) -> list[nn.Module]:
    if isinstance(source, nn.Module):
        return [source]
    return [value for value in getattr(source, "__dict__", {}).values() if isinstance(value, nn.Module)]
