"""What a checkpoint of a run holds, and how it comes back. Everything is read and checked before anything moves."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from accelerate.utils import DistributedType, broadcast_object_list

from rlhf_ppo.checkpoints import folders
from rlhf_ppo.checkpoints.compatibility import check_sameness, facts_of_the_run, trained_parameters
from rlhf_ppo.checkpoints.folders import CheckpointError
from rlhf_ppo.checkpoints.nested_state import save_tree, write_tensors
from rlhf_ppo.checkpoints.random_streams import RandomStreams
from rlhf_ppo.checkpoints.reader import ENGINE, FACTS, LOOP, MODEL, OPTIMIZER, PROCESSES, Saved, read
from rlhf_ppo.distributed.fsdp import part_like, parted_state, whole_tree

if TYPE_CHECKING:
    import rlhf_ppo.trainer


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
    trainer: "rlhf_ppo.trainer.PPOTrainer",
    folder: Path,
    *,
    iteration: int,
    shared: Parts = _NONE,
    own: Parts = _NONE,
    keep_last: int = 2,
) -> Path:
    """Write `checkpoint-<iteration>` into `folder`, whole or not at all. All processes call it; the main one writes.

    Args:
        trainer: Its weights, optimiser, schedule, controller, moments and shuffles are saved.
        folder: On a file system that all processes share.
        iteration: Iterations finished.
        shared: Further state that is the same on every process.
        own: Further state that each process has for itself. `random` should be among it.
        keep_last: Checkpoints kept.

    Raises:
        CheckpointNotWrittenError: On every process, if one could not write; what it wrote is removed again.
        TypeError: A `state_dict` holds something that safetensors and JSON do not; it is named.
    """
    everyones = trainer.processes.gather_objects([{name: part.state_dict() for name, part in own.items()}])
    aside = folder / f".checkpoint-{iteration}.partial"
    has_engine, main = _has_engine(trainer), trainer.accelerator.is_main_process
    learned = None if has_engine else whole_tree(_learned(trainer), keep=main)

    def write() -> None:
        folders.begin(folder, iteration)
        if learned is not None:
            write_tensors(learned[MODEL], aside / MODEL)
            save_tree(learned[OPTIMIZER], aside / OPTIMIZER)
        save_tree({name: part.state_dict() for name, part in _all(trainer, shared).items()}, aside / LOOP)
        save_tree(everyones, aside / PROCESSES)
        folders.write_json(aside / FACTS, {"iteration": iteration, **facts_of_the_run(trainer)})

    def write_engine() -> None:
        try:
            trainer.policy.save_checkpoint(str(aside), tag=ENGINE)
        except RuntimeError as error:  # what torch.save says of a full disk
            raise OSError(str(error)) from error

    _together(trainer, write if main else None, aside)
    if has_engine:
        _together(trainer, write_engine, aside)
    _together(trainer, (lambda: folders.commit(aside, keep_last=keep_last)) if main else None, aside)
    return folder / f"checkpoint-{iteration}"


def restore_checkpoint(
    trainer: "rlhf_ppo.trainer.PPOTrainer", folder: Path, *, shared: Parts = _NONE, own: Parts = _NONE
) -> Restored | None:
    """Bring everything to the newest whole checkpoint in `folder`, if there is one. All processes call it.

    Raises:
        CheckpointError: It does not belong to this run, or holds something else; nothing has changed then.
    """
    path = _agreed(trainer, folder)
    if path is None:
        return None
    try:
        saved = read(path, engine=_has_engine(trainer), processes=trainer.accelerator.num_processes)
        check_sameness(trainer, saved)
        exact = saved.processes == trainer.accelerator.num_processes
        mine = saved.own[trainer.accelerator.process_index % saved.processes]
        parts: dict[str, tuple[Stateful, Any]] = {}
        for known, states in ((_all(trainer, shared), saved.shared), (own, mine)):
            parts |= {name: (part, states[name]) for name, part in known.items() if name in states}
        if not exact:
            parts.pop("random", None)
        _load(parts)
        _load_parameters(trainer, saved)
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
        streams.restart(trainer.config.seed, saved.iteration, trainer.accelerator.process_index)
    trainer.start.is_due = False  # the policy has left its reference
    trainer.accelerator.wait_for_everyone()
    return Restored(path=path, iteration=saved.iteration, exact=exact)


def _all(trainer: "rlhf_ppo.trainer.PPOTrainer", shared: Parts) -> dict[str, Stateful]:
    """The trainer's state beside parameters and optimiser, and what the caller adds."""
    known: dict[str, Stateful] = {
        "kl_controller": trainer.kl_ctl, "running": trainer.running, "update": trainer.algorithm.update,
        "reuse": trainer.reuse, **shared,
    }  # fmt: skip
    return known if trainer.lr_scheduler is None else {**known, "lr_scheduler": trainer.lr_scheduler}


def _learned(trainer: "rlhf_ppo.trainer.PPOTrainer") -> dict[str, Any]:
    return {MODEL: trained_parameters(trainer), OPTIMIZER: trainer.optimizer.state_dict()}


def _has_engine(trainer: "rlhf_ppo.trainer.PPOTrainer") -> bool:
    return bool(trainer.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _together(trainer: "rlhf_ppo.trainer.PPOTrainer", action: Callable[[], object] | None, aside: Path) -> None:
    """Do something on some processes; if it fails for one, give the space back and raise on all."""
    problem: OSError | None = None
    try:
        if action is not None:
            action()
    except OSError as error:
        problem = error
    reasons = [text for text in trainer.processes.gather_objects([str(problem or "")]) if text]
    if reasons:
        if trainer.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        name = aside.name.removeprefix(".").removesuffix(".partial")
        raise CheckpointNotWrittenError(
            f"{name} could not be written in {aside.parent}: {reasons[0]}. The checkpoint before is as it was. Make "
            "room or give the right to write there."
        ) from problem


def _agreed(trainer: "rlhf_ppo.trainer.PPOTrainer", folder: Path) -> Path | None:
    """The checkpoint to go on from: the main process looks, the others believe it."""
    found: list[Any] = [None, None]
    if trainer.accelerator.is_main_process:
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
            f"process {trainer.accelerator.process_index} does not see {folder / name}, which the main process has "
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


def _load_parameters(trainer: "rlhf_ppo.trainer.PPOTrainer", saved: Saved) -> None:
    if _has_engine(trainer):
        trainer.policy.load_checkpoint(str(saved.path), tag=ENGINE)
        return
    trainer.optimizer.load_state_dict(parted_state(saved.optimizer, trainer.optimizer))
    for name, parameter in trained_parameters(trainer).items():
        parameter.copy_(part_like(saved.weights[name], parameter))
