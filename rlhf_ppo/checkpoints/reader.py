"""Read the files of a checkpoint, those of the old format 1 included, into a `SavedCheckpoint`."""

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
IDENTITY = folders.STATE
ENGINE = "engine"
"""Folder of the files of a DeepSpeed engine: sharded parameters and optimizer states."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """One checkpoint in memory."""

    path: Path
    iteration: int
    processes: int
    """Number of processes that wrote it."""
    shared: dict[str, Any]
    """Name -> state, the same on every process."""
    per_process: list[dict[str, Any]]
    """Name -> state, for each process."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Trained parameters by name; empty if a DeepSpeed engine reads its own files."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    """Content of `state.json`: iteration, fingerprint of frozen weights, settings."""


def read_checkpoint(path: Path, *, engine: bool, processes: int) -> SavedCheckpoint:
    """Read a checkpoint whose checksums have been verified.

    Args:
        engine: Whether this run has a DeepSpeed engine.

    Raises:
        CheckpointError: It was written by another kind of run.
    """
    if engine != (path / ENGINE).is_dir():
        raise CheckpointError(
            f"{path.name} was written {'without' if engine else 'by'} DeepSpeed, this run differs: "
            "sharded and full optimizer states cannot be converted. Resume with the first run's launch configuration."
        )
    saved = _read_format_1(path, engine) if folders.checkpoint_format(path) == 1 else _read(path, engine)
    if saved.processes != processes and engine:
        raise CheckpointError(
            f"{path.name} was written by {saved.processes} processes of DeepSpeed, this run has {processes}: the "
            "optimizer's states are sharded over as many. Resume with the first run's number of processes."
        )
    if saved.processes != processes:
        warnings.warn(
            f"{path.name} was written by {saved.processes} process(es), this run has {processes}. Weights, optimizer, "
            "schedule, controller, moments, shuffles and the position in the prompts continue exactly; random "
            "streams are reseeded, so samples differ from those of an uninterrupted run, and an iteration holds "
            f"{processes / saved.processes:g} x as many responses unless batch_size is changed.",
            stacklevel=4,
        )
    return saved


def _read(path: Path, engine: bool) -> SavedCheckpoint:
    identity = folders.read_json(path / IDENTITY)
    per_process = load_nested_state(path / PROCESSES)
    return SavedCheckpoint(
        path=path, iteration=_iteration(identity["iteration"]), processes=len(per_process), identity=identity,
        per_process=per_process, shared=load_nested_state(path / LOOP), weights={} if engine else _weights(path),
        optimizer={} if engine else load_nested_state(path / OPTIMIZER),
    )  # fmt: skip


def _read_format_1(path: Path, engine: bool) -> SavedCheckpoint:
    """Format 1: optimizer and random states by `torch.save`, everything else in `state.json`."""
    state = folders.read_json(path / IDENTITY)
    running = {name: torch.tensor(value) for name, value in state["running"].items()}
    shared = {name: state[name] for name in ("kl_controller", "update", "prompts")} | {"running": running}
    shared["best"] = {"best": state["best"], "points": []}
    if state["lr_scheduler"] is not None:
        shared["lr_scheduler"] = state["lr_scheduler"]
    files = sorted(path.glob("rng-*.pt"), key=lambda file: int(file.stem.removeprefix("rng-")))
    per_process = [{"random": _load_pickled(file)} for file in files]
    return SavedCheckpoint(
        path=path, iteration=_iteration(state["iteration"]), processes=len(per_process), shared=shared,
        per_process=per_process, weights={} if engine else _weights(path),
        optimizer={} if engine else _load_pickled(path / "optimizer.pt"),
    )  # fmt: skip


def _weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path / MODEL)
    except SafetensorError as error:
        raise DamagedFileError(f"{MODEL} holds no weights ({error})") from error


def _load_pickled(path: Path) -> Any:
    """Load a pickled file of format 1 with `weights_only`: tensors and plain containers."""
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise DamagedFileError(f"{path.name} holds no tensors ({str(error).splitlines()[0]})") from error


def _iteration(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise DamagedFileError(f"{IDENTITY} gives the iteration {value!r}")
    return value
