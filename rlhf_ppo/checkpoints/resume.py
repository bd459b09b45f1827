"""Save and restore the checkpoint of a run. All files are read and checked before any state changes."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from accelerate.utils import DistributedType, broadcast_object_list

from rlhf_ppo.checkpoints import folders
from rlhf_ppo.checkpoints.compatibility import (
    changed_on_the_way,
    check_compatibility,
    follow_settings,
    run_identity,
    trained_parameters,
)
from rlhf_ppo.checkpoints.folders import CheckpointError
from rlhf_ppo.checkpoints.nested_state import save_nested_state, write_tensors
from rlhf_ppo.checkpoints.random_streams import RandomStreams
from rlhf_ppo.checkpoints.reader import (
    ENGINE,
    IDENTITY,
    LOOP,
    MODEL,
    OPTIMIZER,
    PROCESSES,
    SavedCheckpoint,
    read_checkpoint,
)
from rlhf_ppo.checkpoints.schedule import follow_schedule
from rlhf_ppo.distributed.fsdp import gather_nested_tensors, shard_like, shard_optimizer_state
from rlhf_ppo.learner.ppo_learner import PPOLearner


@runtime_checkable
class Stateful(Protocol):
    """An object whose state is part of a checkpoint, such as a prompt order, a reward source or a callback."""

    def state_dict(self) -> dict[str, Any]:
        """The state: tensors, numbers, strings and None, in lists, tuples and dicts."""

    def load_state_dict(self, state: Any) -> None:
        """Restore a state that `state_dict` returned."""


class CheckpointNotWrittenError(OSError):
    """A checkpoint could not be written; earlier ones are unchanged."""


StatefulByName = Mapping[str, Stateful]
_NOTHING: StatefulByName = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class RestoredCheckpoint:
    """The checkpoint from which a run continues."""

    path: Path
    iteration: int
    """Number of finished iterations."""
    exact: bool
    """Whether random streams continue; False under another number of processes."""


def save_checkpoint(
    learner: PPOLearner,
    folder: Path,
    *,
    iteration: int,
    shared: StatefulByName = _NOTHING,
    per_process: StatefulByName = _NOTHING,
    keep_last: int = 2,
    first_settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `checkpoint-<iteration>` into `folder`, atomically. All processes call it; the main one writes.

    Args:
        learner: Its weights, optimizer, schedule, controller, moments and shuffles are saved.
        folder: Run folder, on a file system that all processes share.
        iteration: Number of finished iterations.
        shared: Further state that is the same on every process.
        per_process: Further state of each process, such as `{"random": RandomStreams(generator)}`.
        keep_last: Number of checkpoints kept.
        first_settings: The `present_settings` that the run began with. A resumed run that begins with them, too, goes
            on with those that were changed since. None: nothing was changed.

    Raises:
        CheckpointNotWrittenError: Raised on every process if one could not write; the incomplete folder is removed.
        TypeError: A `state_dict` holds a type that safetensors and JSON do not; the message names it.
    """
    states = learner.processes.gather_objects([{name: part.state_dict() for name, part in per_process.items()}])
    partial = folder / f".checkpoint-{iteration}.partial"
    has_engine, main = _has_engine(learner), learner.accelerator.is_main_process
    trained = None if has_engine else gather_nested_tensors(_trained_state(learner), keep=main)

    def write() -> None:
        folders.begin_checkpoint(folder, iteration)
        if trained is not None:
            write_tensors(trained[MODEL], partial / MODEL)
            save_nested_state(trained[OPTIMIZER], partial / OPTIMIZER)
        save_nested_state(
            {name: part.state_dict() for name, part in _shared_state(learner, shared).items()}, partial / LOOP
        )
        save_nested_state(states, partial / PROCESSES)
        folders.write_json(partial / IDENTITY, {"iteration": iteration, **run_identity(learner, first_settings)})

    def write_engine() -> None:
        try:
            learner.policy.save_checkpoint(str(partial), tag=ENGINE)
        except RuntimeError as error:  # as torch.save raises on a full disk
            raise OSError(str(error)) from error

    _run_together(learner, write if main else None, partial)
    if has_engine:
        _run_together(learner, write_engine, partial)
    _run_together(learner, (lambda: folders.commit_checkpoint(partial, keep_last=keep_last)) if main else None, partial)
    return folder / f"checkpoint-{iteration}"


def restore_checkpoint(
    learner: PPOLearner, folder: Path, *, shared: StatefulByName = _NOTHING, per_process: StatefulByName = _NOTHING
) -> RestoredCheckpoint | None:
    """Restore the latest intact checkpoint in `folder`; None if there is none. All processes call it.

    Raises:
        CheckpointError: It does not belong to this run, or is malformed; nothing has changed then.
    """
    path = _agree_on_checkpoint(learner, folder)
    if path is None:
        return None
    try:
        saved = read_checkpoint(path, engine=_has_engine(learner), processes=learner.accelerator.num_processes)
        check_compatibility(learner, saved)
        exact = saved.processes == learner.accelerator.num_processes
        local = saved.per_process[learner.accelerator.process_index % saved.processes]
        parts: dict[str, tuple[Stateful, Any]] = {}
        for stateful, states in ((_shared_state(learner, shared), saved.shared), (per_process, local)):
            parts |= {name: (part, states[name]) for name, part in stateful.items() if name in states}
        if not exact:
            parts.pop("random", None)
        _load_all(parts)
        _load_parameters(learner, saved)
        follow_schedule(learner)
        follow_settings(learner, changed_on_the_way(learner, saved))
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        is_clear = isinstance(error, OSError | RuntimeError | ValueError)  # the others' messages do not help
        reason = str(error) if is_clear else "its files can be read, but are not what this version writes"
        raise CheckpointError(
            f"{path.name} does not fit this run ({reason}). Resume with the model, data and "
            "settings that it was written with, choose another output_dir, or set resume=False."
        ) from error
    if not exact and isinstance(streams := per_process.get("random"), RandomStreams):
        streams.restart(learner.config.seed, saved.iteration, learner.accelerator.process_index)
    learner.start_kl_check.is_due = False  # the trained policy differs from its reference
    learner.accelerator.wait_for_everyone()
    return RestoredCheckpoint(path=path, iteration=saved.iteration, exact=exact)


def _shared_state(learner: PPOLearner, shared: StatefulByName) -> dict[str, Stateful]:
    """The learner's state besides parameters and optimizer, and further state of the caller."""
    state: dict[str, Stateful] = {
        "kl_controller": learner.kl_ctl, "running": learner.running, "update": learner.algorithm.update,
        "reuse": learner.reuse, **shared,
    }  # fmt: skip
    optional = {"lr_scheduler": learner.lr_scheduler, "loss_scale": learner.accelerator.scaler}
    return state | {name: part for name, part in optional.items() if part is not None}


def _trained_state(learner: PPOLearner) -> dict[str, Any]:
    return {MODEL: trained_parameters(learner), OPTIMIZER: learner.optimizer.state_dict()}


def _has_engine(learner: PPOLearner) -> bool:
    return bool(learner.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _run_together(learner: PPOLearner, action: Callable[[], object] | None, partial: Path) -> None:
    """Run `action` where it is given; if it fails on one process, remove the folder and raise on all."""
    problem: OSError | None = None
    try:
        if action is not None:
            action()
    except OSError as error:
        problem = error
    reasons = [text for text in learner.processes.gather_objects([str(problem or "")]) if text]
    if reasons:
        if learner.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        name = partial.name.removeprefix(".").removesuffix(".partial")
        raise CheckpointNotWrittenError(
            f"{name} could not be written in {partial.parent}: {reasons[0]}. Earlier checkpoints are unchanged. Free "
            "disk space, or make the folder writable."
        ) from problem


def _agree_on_checkpoint(learner: PPOLearner, folder: Path) -> Path | None:
    """The latest intact checkpoint, chosen by the main process for all."""
    choice: list[Any] = [None, None]  # name, error
    if learner.accelerator.is_main_process:
        try:
            path = folders.latest_checkpoint(folder)
            choice = [None if path is None else path.name, None]
        except CheckpointError as error:
            choice = [None, str(error)]
    name, problem = broadcast_object_list(choice)
    if problem is not None:
        raise CheckpointError(problem)
    if name is not None and not (folder / name).is_dir():
        raise CheckpointError(
            f"process {learner.accelerator.process_index} does not see {folder / name}, which the main process has "
            "found: processes would continue from different states. Put output_dir on a file system that nodes share."
        )
    return None if name is None else folder / name


def _load_all(parts: Mapping[str, tuple[Stateful, Any]]) -> None:
    """Load each state; if one raises, restore those before it."""
    loaded: list[tuple[Stateful, Any]] = []
    try:
        for part, state in parts.values():
            loaded.append((part, part.state_dict()))
            part.load_state_dict(state)
    except Exception:
        for part, before in reversed(loaded):
            part.load_state_dict(before)
        raise


def _load_parameters(learner: PPOLearner, saved: SavedCheckpoint) -> None:
    if _has_engine(learner):
        learner.policy.load_checkpoint(str(saved.path), tag=ENGINE)
        return
    learner.optimizer.load_state_dict(shard_optimizer_state(saved.optimizer, learner.optimizer))
    for name, parameter in trained_parameters(learner).items():
        parameter.copy_(shard_like(saved.weights[name], parameter))
