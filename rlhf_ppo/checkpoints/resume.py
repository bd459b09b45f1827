"""What a checkpoint of a run holds, and how it comes back. Everything is read and checked before anything moves."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from accelerate.utils import DistributedType, broadcast_object_list

from rlhf_ppo.checkpoints import folders
from rlhf_ppo.checkpoints.compatibility import check_compatibility, run_facts, trained_parameters
from rlhf_ppo.checkpoints.folders import CheckpointError
from rlhf_ppo.checkpoints.nested_state import save_nested_state, write_tensors
from rlhf_ppo.checkpoints.random_streams import RandomStreams
from rlhf_ppo.checkpoints.reader import (
    ENGINE,
    FACTS,
    LOOP,
    MODEL,
    OPTIMIZER,
    PROCESSES,
    SavedCheckpoint,
    read_checkpoint,
)
from rlhf_ppo.distributed.fsdp import gather_nested_tensors, shard_like, shard_optimizer_state
from rlhf_ppo.learner.ppo_learner import PPOLearner


@runtime_checkable
class Stateful(Protocol):
    """Whatever a run must find again as it was: a prompt order, a reward source that counts, a callback."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, texts and None, in lists, tuples and dicts."""

    def load_state_dict(self, state: Any) -> None:
        """Continue where `state_dict` was taken."""


class CheckpointNotWrittenError(OSError):
    """A checkpoint could not be written; those before are as they were."""


Parts = Mapping[str, Stateful]
_NONE: Parts = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Where a run goes on."""

    path: Path
    iteration: int
    exact: bool
    """Whether every random stream continues: not under another number of processes."""


def save_checkpoint(
    learner: PPOLearner,
    folder: Path,
    *,
    iteration: int,
    shared: Parts = _NONE,
    own: Parts = _NONE,
    keep_last: int = 2,
) -> Path:
    """Write `checkpoint-<iteration>` into `folder`, whole or not at all. All processes call it; the main one writes.

    Args:
        learner: Its weights, optimizer, schedule, controller, moments and shuffles are saved.
        folder: On a file system that all processes share.
        iteration: Iterations finished.
        shared: Further state that is the same on every process.
        own: Further state that each process has for itself. `random` should be among it.
        keep_last: Checkpoints kept.

    Raises:
        CheckpointNotWrittenError: On every process, if one could not write; what it wrote is removed again.
        TypeError: A `state_dict` holds something that safetensors and JSON do not; it is named.
    """
    states = learner.processes.gather_objects([{name: part.state_dict() for name, part in own.items()}])
    aside = folder / f".checkpoint-{iteration}.partial"
    has_engine, main = _has_engine(learner), learner.accelerator.is_main_process
    learned = None if has_engine else gather_nested_tensors(_learned(learner), keep=main)

    def write() -> None:
        folders.begin_checkpoint(folder, iteration)
        if learned is not None:
            write_tensors(learned[MODEL], aside / MODEL)
            save_nested_state(learned[OPTIMIZER], aside / OPTIMIZER)
        save_nested_state({name: part.state_dict() for name, part in _all(learner, shared).items()}, aside / LOOP)
        save_nested_state(states, aside / PROCESSES)
        folders.write_json(aside / FACTS, {"iteration": iteration, **run_facts(learner)})

    def write_engine() -> None:
        try:
            learner.policy.save_checkpoint(str(aside), tag=ENGINE)
        except RuntimeError as error:  # what torch.save says of a full disk
            raise OSError(str(error)) from error

    _together(learner, write if main else None, aside)
    if has_engine:
        _together(learner, write_engine, aside)
    _together(learner, (lambda: folders.commit_checkpoint(aside, keep_last=keep_last)) if main else None, aside)
    return folder / f"checkpoint-{iteration}"


def restore_checkpoint(
    learner: PPOLearner, folder: Path, *, shared: Parts = _NONE, own: Parts = _NONE
) -> Restored | None:
    """Bring everything to the newest whole checkpoint in `folder`, if there is one. All processes call it.

    Raises:
        CheckpointError: It does not belong to this run, or holds something else; nothing has changed then.
    """
    path = _agreed(learner, folder)
    if path is None:
        return None
    try:
        saved = read_checkpoint(path, engine=_has_engine(learner), processes=learner.accelerator.num_processes)
        check_compatibility(learner, saved)
        exact = saved.processes == learner.accelerator.num_processes
        mine = saved.own[learner.accelerator.process_index % saved.processes]
        parts: dict[str, tuple[Stateful, Any]] = {}
        for known, states in ((_all(learner, shared), saved.shared), (own, mine)):
            parts |= {name: (part, states[name]) for name, part in known.items() if name in states}
        if not exact:
            parts.pop("random", None)
        _load(parts)
        _load_parameters(learner, saved)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        ours = isinstance(error, OSError | RuntimeError | ValueError)  # the others' words help nobody
        said = str(error) if ours else "its files can be read, but are not what this version writes"
        raise CheckpointError(
            f"{path.name} does not fit this run ({said}). Resume with the model, data and "
            "settings that it was written with, choose another output_dir, or set resume=False."
        ) from error
    if not exact and isinstance(streams := own.get("random"), RandomStreams):
        streams.restart(learner.config.seed, saved.iteration, learner.accelerator.process_index)
    learner.start.is_due = False  # the policy has left its reference
    learner.accelerator.wait_for_everyone()
    return Restored(path=path, iteration=saved.iteration, exact=exact)


def _all(learner: PPOLearner, shared: Parts) -> dict[str, Stateful]:
    """The trainer's state beside parameters and optimizer, and what the caller adds."""
    known: dict[str, Stateful] = {
        "kl_controller": learner.kl_ctl, "running": learner.running, "update": learner.algorithm.update,
        "reuse": learner.reuse, **shared,
    }  # fmt: skip
    return known if learner.lr_scheduler is None else {**known, "lr_scheduler": learner.lr_scheduler}


def _learned(learner: PPOLearner) -> dict[str, Any]:
    return {MODEL: trained_parameters(learner), OPTIMIZER: learner.optimizer.state_dict()}


def _has_engine(learner: PPOLearner) -> bool:
    return bool(learner.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _together(learner: PPOLearner, action: Callable[[], object] | None, aside: Path) -> None:
    """Do something on some processes; if it fails for one, give the space back and raise on all."""
    problem: OSError | None = None
    try:
        if action is not None:
            action()
    except OSError as error:
        problem = error
    reasons = [text for text in learner.processes.gather_objects([str(problem or "")]) if text]
    if reasons:
        if learner.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        name = aside.name.removeprefix(".").removesuffix(".partial")
        raise CheckpointNotWrittenError(
            f"{name} could not be written in {aside.parent}: {reasons[0]}. The checkpoint before is as it was. Make "
            "room or give the right to write there."
        ) from problem


def _agreed(learner: PPOLearner, folder: Path) -> Path | None:
    """The checkpoint to go on from: the main process looks, the others believe it."""
    found: list[Any] = [None, None]
    if learner.accelerator.is_main_process:
        try:
            newest = folders.latest(folder)
            found = [None if newest is None else newest.name, None]
        except CheckpointError as error:
            found = [None, str(error)]
    name, problem = broadcast_object_list(found)
    if problem is not None:
        raise CheckpointError(problem)
    if name is not None and not (folder / name).is_dir():
        raise CheckpointError(
            f"process {learner.accelerator.process_index} does not see {folder / name}, which the main process has "
            "found: processes would go on from different states. Put output_dir on a file system that all nodes share."
        )
    return None if name is None else folder / name


def _load(parts: Mapping[str, tuple[Stateful, Any]]) -> None:
    """Load each part; if one refuses, those before it are put back."""
    done: list[tuple[Stateful, Any]] = []
    try:
        for part, state in parts.values():
            done.append((part, part.state_dict()))
            part.load_state_dict(state)
    except Exception:
        for part, before in reversed(done):
            part.load_state_dict(before)
        raise


def _load_parameters(learner: PPOLearner, saved: SavedCheckpoint) -> None:
    if _has_engine(learner):
        learner.policy.load_checkpoint(str(saved.path), tag=ENGINE)
        return
    learner.optimizer.load_state_dict(shard_optimizer_state(saved.optimizer, learner.optimizer))
    for name, parameter in trained_parameters(learner).items():
        parameter.copy_(shard_like(saved.weights[name], parameter))
