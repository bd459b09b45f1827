"""Placement of frozen models: full on the device, sharded, or offloaded to the CPU between uses."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor, nn
from trl.models.utils import prepare_deepspeed

from rlhf_ppo.distributed.deepspeed import keep_head_gathered
from rlhf_ppo.distributed.fsdp import fsdp_sharding, set_fsdp_root

ReferencePlacement: TypeAlias = Literal["auto", "whole", "sharded", "offloaded"]


class OffloadedWeights:
    """Frozen weights kept on the CPU and copied to a device while needed.

    Offloading copies nothing: the CPU tensors are still there and become the module's data again.

    Args:
        module: Moved to the CPU at once.
        device: Where it computes.
        excluded: Tensors to leave in place, such as layers shared with the policy.
    """

    def __init__(self, module: nn.Module, device: torch.device, excluded: Iterable[Tensor] = ()) -> None:
        excluded_ids = {id(tensor) for tensor in excluded}
        tensors = (*module.parameters(), *module.buffers())
        self.device = device
        self.tensors = [tensor for tensor in tensors if id(tensor) not in excluded_ids]
        # Pinned, so that a copy to a GPU does not hold up the host.
        pinned = device.type == "cuda"
        on_cpu = (tensor.data.to("cpu") for tensor in self.tensors)
        self.cpu_weights = [weights.pin_memory() if pinned else weights for weights in on_cpu]
        self._offload()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Context manager: while active, the weights are on the device."""
        self.load()
        try:
            yield
        finally:
            self._offload()

    def load(self) -> None:
        """Copy the weights to the device."""
        for tensor, weights in zip(self.tensors, self.cpu_weights, strict=True):
            tensor.data = to_device(weights, self.device)

    def _offload(self) -> None:
        for tensor, weights in zip(self.tensors, self.cpu_weights, strict=True):
            tensor.data = weights


def to_device(weights: Tensor, device: torch.device) -> Tensor:
    """Copy weights to a device; from pinned memory without waiting for the copy."""
    return weights.to(device, non_blocking=True)


@dataclass(frozen=True)
class ReferenceModel:
    """The frozen reference model, prepared, and the context in which it can score."""

    module: nn.Module
    """Scores batches while `context` is active."""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    sharded: bool = False
    """Whether its parameters are sharded over processes."""


def place_reference(
    module: nn.Module, accelerator: Accelerator, placement: ReferencePlacement, *, policy: Iterable[Tensor]
) -> ReferenceModel:
    """Prepare the reference model as `PPOConfig.reference_placement` asks.

    Args:
        module: A frozen `TokenPolicy`.
        accelerator: The run's `Accelerator`.
        placement: `PPOConfig.reference_placement`.
        policy: Parameters of the policy.

    Raises:
        ValueError: "sharded" without ZeRO-3 or FSDP, or layers shared with a sharded policy.
    """
    engine, device = accelerator.state.deepspeed_plugin, accelerator.device
    has_fsdp = accelerator.distributed_type == DistributedType.FSDP
    sharded = has_fsdp or (engine is not None and engine.zero_stage == 3)
    shared_ids = {id(tensor) for tensor in policy} & {id(tensor) for tensor in module.parameters()}
    if sharded and shared_ids:
        raise ValueError(
            "num_shared_layers needs full parameters, got a sharded policy (ZeRO-3 or FSDP): the reference would lose "
            "the layers that both share. Leave num_shared_layers at None."
        )
    if placement == "sharded" and not sharded:
        raise ValueError(
            "reference_placement='sharded' needs ZeRO-3 or FSDP, got neither: nothing else shards the reference. "
            "Launch with recipes/launch/zero3.yaml or fsdp2.yaml, or use 'offloaded'."
        )
    if sharded and placement in ("auto", "sharded"):
        prepared = _shard_with_fsdp(module, accelerator) if has_fsdp else _shard_with_zero(module, accelerator)
        return ReferenceModel(prepared, sharded=True)
    if engine is None and not has_fsdp:
        module = accelerator.prepare_model(module, evaluation_mode=True)
    elif accelerator.mixed_precision in _HALF_DTYPES:  # as the engine casts the policy: parameters, not buffers
        for parameter in module.parameters():
            parameter.data = parameter.data.to(_HALF_DTYPES[accelerator.mixed_precision])
    if placement == "offloaded":
        return ReferenceModel(module, OffloadedWeights(module, device, excluded=policy).on_device)
    return ReferenceModel(module.to(device).eval())


_HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _shard_with_fsdp(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    with fsdp_sharding(accelerator):
        prepared: nn.Module = fsdp2_prepare_model(accelerator, module).eval()
    set_fsdp_root(prepared, accelerator)
    return prepared


def _shard_with_zero(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    prepared: nn.Module = prepare_deepspeed(module, accelerator)
    keep_head_gathered(module)
    return prepared
