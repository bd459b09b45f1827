"""Optimizer steps with backward, clipping, and a late decision to apply or drop: for Accelerate, and for DeepSpeed.

With Accelerate's `backward` a DeepSpeed engine would step before the minibatch could be checked. Here the engine waits
for `apply`, so that the ratio guard and the non-finite guard also work under ZeRO.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer


@runtime_checkable
class OptimizerSteps(Protocol):
    """One optimizer step: micro-batches, each with a backward pass, then `apply` or `drop`."""

    norm_is_known: bool
    """Whether `clip` returns the gradient norm; otherwise only `apply` does."""

    def begin(self) -> None:
        """Drop what a loss outside of the update, or an interrupted update, has left in the gradients."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Context manager for the passes of one micro-batch; the last one synchronizes gradients over processes."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss."""

    def clip(self, limit: float | None) -> Tensor | float:
        """Clip gradients to this norm; return their norm before clipping, nan if it is not known yet."""

    def apply(self) -> float:
        """Step the optimizer and zero the gradients; return their norm where `clip` could not, infinite if skipped."""

    def drop(self) -> None:
        """Zero the gradients without a step."""

    def can_overflow(self) -> bool:
        """Whether a gradient that is not finite may come from the loss scale of float16, which `drop` then lowers."""


def drop_unfinished_step(optimizer: Optimizer, accelerator: Accelerator) -> None:
    """Drop what a loss outside of the update, or an interrupted update, has left: gradients, and their unscaling."""
    optimizer.zero_grad()
    if accelerator.scaler is not None:  # it refuses to unscale twice; `update` would count the step and move the scale
        accelerator.scaler._per_optimizer_states.clear()


class AccelerateSteps:
    """Optimizer steps under DDP, FSDP, or on one process."""

    norm_is_known = True

    def __init__(self, policy: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> None:
        self.policy, self.optimizer, self.accelerator = policy, optimizer, accelerator
        self.parameters = list(policy.parameters())  # once: a walk through all modules costs as much as a small step

    def begin(self) -> None:
        drop_unfinished_step(self.optimizer, self.accelerator)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        synchronize: AbstractContextManager[object] = nullcontext() if last else self.accelerator.no_sync(self.policy)
        return synchronize

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, limit: float | None) -> Tensor | float:
        if limit is None and self.accelerator.distributed_type != DistributedType.FSDP:
            # clip_grad_norm_ would multiply every gradient, by 1 here.
            self.accelerator.unscale_gradients()
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            norm: Tensor | None = torch.nn.utils.get_total_norm(gradients)
        else:
            norm = self.accelerator.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
        return math.nan if norm is None else norm

    def apply(self) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return math.nan

    def drop(self) -> None:
        self.optimizer.zero_grad()
        if self.accelerator.scaler is not None:  # otherwise it refuses to unscale the next gradients
            self.accelerator.scaler.update()

    def can_overflow(self) -> bool:
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1.0


class DeepSpeedSteps:
    """Optimizer steps under DeepSpeed ZeRO. The engine averages, clips and steps; the norm is known afterwards."""

    norm_is_known = False

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def begin(self) -> None:
        """Nothing: the engine owns the gradients, and other losses do not reach them."""

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

    def can_overflow(self) -> bool:
        return False  # the engine skips such steps itself

    def drop(self) -> None:
        # Pretend an overflow: only that path of the engine clears the buffers of every partition.
        optimizer = self.engine.optimizer

        def overflow(*_: object, **__: object) -> None:
            optimizer.overflow = True

        overrides = {"check_overflow": overflow, "check_grad_overflow": True}  # stages 1 and 2
        overrides |= {"_overflow_check_and_loss_scale_update": overflow}  # stage 3
        originals = {name: getattr(optimizer, name) for name in overrides if hasattr(optimizer, name)}
        try:
            for name in originals:
                setattr(optimizer, name, overrides[name])
            self.engine.step()
        finally:
            for name, value in originals.items():
                setattr(optimizer, name, value)
        if self.engine.was_step_applied():
            raise RuntimeError(
                "expected DeepSpeed to drop a step, got one that was taken: the parameters were updated with a "
                "gradient that a guard rejected. Use a DeepSpeed version that passes tests/distributed/test_zero.py."
            )


def make_optimizer_steps(policy: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> OptimizerSteps:
    """`DeepSpeedSteps` under DeepSpeed, else `AccelerateSteps`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedSteps(policy)
    return AccelerateSteps(policy, optimizer, accelerator)
