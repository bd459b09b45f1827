"""The files of a checkpoint, read into memory. Those of format 1 are read as what they would be today."""

import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlhf_ppo.checkpoints import folders
from rlhf_ppo.checkpoints.folders import CheckpointError
from rlhf_ppo.checkpoints.nested_state import DamagedFileError, load_nested_state

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
LOOP, PROCESSES = "loop.safetensors", "processes.safetensors"
FACTS = folders.STATE
ENGINE = "engine"
"""Folder of a DeepSpeed engine's own files: parameters and optimizer states, in parts."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """One checkpoint in memory."""

    path: Path
    iteration: int
    processes: int
    """How many wrote it."""
    shared: dict[str, Any]
    """Part -> its state."""
    own: list[dict[str, Any]]
    """The same for what each process has for itself."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Trained parameters; empty where a DeepSpeed engine reads its own."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What `state.json` says of the run."""


def read_checkpoint(path: Path, *, engine: bool, processes: int) -> SavedCheckpoint:
    """All of a checkpoint whose checksums have been looked at.

    Args:
        path: Its folder.
        engine: Whether this run has a DeepSpeed engine.
        processes: How many this run has.

    Raises:
        CheckpointError: It was written by another kind of run.
    """
    if engine != (path / ENGINE).is_dir():
        raise CheckpointError(
            f"{path.name} was written {'without' if engine else 'by'} DeepSpeed, this run differs: the "
            "optimizer's parts and whole do not replace each other. Resume with the first run's launch configuration."
        )
    saved = _read_format_1(path, engine) if folders.format_of(path) == 1 else _read(path, engine)
    if saved.processes != processes and engine:
        raise CheckpointError(
            f"{path.name} was written by {saved.processes} processes of DeepSpeed, this run has {processes}: the "
            "optimizer's states lie in as many parts. Resume with the first run's number of processes."
        )
    if saved.processes != processes:
        warnings.warn(
            f"{path.name} was written by {saved.processes} process(es), this run has {processes}. Weights, optimizer, "
            "schedule, controller, moments, shuffles and the place in the prompts continue exactly; random streams "
            "start anew, so samples differ from those of an uninterrupted run, and an iteration holds "
            f"{processes / saved.processes:g} x as many responses unless batch_size is changed.",
            stacklevel=4,
        )
    return saved


def _read(path: Path, engine: bool) -> SavedCheckpoint:
    facts = folders.read_json(path / FACTS)
    own = load_nested_state(path / PROCESSES)
    return SavedCheckpoint(
        path=path, iteration=_count(facts["iteration"]), processes=len(own), facts=facts, own=own,
        shared=load_nested_state(path / LOOP), weights={} if engine else _weights(path),
        optimizer={} if engine else load_nested_state(path / OPTIMIZER),
    )  # fmt: skip


def _read_format_1(path: Path, engine: bool) -> SavedCheckpoint:
    """Optimizer and random states came from `torch.save`, everything else stood in `state.json`."""
    state = folders.read_json(path / FACTS)
    running = {name: torch.tensor(value) for name, value in state["running"].items()}
    shared = {name: state[name] for name in ("kl_controller", "update", "prompts")} | {"running": running}
    shared["best"] = {"best": state["best"], "points": []}
    if state["lr_scheduler"] is not None:
        shared["lr_scheduler"] = state["lr_scheduler"]
    files = sorted(path.glob("rng-*.pt"), key=lambda file: int(file.stem.removeprefix("rng-")))
    own = [{"random": _tensors(file)} for file in files]
    return SavedCheckpoint(
        path=path, iteration=_count(state["iteration"]), processes=len(own), shared=shared, own=own,
        weights={} if engine else _weights(path),
        optimizer={} if engine else _tensors(path / "optimizer.pt"),
    )  # fmt: skip


def _weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path / MODEL)
    except SafetensorError as error:
        raise DamagedFileError(f"{MODEL} holds no weights ({error})") from error


def _tensors(path: Path) -> Any:
    """What format 1 pickled; nothing but tensors and plain containers is let in."""
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise DamagedFileError(f"{path.name} holds no tensors ({str(error).splitlines()[0]})") from error


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise DamagedFileError(f"{FACTS} gives the iteration {value!r}")
    return value
