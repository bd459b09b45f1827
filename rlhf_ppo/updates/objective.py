"""Types shared by updates and objectives: loss terms, records, and the protocols `Objective` and `Update`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from rlhf_ppo.batch import PolicyOutput, TrainBatch


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Loss, metrics and ratios of one micro-batch; loss and metrics add up over micro-batches and processes."""

    loss: Tensor
    """Scalar to minimize: a sum over the micro-batch's actions divided by the count of the whole optimizer step."""
    metrics: dict[str, Tensor]
    """Detached scalars, divided by the same count."""
    ratio: Tensor
    """π_θ / π_old at the micro-batch's actions, 1-D, detached."""


Objective: TypeAlias = Callable[[PolicyOutput, TrainBatch, Tensor], LossTerms]
"""(new policy output, batch, count of actions in the whole optimizer step) -> terms to minimize."""


CompareWith: TypeAlias = Callable[[TrainBatch], dict[str, Any]]
"""Batch -> further keyword arguments of the policy: the policy to measure an exact KL to."""


def no_comparison(batch: TrainBatch) -> dict[str, Any]:
    """The `CompareWith` of a loss without an exact KL: no further arguments."""
    return {}


def count_actions(mask: Tensor) -> Tensor:
    """Number of actions: the divisor that weighs every token equally."""
    return mask.sum()


def count_sequences(mask: Tensor) -> Tensor:
    """Number of responses: the argument of `sequence_mean_count`, which weighs every response equally."""
    return mask.any(dim=1).sum()


@dataclass(kw_only=True)
class UpdateRecord:
    """Metrics, ratios and advantages of an update; every list has one entry per optimizer step."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)
    """π_θ / π_old, 1-D; from all processes at the end of the update, in no particular order."""
    advantages: list[Tensor] = field(default_factory=list)
    skipped: int = 0
    """Optimizer steps that were dropped because of the ratio guard or a non-finite gradient."""
    stopped_early: bool = False
    extras: dict[str, float] = field(default_factory=dict)
    """Metrics that only this algorithm has, one number per update."""

    def mean(self) -> dict[str, float]:
        """Each metric averaged over optimizer steps."""
        names = self.metrics[0].keys() if self.metrics else ()
        return {name: sum(step[name] for step in self.metrics) / len(self.metrics) for name in names}

    def ratio(self) -> Tensor:
        """All probability ratios of the update, 1-D."""
        return torch.cat(self.ratios)


@runtime_checkable
class ComputeGradients(Protocol):
    """Computes the gradients of one optimizer step, in place of autograd."""

    def __call__(self, objective: Objective, batch: TrainBatch, rows: Tensor) -> tuple[dict[str, float], list[Tensor]]:
        """Set every parameter's `.grad` to that of `objective` over `rows`; return its metrics and the ratios."""
        ...


@runtime_checkable
class Update(Protocol):
    """Changes the parameters, given a batch; has state that resumes exactly."""

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """Train on one batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-serializable state of row order and coefficients."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


def batch_statistics(batch: TrainBatch, rows: Tensor) -> dict[str, float]:
    """Mean and variance of advantages, returns and old values over the rows of an optimizer step."""
    mask = batch.mask[rows]
    columns = torch.stack([column[rows][mask] for column in (batch.advantages, batch.returns, batch.values)])
    count = max(columns.shape[1], 1)
    means = columns.sum(1, keepdim=True) / count
    variances = (columns - means).square().sum(1) / max(count - 1, 1)
    advantages, returns, values = means.squeeze(1).tolist()  # once: each transfer waits for the device
    _, returns_var, values_var = variances.tolist()
    return {
        "policy/advantages_mean": advantages,
        "returns/mean": returns,
        "returns/var": returns_var,
        "val/mean": values,
        "val/var": values_var,
    }
