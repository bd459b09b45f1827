"""`trl.trainer.utils.RunningMoments` and its statistics over processes, as the classic called them."""

from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.functional.masked import ReduceSum
from rlhf_ppo.learner import running_moments


class RunningMoments(running_moments.RunningMoments):
    """Running mean and standard deviation of scores over the processes of an accelerator.

    Args:
        accelerator: Its processes share the moments.
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__()
        self.accelerator = accelerator

    @property
    def var(self) -> Tensor:
        """The square of `std`."""
        return self.std.square()

    def update(self, x: Tensor, reduce_sum: ReduceSum | None = None) -> tuple[Tensor, Tensor]:
        """Add scores; return the mean and standard deviation of these alone."""
        return super().update(x, reduce_sum or Processes(self.accelerator).reduce_sum)


def get_global_statistics(accelerator: Any, xs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of the entries of all processes, where a mask is 1 if one is given."""
    weights = torch.ones_like(xs) if mask is None else mask.to(xs)
    reduce_sum = Processes(accelerator).reduce_sum
    total, count = reduce_sum(torch.stack([(xs * weights).sum(), weights.sum()]))
    mean = total / count
    squares = reduce_sum(((xs - mean).square() * weights).sum())
    return mean, squares / count, count
