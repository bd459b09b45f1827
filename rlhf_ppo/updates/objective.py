"""Types shared by updates and objectives: loss terms, records, and the protocols `Objective` and `Update`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_ppo.batch import PolicyOutput, TrainBatch


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Loss, metrics and ratios of one micro-batch; loss and metrics add up over micro-batches and processes."""

    loss: Tensor
    """Scalar to minimize: a sum over the micro-batch's actions divided by the count of the whole optimizer step."""
    metrics: dict[str, Tensor]
    """Detached scalars, divided by the same count."""
    ratio: Tensor
    """π_θ / π_old, [batch, time], detached; meaningless where the batch's mask is False."""


Metrics: TypeAlias = dict[str, Tensor | float]
"""Numbers of one optimizer step; those on the device are read together, by `read_scalars`."""

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


Masked: TypeAlias = tuple[Tensor, Tensor]
"""Values [batch, time] and a mask of the same shape: True where they count."""


def select_actions(parts: Sequence[Masked]) -> Tensor:
    """Concatenate the values at actions, 1-D. Called once per update, because the host waits for a GPU here."""
    values = torch.cat([value.flatten() for value, _ in parts])
    return values[torch.cat([mask.flatten() for _, mask in parts])]


def read_scalars(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The same metrics as Python numbers: all tensors among them in one transfer.

    Collective where a metric is sharded, as the gradient's norm is under FSDP2.
    """
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    names = list(tensors)
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    numbers = torch.stack([tensor.double() for tensor in whole]).tolist() if whole else []
    read = dict(zip(names, numbers, strict=True))
    return {name: read[name] if name in read else float(value) for name, value in metrics.items()}


def sum_metrics(terms: Sequence[LossTerms], accelerator: Accelerator) -> Metrics:
    """The metrics of all micro-batches and processes, added up, still on the device. Collective."""
    names = list(terms[0].metrics)
    totals = torch.stack([torch.stack([term.metrics[name].float() for term in terms]).sum() for name in names])
    return dict(zip(names, accelerator.reduce(totals, reduction="sum").unbind(), strict=True))


def gather_ratios(ratios: list[Tensor], accelerator: Accelerator) -> list[Tensor]:
    """The ratios of all processes, on the CPU where there are several. Collective."""
    return ratios if accelerator.num_processes == 1 else gather_object([part.cpu() for part in ratios])


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
    critic_only: bool = False
    """Whether the update left the policy as it was, because the critic warms up."""
    extras: dict[str, float] = field(default_factory=dict)
    """Metrics that only this algorithm has, one number per update."""

    @classmethod
    def of_batch(
        cls,
        batch: TrainBatch,
        terms: Sequence[LossTerms],
        micro_batches: Sequence[TrainBatch],
        accelerator: Accelerator,
        **metrics: Tensor | float,
    ) -> "UpdateRecord":
        """Record one pass over a whole batch, from this process's micro-batches of it. Collective."""
        every_row = torch.arange(len(batch), device=batch.mask.device)
        metrics = sum_metrics(terms, accelerator) | batch_statistics(batch, every_row) | metrics
        ratios = select_actions([(term.ratio, part.mask) for term, part in zip(terms, micro_batches, strict=True)])
        return cls(
            metrics=[read_scalars(metrics)], ratios=gather_ratios([ratios], accelerator),
            advantages=[batch.advantages[batch.mask]],
        )  # fmt: skip

    def mean(self) -> dict[str, float]:
        """Each metric averaged over optimizer steps."""
        names = self.metrics[0].keys() if self.metrics else ()
        return {name: sum(step[name] for step in self.metrics) / len(self.metrics) for name in names}

    def ratio(self) -> Tensor:
        """All probability ratios of the update, 1-D."""
        return torch.cat(self.ratios)


@runtime_checkable
class GradientFunction(Protocol):
    """Computes the gradients of one optimizer step, in place of autograd."""

    def __call__(self, objective: Objective, batch: TrainBatch, rows: Tensor) -> tuple[Metrics, list[Masked]]:
        """Set every parameter's `.grad` to that of `objective` over `rows`; return its metrics and the ratios."""


@runtime_checkable
class Update(Protocol):
    """Changes the parameters, given a batch; has state that resumes exactly."""

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """Train on one batch."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serializable state of row order and coefficients."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


def batch_statistics(batch: TrainBatch, rows: Tensor) -> dict[str, Tensor]:
    """Mean and variance of advantages, returns and old values over the rows of an optimizer step."""
    mask = batch.mask[rows]
    columns = torch.stack([column[rows] for column in (batch.advantages, batch.returns, batch.values)])
    columns, count = columns.masked_fill(~mask, 0.0), mask.sum()
    means = columns.sum((1, 2), keepdim=True) / count.clamp(min=1)
    squares = (columns - means).square().masked_fill(~mask, 0.0).sum((1, 2))
    advantages, returns, values = means.flatten().unbind()
    _, returns_var, values_var = (squares / (count - 1).clamp(min=1)).unbind()
    return {
        "policy/advantages_mean": advantages,
        "returns/mean": returns,
        "returns/var": returns_var,
        "val/mean": values,
        "val/var": values_var,
    }
