"""Offload the models of reward sources to the CPU between scoring phases."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.distributed.placement import OffloadedWeights
from rlhf_ppo.rewards.sources import RewardSources, named_sources


@contextmanager
def offload_sources(
    sources: RewardSources, excluded: Iterable[Tensor] = ()
) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Context manager: while active, models of reward sources are on the CPU; yields the context that loads them.

    A source's models are the source itself if it is an `nn.Module`; else the modules among its attributes, and among
    theirs and the items of lists and dictionaries, such as the members of an ensemble.

    Args:
        sources: The reward sources.
        excluded: Tensors to leave in place, such as the policy's.
    """
    models = {id(model): model for item in named_sources(sources) for model in _models(item.source, levels=3)}
    devices = {key: device for key, model in models.items() if (device := _device(model)) is not None}
    if not devices:
        warnings.warn(
            "offload_rewards=True, but no reward source has a model as an attribute (or one level below): nothing is "
            "moved. Keep the model in an attribute of the source, or set offload_rewards=False.",
            stacklevel=2,
        )
    left, offloaded = list(excluded), []
    for key, device in devices.items():
        offloaded.append(OffloadedWeights(models[key], device, excluded=left))
        left += offloaded[-1].tensors  # a part of this model may be an attribute, too

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


def _models(value: Any, *, levels: int) -> list[nn.Module]:
    """The modules in `value`: itself, or what its items and attributes hold, down to `levels`."""
    if isinstance(value, nn.Module):
        return [value]
    if not levels:
        return []
    mapping = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    parts = value if isinstance(value, list | tuple) else mapping.values()
    return [model for part in parts for model in _models(part, levels=levels - 1)]
