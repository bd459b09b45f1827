"""Keep the best model by held-out evaluation, and models on the Pareto frontier of a measure against KL."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ppo.checkpoints import folders


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """Held-out evaluation of the model of one iteration."""

    iteration: int
    measure: float
    """Mean of the measure to maximize."""
    kl: float
    """Mean KL to the reference, nats per response, to minimize."""


def pareto_frontier(points: Sequence[EvaluatedModel]) -> list[EvaluatedModel]:
    """The points that no other beats in both KL and measure, sorted by KL; the measure rises, too."""
    kept: list[EvaluatedModel] = []
    for point in sorted(points, key=lambda point: (point.kl, -point.measure, point.iteration)):
        if not kept or point.measure > kept[-1].measure:
            kept.append(point)
    return kept


def thin_frontier(points: Sequence[EvaluatedModel], max_points: int) -> list[EvaluatedModel]:
    """Reduce a frontier to `max_points`, each time dropping the point that costs the least area under it.

    The point of the highest measure is dropped last, the one of the lowest KL before it.
    """
    kept = list(points)
    while len(kept) > max(max_points, 0):
        areas = [
            (after.kl - here.kl) * (here.measure - before.measure)
            for before, here, after in zip(kept, kept[1:], kept[2:], strict=False)
        ]
        del kept[areas.index(min(areas)) + 1 if areas else 0]
    return kept


@dataclass
class BestModels:
    """Keeps `best/`, `frontier/iteration-<n>/` and `frontier.json` in a run folder.

    Args:
        folder: Run folder; None: no model is saved, only the evaluations are recorded.
        measure: Name of the measure in the evaluation.
        max_reference_kl: KL limit for the best model; None: no limit.
        save: Saves the current model into a folder; every process calls it.
    """

    folder: Path | None
    measure: str
    frontier_size: int
    max_reference_kl: float | None
    save: Callable[[Path], object]
    is_main_process: bool
    best: float | None = None
    """Measure of the best model."""
    evaluated: list[EvaluatedModel] = field(default_factory=list)
    """All evaluated models."""
    frontier: list[EvaluatedModel] = field(default_factory=list)
    """The models in `frontier/`, sorted by KL."""

    def recover(self) -> None:
        """Restore `best/` if a killed run had only half replaced it. Call it under `lock_run_folder`."""
        if self.folder is not None and self.is_main_process:
            folders.recover_replaced_folder(self.folder / "best")

    def consider(self, iteration: int, summary: Mapping[str, Mapping[str, float]], *, is_eligible: bool = True) -> None:
        """Save the current model if its evaluation makes it the best (and it is eligible) or puts it on the frontier.

        Nothing is considered if the evaluation has no response, or if only earlier ones had the measure.

        Raises:
            ValueError: The first evaluation has no such measure.
        """
        if self.measure not in summary:
            if not summary or self.evaluated:
                return
            raise ValueError(f"keep_best names {self.measure!r}, the evaluation has {sorted(summary)}")
        kl = summary["kl"]["mean"] if "kl" in summary else 0.0  # without a reference there is no KL
        point = EvaluatedModel(iteration=iteration, measure=summary[self.measure]["mean"], kl=kl)
        if not (math.isfinite(point.measure) and math.isfinite(point.kl)):
            return  # nothing was scored
        may_be_best = is_eligible and (self.max_reference_kl is None or point.kl <= self.max_reference_kl)
        if may_be_best and (self.best is None or point.measure > self.best):
            self.best = point.measure
            self._write("best")
        self.evaluated.append(point)
        self.frontier = thin_frontier(pareto_frontier([*self.frontier, point]), self.frontier_size)
        if point in self.frontier:
            self._write(f"frontier/iteration-{iteration}")
        self._update_frontier_files()

    def state_dict(self) -> dict[str, Any]:
        """The best measure and all evaluated models."""
        points = [asdict(point) | {"kept": point in self.frontier} for point in self.evaluated]
        return {"best": self.best, "points": points}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best = None if state["best"] is None else float(state["best"])
        points = [(bool(point["kept"]), _evaluated(point)) for point in state["points"]]
        self.best, self.evaluated = best, [point for _, point in points]
        self.frontier = sorted((point for kept, point in points if kept), key=lambda point: point.kl)

    def _write(self, name: str) -> None:
        """Save the current model atomically: into a temporary folder, flushed, then renamed."""
        if self.folder is None:
            return
        final = self.folder / name
        partial = final.with_name(f".{final.name}.partial")
        if self.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
        self.save(partial)
        if self.is_main_process:
            for path in (*partial.rglob("*"), partial):
                folders.flush(path)
            folders.replace_folder(partial, final)

    def _update_frontier_files(self) -> None:
        """Delete models that left the frontier, and write `frontier.json`."""
        if self.folder is None or not self.is_main_process:
            return
        names = {f"iteration-{point.iteration}" for point in self.frontier}
        for path in (self.folder / "frontier").glob("iteration-*"):
            if path.name not in names:
                folders.remove_folder(path)
        optimal = pareto_frontier(self.evaluated)
        rows = [
            asdict(point) | {"on_frontier": point in optimal, "kept": point in self.frontier}
            for point in self.evaluated
        ]
        folders.write_json(self.folder / "frontier.json", {"measure": self.measure, "evaluations": rows})


def _evaluated(state: Mapping[str, Any]) -> EvaluatedModel:
    return EvaluatedModel(
        iteration=int(state["iteration"]), measure=float(state["measure"]), kl=float(state["kl"])
    )  # fmt: skip
