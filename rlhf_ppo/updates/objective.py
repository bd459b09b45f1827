"""What an update and an objective say to each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from rlhf_ppo.batch import PolicyOutput, TrainBatch


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """One micro-batch's share of an objective: every entry adds up over micro-batches and processes."""

    loss: Tensor
    """Scalar to minimize: a sum over the micro-batch's actions divided by the count of the whole optimizer step."""
    metrics: dict[str, Tensor]
    """Detached scalars, divided by the same count."""
    ratio: Tensor
    """π_θ / π_old at the micro-batch's actions, 1-D, detached."""


Objective: TypeAlias = Callable[[PolicyOutput, TrainBatch, Tensor], LossTerms]
"""(new policy output, batch, count of actions in the whole optimizer step) -> terms to minimize."""


CompareWith: TypeAlias = Callable[[TrainBatch], dict[str, Any]]
"""Batch -> further arguments of the policy: whom to measure an exact KL to."""


def no_comparison(batch: TrainBatch) -> dict[str, Any]:
    """No further arguments."""
    return {}


def count_actions(mask: Tensor) -> Tensor:
    """Number of actions: the count under which every token weighs the same."""
    return mask.sum()


def count_sequences(mask: Tensor) -> Tensor:
    """Number of responses: the count of `sequence_mean_count`, under which every response weighs the same."""
    return mask.any(dim=1).sum()


@dataclass(kw_only=True)
class UpdateRecord:
    """What an update did: one entry an optimizer step in every list."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)
    """Of all processes once the update is done, in no particular order."""
    advantages: list[Tensor] = field(default_factory=list)
    skipped: int = 0
    """Optimizer steps that were dropped by the ratio guard or a non-finite gradient; the optimizer did not move."""
    stopped_early: bool = False
    extras: dict[str, float] = field(default_factory=dict)
    """What only this algorithm measures, one number an update."""

    def mean(self) -> dict[str, float]:
        """Each metric averaged over optimizer steps."""
        names = self.metrics[0].keys() if self.metrics else ()
        return {name: sum(step[name] for step in self.metrics) / len(self.metrics) for name in names}

    def ratio(self) -> Tensor:
        """All probability ratios of the update, 1-D."""
        return torch.cat(self.ratios)


@runtime_checkable
class Gradients(Protocol):
    """How the gradients of one optimizer step come about, other than by passes with autograd."""

    def __call__(self, objective: Objective, batch: TrainBatch, rows: Tensor) -> tuple[dict[str, float], list[Tensor]]:
        """Set the gradient of every parameter to that of `objective` over `rows`; its metrics and the ratios."""
        ...


@runtime_checkable
class Update(Protocol):
    """Moves the parameters, given a batch; its state resumes exactly."""

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """Learn from one batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state of shuffles and coefficients."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


def batch_statistics(batch: TrainBatch, rows: Tensor) -> dict[str, float]:
    """What is known of an optimizer step's rows before the step."""
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
