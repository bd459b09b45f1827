"""Everything a report needs of a run folder, read once; what cannot be read becomes a sentence, not a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_ppo.loop.run_folder import Estimates, RunFolder, RunFolderError, Sample, TokenTrace

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run folder holds; missing parts are empty."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    before: Estimates
    after: Estimates
    samples: list[Sample]
    tokens: list[TokenTrace]
    model_folder: str
    """Folder inside the run folder that `from_pretrained` can load; "" if there is none."""
    notes: list[str]
    """What could not be read, one sentence each."""


def read_run(run: RunFolder) -> RunData:
    """Read every part of the folder; a part that cannot be read is empty and has a note."""
    notes: list[str] = []

    def part(read: Callable[[], T], empty: T) -> T:
        try:
            return read()
        except (RunFolderError, OSError) as error:
            notes.append(str(error))
            return empty

    no_estimates: dict[str, Estimates] = {}
    no_counts: dict[str, int] = {}
    evaluation = part(run.evaluation, no_estimates)
    data = RunData(
        name=run.path.resolve().name,
        config=part(run.config, {}),
        metrics=part(run.metrics, []),
        before=evaluation.get("before", {}),
        after=evaluation.get("after", {}),
        samples=part(run.samples, []),
        tokens=part(run.tokens, []),
        model_folder=_model_folder(run),
        notes=notes,
    )
    for name, count in part(run.unreadable_lines, no_counts).items():
        notes.append(f"{count} of the lines in {name} could not be read and were passed over.")
    return data


def _model_folder(run: RunFolder) -> str:
    """The first folder with weights in it, "model" before all others."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_model.safetensors")
    folders = sorted((path for path in run.path.iterdir() if path.is_dir()), key=lambda p: (p.name != "model", p.name))
    return next((folder.name for folder in folders if any((folder / name).exists() for name in weights)), "")
