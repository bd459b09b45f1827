"""Two processes take the steps of one: every statistic and every weight, whoever sampled which row."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import scenario as scenarios
from tests.distributed.launching import torchrun
from tests.distributed.scenario import Outcome, Scenario

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:No dataset is provided"),
    pytest.mark.filterwarnings("ignore:KL divergence is starting to become negative"),
    pytest.mark.filterwarnings("ignore:The average ratio of batch"),
    pytest.mark.filterwarnings("ignore:Skipped a minibatch"),
]

TOLERANCE = 1e-5
LOCAL = ("time/", "work/")


def alone(scenario: Scenario) -> Outcome:
    """The scenario on one process: the same rows, and as many of them in an optimiser step."""
    processes = len(scenario.shares)
    return scenarios.run(
        replace(
            scenario,
            shares=(sum(scenario.shares),),
            passes_of_a_step=scenario.passes_of_a_step * processes,
            sabotage=None,
            zero_stage=0,
        )
    )


def together(scenarios_: dict[str, Scenario], folder: Path) -> dict[str, list[Outcome]]:
    """Scenarios on as many processes as they have shares, in one start; one outcome a process."""
    first = next(iter(scenarios_.values()))
    ranks = range(len(first.shares))
    wishes = json.dumps([asdict(scenario) for scenario in scenarios_.values()])
    torchrun(len(ranks), Path(scenarios.__file__), wishes, str(folder), timeout=200, use_cpu=not first.zero_stage)
    return {
        name: [Outcome(**torch.load(folder / f"{number}-{rank}.pt", weights_only=False)) for rank in ranks]
        for number, name in enumerate(scenarios_)
    }


def differences(one: Outcome, other: Outcome) -> dict[str, float]:
    """How far apart two outcomes are, statistic by statistic and weight by weight; relative above 1."""
    found = {name: distance(value, other.parameters[name]) for name, value in one.parameters.items()}
    for step, (row, compared) in enumerate(zip(one.statistics, other.statistics, strict=True)):
        assert row.keys() == compared.keys()
        for name in row:
            if not name.startswith(LOCAL):
                found[f"{step} {name}"] = distance(ordered(name, row[name]), ordered(name, compared[name]))
    return found | {"kl_coef": abs(one.kl_coef - other.kl_coef)}


def distance(one: Any, other: Any) -> float:
    """Largest |a - b| / max(1, |a|); nan equals nan, inf equals inf."""
    first, second = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape:
        return float("inf")
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(first - second) / np.maximum(1.0, np.abs(first)))
    return float("inf") if np.isnan(gap).any() else float(gap.max(initial=0.0))


def ordered(name: str, value: Any) -> Any:
    """Probability ratios come in the order of the passes, which depends on the processes."""
    return np.sort(value) if name == "ppo/policy/ratio" else value


def worst(expected: Outcome, outcomes: list[Outcome]) -> tuple[str, float]:
    """What differs most between one process and several, after the processes were found to agree."""
    for other in outcomes[1:]:
        assert max(differences(outcomes[0], other).values()) == 0.0
        assert other.passes == outcomes[0].passes
    return max(differences(expected, outcomes[0]).items(), key=lambda item: item[1])


EVERYTHING_GLOBAL = {
    "use_score_scaling": True, "use_score_norm": True, "score_clip": 2.0, "whiten_rewards": True, "max_grad_norm": 0.5,
    "init_kl_coef": 0.05, "horizon": 50.0, "ent_coef": 0.01,
}  # fmt: skip
CASES = {
    "odd number of rows, the last minibatch leaves one process without work": Scenario(shares=(5, 4)),
    "gradient accumulation": Scenario(shares=(5, 4), rows_of_a_pass=1, passes_of_a_step=2),
    "one process holds almost everything": Scenario(shares=(8, 1)),
    "whitening, moments, clipping, controller, entropy": Scenario(shares=(5, 4), settings=EVERYTHING_GLOBAL),
    "cut by tokens": Scenario(shares=(5, 4), settings={"token_budget": 24}),
    "every step skipped by the ratio guard": Scenario(shares=(5, 4), settings={"ratio_threshold": 0.5}),
    "early stop": Scenario(
        shares=(5, 4), learning_rate=3e-3, settings={"early_stopping": True, "target_kl": 1e-4}
    ),
    "a score that overflows the loss": Scenario(shares=(5, 4), broken_row=True),
    "KL penalty whose weight adapts": Scenario(shares=(5, 4), algorithm="penalty"),
    "no critic": Scenario(shares=(6, 2), algorithm="rloo", group_size=2),
    "GPT-2": Scenario(shares=(5, 4), model="gpt2", learning_rate=0.01),
    "gradient checkpointing": Scenario(shares=(5, 4), settings={"gradient_checkpointing": True}),
}  # fmt: skip


SABOTAGE = {what: Scenario(shares=(5, 4), sabotage=what, settings=EVERYTHING_GLOBAL) for what in ("count", "whitening")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Every scenario on two processes."""
    return together(CASES | SABOTAGE, tmp_path_factory.mktemp("outcomes"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    what, difference = worst(alone(CASES[name]), outcomes[name])
    print(f"{name}: {difference:.1e} ({what})")
    assert difference <= TOLERANCE, f"{what} differs by {difference:.2g}"


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_the_comparison_notices_what_is_local_instead_of_global(
    sabotage: str, outcomes: dict[str, list[Outcome]]
) -> None:
    """Dividing by a process's own tokens is the classic mistake: short responses would weigh more."""
    _, difference = worst(alone(SABOTAGE[sabotage]), outcomes[sabotage])
    assert difference > 100 * TOLERANCE


def test_the_guards_really_acted(outcomes: dict[str, list[Outcome]]) -> None:
    """Otherwise the scenarios above would compare nothing of them."""

    def total(name: str, statistic: str) -> float:
        return sum(row[statistic] for row in outcomes[name][1].statistics)

    assert total("every step skipped by the ratio guard", "ppo/updates_skipped") == 18
    assert total("a score that overflows the loss", "ppo/updates_skipped") == 6
    assert 0 < total("early stop", "ppo/stopped_early") <= 3
    odd = outcomes["odd number of rows, the last minibatch leaves one process without work"][1]
    assert {1, 2} == set(odd.passes)
