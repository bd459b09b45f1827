"""Whether a checkpoint belongs to this run: the same parameters, the same frozen weights, the same settings."""

import hashlib
import warnings
from typing import Any

import torch

from rlhf_ppo.checkpoints.folders import CheckpointError
from rlhf_ppo.checkpoints.reader import SavedCheckpoint
from rlhf_ppo.distributed.fsdp import reshard
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.models.value_head import VALUE_HEAD_PREFIX
from rlhf_ppo.utils.redaction import redacted

_OF_THE_MACHINE = (
    "exp_name", "log_with", "world_size", "global_backward_batch_size", "global_batch_size", "total_ppo_epochs",
    "dataset_num_proc", "output_dir",
)  # fmt: skip
_SAMPLED = 64
"""Entries of each frozen parameter that the fingerprint looks at."""


def trained_parameters(learner: PPOLearner) -> dict[str, torch.Tensor]:
    """Parameters that training moves, detached, under their names; in parts under FSDP2."""
    if learner.processes.has_fsdp:
        reshard(learner.policy)
    named = learner.model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


def run_facts(learner: PPOLearner) -> dict[str, Any]:
    """What tells this run from others, for `state.json`."""
    settings = {
        name: value
        for name, value in redacted(learner.config.to_dict()).items()
        if name not in _OF_THE_MACHINE and "/" not in name and isinstance(value, int | float | str | None)
    }
    return {"frozen": frozen_fingerprint(learner), "settings": settings}


def frozen_fingerprint(learner: PPOLearner) -> str | None:
    """A digest of some entries of every frozen parameter of policy and reference; None where a process holds parts.

    A reference's value head is a copy of one that may start from anything, and nobody asks it.
    """
    if learner.processes.sharded:
        return None
    digest = hashlib.sha256()
    for module in (learner.model, learner.ref_model):
        for name, parameter in [] if module is None else module.named_parameters():
            frozen = not parameter.requires_grad or module is learner.ref_model
            if frozen and not name.startswith(VALUE_HEAD_PREFIX):
                flat = parameter.detach().flatten()
                entries = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
                digest.update(f"{name} {tuple(parameter.shape)} {entries.float().tolist()}".encode())
    return digest.hexdigest()


def check_compatibility(learner: PPOLearner, saved: SavedCheckpoint) -> None:
    """Refuse a checkpoint of another model; name settings that have changed.

    Raises:
        CheckpointError: Parameters, optimizer states or frozen weights are not this run's.
    """
    if saved.weights:
        _check_parameters(learner, saved)
        _check_optimizer(learner, saved)
    before, now = saved.facts.get("frozen"), frozen_fingerprint(learner)
    if None not in (before, now) and before != now:
        raise CheckpointError(
            f"{saved.path.name} was trained on other frozen weights than this run has (the base model under adapters, "
            "or the reference): the KL would be measured from another place. Start from the model that the first run "
            "started from; the checkpoint brings the trained weights itself."
        )
    settings, present = saved.facts.get("settings") or {}, run_facts(learner)["settings"]
    changed = [f"{key}={present[key]!r} (was {settings[key]!r})" for key in settings if settings[key] != present[key]]
    if changed:
        warnings.warn(
            f"{saved.path.name} was written with other settings: {', '.join(changed)}. The run goes on with the new "
            "ones, except for the learning rate, which is the optimizer's.",
            stacklevel=4,
        )


def _check_parameters(learner: PPOLearner, saved: SavedCheckpoint) -> None:
    known = {name: (tuple(value.shape), value.dtype) for name, value in trained_parameters(learner).items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in saved.weights.items()}
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) != found.get(name):
            here, there = (_described(held.get(name)) for held in (known, found))
            raise CheckpointError(
                f"{saved.path.name} holds {there} for {name}, this model trains {here}: it was written by a run of "
                "another model. Choose another output_dir, or resume=False."
            )


def _described(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "nothing" if entry is None else f"shape {entry[0]} {str(entry[1]).removeprefix('torch.')}"


def _check_optimizer(learner: PPOLearner, saved: SavedCheckpoint) -> None:
    groups: list[dict[str, Any]] = saved.optimizer["param_groups"]
    parameters = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    sizes = [len(group["params"]) for group in learner.optimizer.param_groups]
    if [len(group["params"]) for group in groups] != sizes:
        raise CheckpointError(
            f"{saved.path.name} holds an optimizer of {len(indices)} parameters in {len(groups)} groups, this run's "
            f"has {len(parameters)} in {len(sizes)}: it was written by a run of another optimizer. Build the one of "
            "the first run."
        )
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in saved.optimizer["state"].get(index, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{saved.path.name} holds {name} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}: it was written by a run of another model. Choose another output_dir."
                )
