"""Which models are kept by their held-out evaluation: the best within the KL budget, and the frontier."""

import json
import math
from pathlib import Path

import pytest

from rlhf_ppo.checkpoints.best import BestModels, EvaluatedModel, pareto_frontier, thin_frontier


def points(*pairs: tuple[float, float]) -> list[EvaluatedModel]:
    """(KL, measure) of iterations 1, 2, ..."""
    return [EvaluatedModel(iteration=number, measure=high, kl=low) for number, (low, high) in enumerate(pairs, start=1)]


def numbers(found: list[EvaluatedModel]) -> list[int]:
    return [point.iteration for point in found]


def test_the_frontier_is_what_no_other_model_beats_in_both() -> None:
    """By hand: 2 costs more KL than 1 for less, 4 ties with 3 in measure at more KL."""
    assert numbers(pareto_frontier(points((1, 0.5), (2, 0.4), (3, 0.8), (4, 0.8), (5, 0.9)))) == [1, 3, 5]


def test_thinning_drops_what_costs_least_area_and_the_best_measure_last() -> None:
    """Areas between neighbors: 2 holds (3 - 2)·(0.3 - 0.1) = 0.2, 3 holds (9 - 3)·(0.4 - 0.3) = 0.6."""
    found = points((1, 0.1), (2, 0.3), (3, 0.4), (9, 0.9))
    assert numbers(thin_frontier(found, 3)) == [1, 3, 4]
    assert numbers(thin_frontier(found, 2)) == [1, 4]
    assert numbers(thin_frontier(found, 1)) == [4]
    assert thin_frontier(found, 0) == []


def keeper(folder: Path, *, most: int = 2, max_reference_kl: float | None = None) -> BestModels:
    """Saves a model as a file that says which evaluation it stood before."""
    made: list[Path] = []

    def save(path: Path) -> None:
        made.append(path)
        path.mkdir(parents=True)
        (path / "model").write_text(str(len(made)))

    return BestModels(
        folder=folder, measure="score", frontier_size=most, max_reference_kl=max_reference_kl, save=save,
        is_main_process=True,
    )  # fmt: skip


def summary(score: float, kl: float) -> dict[str, dict[str, float]]:
    return {"score": {"mean": score}, "kl": {"mean": kl}}


def test_the_best_model_within_the_budget_and_a_thinned_frontier_are_on_disk(tmp_path: Path) -> None:
    own = keeper(tmp_path, max_reference_kl=5.0)
    for iteration, (kl, score) in enumerate([(1, 0.1), (2, 0.3), (3, 0.2), (4, 0.4), (9, 0.9)], start=1):
        own.consider(iteration, summary(score, kl))
    assert own.best == 0.4  # 0.9 lies beyond the budget
    assert sorted(path.name for path in (tmp_path / "frontier").iterdir()) == ["iteration-1", "iteration-5"]
    rows = json.loads((tmp_path / "frontier.json").read_text())["evaluations"]
    assert [row["on_frontier"] for row in rows] == [True, True, False, True, True]
    assert not list(tmp_path.rglob(".*"))  # nothing unfinished is left


def test_an_evaluation_in_which_nothing_was_scored_is_no_best(tmp_path: Path) -> None:
    own = keeper(tmp_path)
    own.consider(1, summary(math.nan, 1.0))
    own.consider(2, {})  # every episode failed
    assert own.best is None
    assert not (tmp_path / "best").exists()


def test_a_best_model_whose_replacement_was_killed_between_two_renames_is_put_back(tmp_path: Path) -> None:
    keeper(tmp_path).consider(1, summary(0.1, 1.0))
    (tmp_path / "best").rename(tmp_path / ".best.removed")
    again = keeper(tmp_path)
    assert not (tmp_path / "best").exists()  # another run may be at it
    again.recover()
    assert (tmp_path / "best" / "model").is_file()


def test_a_measure_that_the_evaluation_does_not_have_is_an_error_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_best names 'score', the evaluation has \['kl'\]"):
        keeper(tmp_path).consider(1, {"kl": {"mean": 1.0}})
