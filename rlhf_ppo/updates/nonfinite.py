"""The error that stops a run with non-finite losses or gradients, and dry runs that reproduce such a step."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from rlhf_ppo.batch import TrainBatch


class NonFiniteUpdateError(FloatingPointError):
    """Too many optimizer steps in a row had a non-finite loss or gradient; none of them was taken.

    Args:
        batch: The batch, rows of all processes.
        rows: Row indices of the last step.
        metrics: Metrics of that step, with `loss/total` and `policy/grad_norm`.
    """

    def __init__(self, message: str, *, batch: TrainBatch, rows: Tensor, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.batch, self.rows, self.metrics = batch, rows, metrics


@dataclass(frozen=True)
class DryRunStep:
    """Metrics and non-finite gradients of an optimizer step that was computed but not taken."""

    metrics: dict[str, float]
    nonfinite_gradients: list[str]
    """Names of parameters whose gradient is not finite."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return all(math.isfinite(self.metrics[name]) for name in ("loss/total", "policy/grad_norm"))


@runtime_checkable
class SupportsDryRun(Protocol):
    """An update that can compute an optimizer step without taking it."""

    def dry_run(self, batch: TrainBatch, rows: Tensor) -> DryRunStep:
        """Compute the loss and gradients of an optimizer step on `rows`, without taking the step."""


def innermost_update(update: object) -> SupportsDryRun:
    """Unwrap updates that adapt β, warm up the critic or keep a baseline, down to the one that steps the optimizer."""
    while not isinstance(update, SupportsDryRun):
        update = vars(update)["inner"]
    return update


def nonfinite_gradients(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient contains nan or infinity."""
    named = ((name, parameter.grad) for name, parameter in module.named_parameters())
    return [name for name, gradient in named if gradient is not None and not gradient.isfinite().all()]
