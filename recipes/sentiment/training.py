"""What the recipes' own training has in common: threads, batches, precision, and steps that are kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.loop.signals import EXIT_RESUMABLE, stop_on_signals
from rlhf_ppo.utils.progress import ProgressBar

from .command_line import leave

MOST_THREADS = 8
"""The products of a small model are too small for more."""
SHARES = 25
"""Parts of a training after each of which it is saved: a killed one repeats at most 4 %."""


def use_threads(requested: int | None = None) -> None:
    """Compute with so many threads; by default with this process's share of the cores.

    `OMP_NUM_THREADS` is not asked: `accelerate launch` sets it to 1 by itself.

    Raises:
        ValueError: When fewer than one thread is requested.
    """
    if requested is not None and requested < 1:
        raise ValueError(f"At least one thread is needed, got {requested}. Leave the number out to use all cores.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    torch.set_num_threads(requested or max(1, min(cores // processes, MOST_THREADS)))


def batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of rows without end, each pass in a new order; what is left of a pass is dropped."""
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for begin in range(0, len(rows) - size + 1, size):
            yield rows[order[begin : begin + size]]


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 if the device computes with it; a CPU that only imitates it would be slower."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bool(torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()


def train_steps(
    name: str,
    step: Callable[[int, Tensor], Tensor],
    data: Iterator[Tensor],
    *,
    steps: int,
    parts: Mapping[str, Any],
    kept: Path,
) -> None:
    """Take the steps that are left of a training, and keep its state every few of them.

    A signal ends the process after the step that runs; one more does so at once. Killed or stopped, the training goes
    on from its last state and ends with the same weights.

    Args:
        name: Before the bar and in the line about a signal.
        step: Learns from a batch as step number so and so; returns the loss.
        data: The batches of all steps from the first on; those of finished steps are passed over.
        steps: How many there are in all.
        parts: Everything that a step changes, by name: each with `state_dict` and `load_state_dict`.
        kept: Folder of the state.
    """
    file = kept / "state.pt"
    first = _restore(file, parts)
    every = max(1, steps // SHARES)
    smoothed = math.nan
    bar = ProgressBar(total=steps, initial=first, desc=name, unit="step", mininterval=1.0)
    with bar, stop_on_signals() as request:
        for index, rows in zip(range(first, steps), islice(data, first, None)):  # noqa: B905  the data may have no end
            loss = step(index, rows)
            bar.update()
            if index % 10 == 0:
                value = loss.item()
                smoothed = value if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * value
                bar.set_postfix(perplexity=f"{math.exp(min(smoothed, 20.0)):.0f}", refresh=False)
            if request.is_set or (index + 1) % every == 0 or index + 1 == steps:
                _keep(file, index + 1, parts)
            if request.is_set:
                break
    if request.is_set:
        line = (
            f"Stopped by {request.signal_name} after step {index + 1} of {steps} of the {name.lower()}, which is kept"
        )
        leave(f"{line}; the same command goes on.", EXIT_RESUMABLE, None)


def _keep(file: Path, done: int, parts: Mapping[str, Any]) -> None:
    """Replace the state on disk: a reader sees the one before or this one."""
    file.parent.mkdir(exist_ok=True)
    aside = file.with_suffix(".aside")
    torch.save({"done": done, "parts": {name: part.state_dict() for name, part in parts.items()}}, aside)
    aside.replace(file)


def _restore(file: Path, parts: Mapping[str, Any]) -> int:
    """Put the kept state back; the number of finished steps."""
    if not file.is_file():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return int(state["done"])
