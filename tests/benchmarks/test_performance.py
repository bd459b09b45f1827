"""The benchmark itself: its page is made from its files, its sides do the same work, its rounds can be interrupted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ppo.samplers.base import Samples
from tests.benchmarks import generation, table
from tests.benchmarks.plain import PlainTrainer
from tests.benchmarks.ppo import TOLERANCES, differences, prepare
from tests.benchmarks.records import add_rounds
from tests.benchmarks.sides import Ours, Plain
from tests.benchmarks.workloads import WORKLOADS

TINY = WORKLOADS["tiny"]


@pytest.mark.parametrize("path", table.PAGES, ids=lambda path: str(path.parent.name))
def test_the_pages_show_what_the_files_hold(path: Path) -> None:
    """A figure that nobody measured cannot stand there: run `python -m tests.benchmarks.table`."""
    page = path.read_text(encoding="utf-8")
    assert page == table.written(page, table.DOCS / "results")


@pytest.mark.slow
def test_the_plain_path_takes_the_step_of_the_fast_one(tmp_path: Path) -> None:
    """Statistics, log-probabilities and every parameter: the fast path is only faster."""
    task = prepare(TINY, tmp_path)
    results = []
    for number, side in enumerate((Ours(task, {}), Plain(task, {}))):
        side.step()
        side.save(str(path := tmp_path / f"{number}.pt"))
        results.append(torch.load(path))
    start = {f"pretrained_model.{name}": value for name, value in TINY.model().state_dict().items()}
    gaps = differences(results[0], results[1], start)
    assert all(gaps[name] <= limit for name, limit in TOLERANCES.items()), gaps
    assert any(bool((value != start[name]).any()) for name, value in results[0]["parameters"].items() if name in start)


@pytest.mark.slow
def test_the_comparison_notices_another_step(tmp_path: Path) -> None:
    task = prepare(TINY, tmp_path)
    results = []
    for number, options in enumerate(({}, {"learning_rate": 2e-5})):
        side = Ours(task, options)
        side.step()
        side.save(str(path := tmp_path / f"{number}.pt"))
        results.append(torch.load(path))
    start = {f"pretrained_model.{name}": value for name, value in TINY.model().state_dict().items()}
    assert differences(results[0], results[1], start)["change"] > TOLERANCES["change"]


def test_both_ways_of_decoding_give_the_forced_lengths() -> None:
    workload = replace(TINY, lengths_are="even", rows=6, cap=12)
    model = workload.model()
    sides: list[Any] = [generation.by_loop(model, workload), generation.by_generate(model, workload)]
    found = [side.responses if isinstance(side, Samples) else side for side in sides]
    assert [len(response) for response in found[0]] == workload.lengths() == [len(response) for response in found[1]]


def test_rounds_go_on_where_they_stopped_and_never_mix(tmp_path: Path) -> None:
    path, seen = tmp_path / "rounds.json", []

    def one_round(number: int) -> dict[str, Any]:
        if number == 2 and len(seen) == 2:
            seen.append(-1)
            raise KeyboardInterrupt
        seen.append(number)
        return {"number": number}

    with pytest.raises(KeyboardInterrupt):
        add_rounds(path, TINY, one_round, rounds=3, ours={})
    add_rounds(path, TINY, one_round, rounds=3, ours={})
    rounds = json.loads(path.read_text(encoding="utf-8"))["tiny"]["rounds"]
    assert [row["number"] for row in rounds] == [0, 1, 2] and seen == [0, 1, -1, 2]
    with pytest.raises(ValueError, match="another ours"):
        add_rounds(path, TINY, one_round, rounds=4, ours={"ppo_epochs": 1})


def test_the_plain_path_is_the_classic_s_inner_methods() -> None:
    """It overrides the step alone, so that it shares no shortcut with it."""
    assert {name for name in vars(PlainTrainer) if not name.startswith("__")} == {"learn", "_minibatch_step"}
