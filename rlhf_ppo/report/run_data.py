"""Read a run folder for the report; unreadable parts become notes instead of errors."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_ppo.loop.run_folder import Estimates, RunFolder, RunFolderError, Sample, TokenTrace

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Contents of a run folder; missing parts are empty."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    before: Estimates
    after: Estimates
    samples: list[Sample]
    tokens: list[TokenTrace]
    model_folder: str
    """Subfolder that `from_pretrained` can load; "" if there is none."""
    notes: list[str]
    """One sentence for each part that could not be read."""


def read_run(run: RunFolder) -> RunData:
    """Read all parts of the folder; an unreadable part is empty and has a note."""
    notes: list[str] = []

    def read_or_note(read: Callable[[], T], empty: T) -> T:
        try:
            return read()
        except (RunFolderError, OSError) as error:
            notes.append(str(error))
            return empty

    no_estimates: dict[str, Estimates] = {}
    unreadable: Counter[str] = Counter()
    evaluation = read_or_note(run.evaluation, no_estimates)
    data = RunData(
        name=run.path.resolve().name,
        config=read_or_note(run.config, {}),
        metrics=read_or_note(lambda: run.metrics(unreadable), []),
        before=evaluation.get("before", {}),
        after=evaluation.get("after", {}),
        samples=read_or_note(lambda: run.samples(unreadable), []),
        tokens=read_or_note(lambda: run.tokens(unreadable), []),
        model_folder=_model_folder(run),
        notes=notes,
    )
    for name, count in unreadable.items():
        notes.append(f"{count} of the lines in {name} could not be read and were skipped.")
    return data


def _model_folder(run: RunFolder) -> str:
    """Name of the first subfolder with weights, "model" before others."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_model.safetensors")
    folders = sorted((path for path in run.path.iterdir() if path.is_dir()), key=lambda p: (p.name != "model", p.name))
    return next((folder.name for folder in folders if any((folder / name).exists() for name in weights)), "")
