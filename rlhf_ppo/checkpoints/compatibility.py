"""Check that a checkpoint belongs to this run: same parameters, same frozen weights, same settings."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from rlhf_ppo.checkpoints.folders import CheckpointError
from rlhf_ppo.checkpoints.reader import SavedCheckpoint
from rlhf_ppo.checkpoints.schedule import schedule_settings
from rlhf_ppo.distributed.fsdp import reshard
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.models.fingerprint import weights_fingerprint
from rlhf_ppo.models.value_head import VALUE_HEAD_PREFIX
from rlhf_ppo.utils.redaction import redacted

logger = logging.getLogger(__name__)

_IGNORED_SETTINGS = (
    "exp_name", "log_with", "world_size", "global_backward_batch_size", "global_batch_size", "total_ppo_epochs",
    "dataset_num_proc", "output_dir",
)  # fmt: skip
_SAVED_SETTINGS = ("learning_rate", "adam_eps", "optimizer", "fused_adam", "init_kl_coef")
"""Settings that are part of the saved state of optimizer and KL controller."""
_DERIVED_SETTINGS = ("backward_batch_size",)
"""Settings that follow from others."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""States of an optimizer that are shaped like their parameter; others may be factored (Adafactor), or quantized."""


def trained_parameters(learner: PPOLearner) -> dict[str, torch.Tensor]:
    """Trainable parameters by name, detached; sharded under FSDP2."""
    if learner.processes.has_fsdp:
        reshard(learner.policy)
    named = learner.model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


def present_settings(learner: PPOLearner) -> dict[str, Any]:
    """The settings of this run that are one value and change what is computed."""
    return {
        name: value
        for name, value in redacted(learner.config.to_dict()).items()
        if name not in _IGNORED_SETTINGS and "/" not in name and isinstance(value, int | float | str | None)
    }


def run_identity(learner: PPOLearner, first_settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fingerprint of frozen weights and settings of this run, for `state.json`.

    Args:
        first_settings: Settings that the run began with; None: the present ones.
    """
    settings = present_settings(learner)
    return {
        "frozen": frozen_fingerprint(learner), "settings": settings,
        "first_settings": settings if first_settings is None else dict(first_settings),
    }  # fmt: skip


def changed_on_the_way(learner: PPOLearner, saved: SavedCheckpoint) -> dict[str, Any]:
    """Settings that the saved run changed after its start (a callback, for example), where this run starts as it did.

    A setting with which this run starts otherwise is the user's change.
    """
    first, last = saved.identity.get("first_settings") or {}, saved.identity.get("settings") or {}
    now = present_settings(learner)
    return {name: last[name] for name in first if first[name] == now[name] != last[name]}


def follow_settings(learner: PPOLearner, changed: Mapping[str, Any]) -> None:
    """Go on with the settings of `changed_on_the_way`."""
    vars(learner.config).update(changed)  # all of them first: one alone may contradict the others' first values
    for name in changed.keys() - {*_SAVED_SETTINGS, *_DERIVED_SETTINGS}:
        learner.config.announce(name)
    if changed and learner.accelerator.is_main_process:
        logger.info("settings that were changed in the saved run go on: %s", changed)


def frozen_fingerprint(learner: PPOLearner) -> str | None:
    """SHA-256 of some entries of every frozen parameter of policy and reference; None if sharded.

    The value head of the reference is left out: its values are random, and not used.
    """
    if learner.processes.sharded:
        return None
    modules = [module for module in (learner.model, learner.ref_model) if module is not None]
    return weights_fingerprint(
        (name, parameter)
        for module in modules
        for name, parameter in module.named_parameters()
        if not name.startswith(VALUE_HEAD_PREFIX) and (not parameter.requires_grad or module is learner.ref_model)
    )


def check_compatibility(learner: PPOLearner, saved: SavedCheckpoint) -> None:
    """Raise if the checkpoint is of another model; warn of settings that have changed.

    Raises:
        CheckpointError: Parameters, optimizer states or frozen weights do not match this run.
    """
    if saved.weights:
        _check_parameters(learner, saved)
        _check_optimizer(learner, saved)
    saved_fingerprint, fingerprint = saved.identity.get("frozen"), frozen_fingerprint(learner)
    if None not in (saved_fingerprint, fingerprint) and saved_fingerprint != fingerprint:
        raise CheckpointError(
            f"{saved.path.name} was trained on other frozen weights than this run has (the base model under adapters, "
            "or the reference): the KL would be to another model. Start from the model that the first run "
            "started from; the checkpoint has the trained weights."
        )
    before, now = saved.identity.get("settings") or {}, present_settings(learner)
    now |= changed_on_the_way(learner, saved)
    schedules = saved.shared.get("lr_scheduler"), learner.lr_scheduler and learner.lr_scheduler.state_dict()
    then, today = (schedule_settings(learner, state) for state in schedules)
    before, now = before | then, now | {name: today.get(name) for name in then}
    before["lr_scheduler"], now["lr_scheduler"] = ("given" if state else None for state in schedules)
    changed = [key for key in before if before[key] != now[key]]
    if changed:
        differences = ", ".join(f"{key}={now[key]!r} (was {before[key]!r})" for key in changed)
        kept = ", ".join(key for key in changed if key in (*_SAVED_SETTINGS, *then))
        which = f"the new values, except for {kept}, whose saved values go on" if kept else "the new values"
        warnings.warn(
            f"{saved.path.name} was written with other settings: {differences}. The run uses {which}.", stacklevel=4
        )


def _check_parameters(learner: PPOLearner, saved: SavedCheckpoint) -> None:
    expected = {name: (tuple(value.shape), value.dtype) for name, value in trained_parameters(learner).items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in saved.weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            here, there = _describe(expected.get(name)), _describe(found.get(name))
            raise CheckpointError(
                f"{saved.path.name} holds {there} for {name}, this model trains {here}: it was written by a run of "
                "another model. Choose another output_dir, or resume=False."
            )


def _describe(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "nothing" if entry is None else f"shape {entry[0]} {str(entry[1]).removeprefix('torch.')}"


def _check_optimizer(learner: PPOLearner, saved: SavedCheckpoint) -> None:
    groups: list[dict[str, Any]] = saved.optimizer["param_groups"]
    parameters = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    sizes = [len(group["params"]) for group in learner.optimizer.param_groups]
    if [len(group["params"]) for group in groups] != sizes:
        raise CheckpointError(
            f"{saved.path.name} holds an optimizer of {len(indices)} parameters in {len(groups)} groups, this run's "
            f"has {len(parameters)} in {len(sizes)}: it was written by a run of another optimizer. Build the "
            "optimizer of the first run."
        )
    expected, found = (_numbers(each) for each in (learner.optimizer.param_groups, groups))
    if (expected ^ found) - _counts([*learner.optimizer.param_groups, *groups]):
        raise CheckpointError(
            f"{saved.path.name} holds an optimizer with the settings {', '.join(sorted(found))}, this run's has "
            f"{', '.join(sorted(expected))}: it was written by a run of another optimizer. Build the optimizer of the "
            "first run, or choose another output_dir."
        )
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in saved.optimizer["state"].get(index, {}).items():
            if name in _MOMENTS and isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{saved.path.name} holds {name} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}: it was written by a run of another model. Choose another output_dir."
                )


def _numbers(groups: list[dict[str, Any]]) -> set[str]:
    """Names of an optimizer's own settings that are numbers.

    Left out: flags, which torch fills in and which differ between versions, and what a schedule adds (`initial_lr`).
    """
    kinds = (int, float, list, tuple, torch.Tensor)
    numbers = {
        name for group in groups for name, value in group.items()
        if isinstance(value, kinds) and not isinstance(value, bool)
    }  # fmt: skip
    added = {name for name in numbers if name.endswith(("_lr", "_momentum"))}
    return numbers - added - {"params", "param_names"}


def _counts(groups: list[dict[str, Any]]) -> set[str]:
    """Names of positive whole numbers: an optimizer may add a count of its steps in the first (apex's FusedAdam)."""
    return {
        name for group in groups for name, value in group.items()
        if (value > 0 if isinstance(value, int) else isinstance(value, torch.Tensor) and not value.is_floating_point())
    }  # fmt: skip
