"""The best model by held-out evaluation, and the models on the frontier of reward against KL."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ppo.checkpoints import folders


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """One model on the held-out prompts."""

    iteration: int
    measure: float
    """Mean of the measure that is to be high."""
    kl: float
    """Mean KL to the reference, nats a response, that is to be low."""


def pareto_frontier(points: Sequence[EvaluatedModel]) -> list[EvaluatedModel]:
    """Those that no other point beats in both: a higher measure costs more KL from one to the next. By rising KL."""
    kept: list[EvaluatedModel] = []
    for point in sorted(points, key=lambda point: (point.kl, -point.measure, point.iteration)):
        if not kept or point.measure > kept[-1].measure:
            kept.append(point)
    return kept


def thin_frontier(points: Sequence[EvaluatedModel], most: int) -> list[EvaluatedModel]:
    """At most so many points of a frontier: first those go whose loss costs the least area under it.

    The point of the highest measure stays longest, then the one of the lowest KL.
    """
    kept = list(points)
    while len(kept) > max(most, 0):
        areas = [
            (after.kl - here.kl) * (here.measure - before.measure)
            for before, here, after in zip(kept, kept[1:], kept[2:], strict=False)
        ]
        del kept[areas.index(min(areas)) + 1 if areas else 0]
    return kept


@dataclass
class BestModels:
    """Keeps `best/`, `frontier/iteration-<n>/` and `pareto_frontier.json` in a run folder.

    Args:
        folder: None: only the figures are kept.
        measure: Name of the measure in the evaluation.
        most: Models of the frontier on disk.
        max_reference_kl: "Best" means within this KL; None: without a limit.
        save: Writes the present model into a folder; every process calls it.
        is_main_process: Who renames folders.
    """

    folder: Path | None
    measure: str
    most: int
    max_reference_kl: float | None
    save: Callable[[Path], object]
    is_main_process: bool
    best: float | None = None
    points: list[EvaluatedModel] = field(default_factory=list)
    """All that were evaluated."""
    kept: list[EvaluatedModel] = field(default_factory=list)
    """Those in `frontier/`, by rising KL."""

    def recover(self) -> None:
        """Put back what a killed run had half replaced. Only where no other run is at it (`lock_run_folder`)."""
        if self.folder is not None and self.is_main_process:
            folders.recover_replaced_folder(self.folder / "best")

    def take(self, iteration: int, summary: Mapping[str, Mapping[str, float]], *, is_eligible: bool = True) -> None:
        """Look at an evaluation; keep the model if it deserves it. One that is not eligible never becomes the best.

        Raises:
            ValueError: The evaluation has no such measure.
        """
        if self.measure not in summary:
            raise ValueError(f"keep_best names {self.measure!r}, the evaluation has {sorted(summary)}")
        point = EvaluatedModel(iteration=iteration, measure=summary[self.measure]["mean"], kl=summary["kl"]["mean"])
        if not (math.isfinite(point.measure) and math.isfinite(point.kl)):
            return  # nothing was scored
        within = is_eligible and (self.max_reference_kl is None or point.kl <= self.max_reference_kl)
        if within and (self.best is None or point.measure > self.best):
            self.best = point.measure
            self._write("best")
        self.points.append(point)
        self.kept = thin_frontier(pareto_frontier([*self.kept, point]), self.most)
        if point in self.kept:
            self._write(f"frontier/iteration-{iteration}")
        self._tidy()

    def state_dict(self) -> dict[str, Any]:
        """The best measure and every point."""
        points = [asdict(point) | {"kept": point in self.kept} for point in self.points]
        return {"best": self.best, "points": points}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on comparing with what was found before."""
        best = None if state["best"] is None else float(state["best"])
        known = [(bool(point["kept"]), _evaluated(point)) for point in state["points"]]
        self.best, self.points = best, [point for _, point in known]
        self.kept = sorted((point for kept, point in known if kept), key=lambda point: point.kl)

    def _write(self, name: str) -> None:
        """Save aside, flush, rename: a reader never meets half a model."""
        if self.folder is None:
            return
        final = self.folder / name
        aside = final.with_name(f".{final.name}.partial")
        if self.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
        self.save(aside)
        if self.is_main_process:
            for path in (*aside.rglob("*"), aside):
                folders.flush(path)
            folders.replace_folder(aside, final)

    def _tidy(self) -> None:
        """Take away models that are kept no longer, and write down what is known of all."""
        if self.folder is None or not self.is_main_process:
            return
        names = {f"iteration-{point.iteration}" for point in self.kept}
        for path in (self.folder / "frontier").glob("iteration-*"):
            if path.name not in names:
                folders.remove_folder(path)
        on_it = pareto_frontier(self.points)
        rows = [asdict(point) | {"on_frontier": point in on_it, "kept": point in self.kept} for point in self.points]
        folders.write_json(self.folder / "frontier.json", {"measure": self.measure, "evaluations": rows})


def _evaluated(state: Mapping[str, Any]) -> EvaluatedModel:
    return EvaluatedModel(
        iteration=int(state["iteration"]), measure=float(state["measure"]), kl=float(state["kl"])
    )  # fmt: skip
