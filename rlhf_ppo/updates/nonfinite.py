"""What stops a run whose losses or gradients are not finite, with all that is needed to compute them again."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from rlhf_ppo.batch import TrainBatch


class NonFiniteUpdateError(FloatingPointError):
    """Too many optimizer steps in a row had a loss or gradient that is not finite; none of them was taken.

    Args:
        message: One sentence.
        batch: The rows of all processes.
        rows: Those of the last step.
        metrics: What that step measured; `loss/total` and `policy/grad_norm` among it.
    """

    def __init__(self, message: str, *, batch: TrainBatch, rows: Tensor, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.batch, self.rows, self.metrics = batch, rows, metrics


@dataclass(frozen=True)
class DryRunStep:
    """An optimizer step that was computed and not taken."""

    metrics: dict[str, float]
    broken: list[str]
    """Parameters whose gradient is not finite."""

    @property
    def is_finite(self) -> bool:
        """Whether the step could have been taken."""
        return all(math.isfinite(self.metrics[name]) for name in ("loss/total", "policy/grad_norm"))


@runtime_checkable
class SupportsDryRun(Protocol):
    """An update whose optimizer steps can be computed without being taken."""

    def examine(self, batch: TrainBatch, rows: Tensor) -> DryRunStep:
        """Compute the step on these rows."""
        ...


def innermost_update(update: object) -> SupportsDryRun:
    """The update that takes the steps, inside those that adapt, warm up or remember around it."""
    while not isinstance(update, SupportsDryRun):
        update = vars(update)["inner"]
    return update


def broken_gradients(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient holds nan or infinity."""
    named = ((name, parameter.grad) for name, parameter in module.named_parameters())
    return [name for name, gradient in named if gradient is not None and not gradient.isfinite().all()]
