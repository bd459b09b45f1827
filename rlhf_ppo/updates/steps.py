"""How gradients become a step: under our hand with Accelerate, or inside a DeepSpeed engine.

Accelerate's own `backward` would let the engine step before anybody could look at the minibatch. Here the engine waits
for `apply`, so that the ratio guard and the non-finite guard decide under ZeRO as they do elsewhere.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ppo.updates.optimizers import create_moments


@runtime_checkable
class OptimizerSteps(Protocol):
    """One optimizer step: micro-batches, each with a backward pass, then `apply` or `drop`."""

    norm_is_known: bool
    """Whether `clip` can say the gradient norm before `apply`."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Surrounds the passes of one micro-batch; gradients meet those of other processes at the last one."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""

    def clip(self, limit: float | None) -> float:
        """Scale gradients down to this norm; their norm before, nan where it is not known yet."""

    def apply(self) -> float:
        """Move the parameters, forget the gradients; their norm, infinite where the step was refused."""

    def drop(self) -> None:
        """Forget the gradients."""


class AccelerateSteps:
    """DDP, FSDP, or one process."""

    norm_is_known = True

    def __init__(self, policy: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> None:
        self.policy, self.optimizer, self.accelerator = policy, optimizer, accelerator
        self.parameters = list(policy.parameters())  # once: a walk through all modules costs as much as a small step
        self._on_cpu = accelerator.device.type == "cpu" and accelerator.distributed_type != DistributedType.FSDP
        self._norm = math.nan

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        if self._on_cpu and not self.optimizer.state:
            create_moments(self.optimizer)
        synchronize: AbstractContextManager[object] = nullcontext() if last else self.accelerator.no_sync(self.policy)
        return synchronize

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, limit: float | None) -> float:
        if limit is None and self.accelerator.distributed_type != DistributedType.FSDP:
            # What clips multiplies every gradient, by 1 here.
            self.accelerator.unscale_gradients()
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            norm: Tensor | None = torch.nn.utils.get_total_norm(gradients)
        else:
            norm = self.accelerator.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
        self._norm = math.nan if norm is None else float(norm)
        return self._norm

    def apply(self) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._norm

    def drop(self) -> None:
        self.optimizer.zero_grad()


class DeepSpeedSteps:
    """DeepSpeed ZeRO. The engine averages, clips and steps; it tells the norm afterwards."""

    norm_is_known = False

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip(self, limit: float | None) -> float:
        self.engine.optimizer.clip_grad = limit or 0.0
        return math.nan

    def apply(self) -> float:
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return math.inf if not self.engine.was_step_applied() else math.nan if norm is None else float(norm)

    def drop(self) -> None:
        # The way of an overflow is the only one through the engine that clears the buffers of every partition.
        optimizer = self.engine.optimizer

        def overflow(*_: object, **__: object) -> None:
            optimizer.overflow = True

        wanted = {"check_overflow": overflow, "check_grad_overflow": True}  # stages 1 and 2
        wanted |= {"_overflow_check_and_loss_scale_update": overflow}  # stage 3
        known = {name: getattr(optimizer, name) for name in wanted if hasattr(optimizer, name)}
        try:
            for name in known:
                setattr(optimizer, name, wanted[name])
            self.engine.step()
        finally:
            for name, value in known.items():
                setattr(optimizer, name, value)
        if self.engine.was_step_applied():
            raise RuntimeError(
                "expected DeepSpeed to drop a step, got one that was taken: the parameters have moved along a gradient "
                "that a guard had refused. Use a version of DeepSpeed that tests/distributed/test_zero.py passes with."
            )


def make_optimizer_steps(policy: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> OptimizerSteps:
    """What fits the processes."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedSteps(policy)
    return AccelerateSteps(policy, optimizer, accelerator)
