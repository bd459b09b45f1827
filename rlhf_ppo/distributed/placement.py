"""Frozen models between the phases that read them: whole where they compute, in parts, or waiting in main memory."""

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
    """Weights that wait in main memory and compute on a device.

    They are frozen, so leaving the device is no copy: what waited is simply taken up again.

    Args:
        module: Moved to main memory now.
        device: Where it computes.
        others: Tensors that somebody else needs where they are (layers shared with the policy): they stay.
    """

    def __init__(self, module: nn.Module, device: torch.device, others: Iterable[Tensor] = ()) -> None:
        elsewhere = {id(tensor) for tensor in others}
        tensors = (*module.parameters(), *module.buffers())
        self.device = device
        self.tensors = [tensor for tensor in tensors if id(tensor) not in elsewhere]
        self.waiting = [tensor.data.to("cpu") for tensor in self.tensors]
        self._leave()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Inside, the weights are on the device."""
        self.go_home()
        try:
            yield
        finally:
            self._leave()

    def go_home(self) -> None:
        """To the device."""
        for tensor, weights in zip(self.tensors, self.waiting, strict=True):
            tensor.data = to_device(weights, self.device)

    def _leave(self) -> None:
        for tensor, weights in zip(self.tensors, self.waiting, strict=True):
            tensor.data = weights


def to_device(weights: Tensor, device: torch.device) -> Tensor:
    """Weights on a device."""
    return weights.to(device)


@dataclass(frozen=True)
class Reference:
    """The frozen reference, prepared."""

    module: nn.Module
    """Scores batches inside `at_hand`."""
    at_hand: Callable[[], AbstractContextManager[object]] = nullcontext
    in_parts: bool = False
    """Whether processes share its parameters out."""


def place_reference(
    module: nn.Module, accelerator: Accelerator, placement: ReferencePlacement, *, policy: Iterable[Tensor]
) -> Reference:
    """The reference where `PPOConfig.reference_placement` wants it.

    Args:
        module: A frozen `TokenPolicy`.
        accelerator: Whose processes share it out.
        placement: As configured.
        policy: Parameters of the policy.

    Raises:
        ValueError: Nobody shares out parameters here, or the reference shares some with a policy in parts.
    """
    engine, device = accelerator.state.deepspeed_plugin, accelerator.device
    has_fsdp = accelerator.distributed_type == DistributedType.FSDP
    sharded = has_fsdp or (engine is not None and engine.zero_stage == 3)
    shared = {id(tensor) for tensor in policy} & {id(tensor) for tensor in module.parameters()}
    if sharded and shared:
        raise ValueError(
            "num_shared_layers needs whole parameters, got a policy in parts (ZeRO-3 or FSDP): the reference would "
            "lose the layers that both share. Leave num_shared_layers at None."
        )
    if placement == "sharded" and not sharded:
        raise ValueError(
            "reference_placement='sharded' needs ZeRO-3 or FSDP, which hold the policy in parts: nobody else shares "
            "the reference out. Launch with recipes/launch/zero3.yaml or fsdp2.yaml, or use 'offloaded'."
        )
    if sharded and placement in ("auto", "sharded"):
        parted = _in_fsdp_parts(module, accelerator) if has_fsdp else _in_zero_parts(module, accelerator)
        return Reference(parted, in_parts=True)
    if engine is None and not has_fsdp:
        module = accelerator.prepare_model(module, evaluation_mode=True)
    elif accelerator.mixed_precision in _HALF:  # as the engine does with the policy: parameters, not buffers
        for parameter in module.parameters():
            parameter.data = parameter.data.to(_HALF[accelerator.mixed_precision])
    if placement == "offloaded":
        return Reference(module, OffloadedWeights(module, device, others=policy).at_hand)
    return Reference(module.to(device).eval())


_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _in_fsdp_parts(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    with fsdp_sharding(accelerator):
        parted: nn.Module = fsdp2_prepare_model(accelerator, module).eval()
    set_fsdp_root(parted, accelerator)
    return parted


def _in_zero_parts(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    parted: nn.Module = prepare_deepspeed(module, accelerator)
    keep_head_gathered(module)
    return parted
