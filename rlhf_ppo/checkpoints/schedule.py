"""Follow the learning-rate schedule of a resumed run, which may be longer than that of the checkpoint."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rlhf_ppo.learner.ppo_learner import PPOLearner

logger = logging.getLogger(__name__)


def schedule_settings(learner: PPOLearner, state: Mapping[str, Any] | None) -> dict[str, Any]:
    """The numbers in a scheduler's state that the user chose, such as `T_max`: restoring the state restores them."""
    if learner.lr_scheduler is None or state is None:
        return {}
    chosen = inspect.signature(type(_scheduler(learner))).parameters.keys() - {"last_epoch"}
    return {f"lr_scheduler.{name}": state[name] for name in sorted(chosen) if isinstance(state.get(name), int | float)}


def follow_schedule(learner: PPOLearner) -> None:
    """Set the learning rates of the next iteration by this run's functions of a `LambdaLR`, and log a change.

    A checkpoint holds no functions, only the rates that those of its run gave: 0 after the end of linear decay. Rates
    that were set past the schedule stay.
    """
    scheduler = _scheduler(learner)
    if not isinstance(scheduler, LambdaLR):
        return
    groups = scheduler.optimizer.param_groups
    saved = [float(group["lr"]) for group in groups]
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [float(base * factor(scheduler.last_epoch)) for base, factor in pairs]
    if rates == saved or saved != [float(rate) for rate in scheduler.get_last_lr()]:
        return
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    if learner.accelerator.is_main_process:
        logger.warning(
            "the schedule of this run differs from the checkpoint's: its learning rate after %d iterations is %g (was "
            "%g). The run uses it.", scheduler.last_epoch, rates[0], saved[0],
        )  # fmt: skip


def _scheduler(learner: PPOLearner) -> Any:
    return getattr(learner.lr_scheduler, "scheduler", learner.lr_scheduler)
