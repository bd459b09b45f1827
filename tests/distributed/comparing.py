"""One process against several: how to run a scenario both ways, and how far apart the outcomes are."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.distributed import scenario as scenarios
from tests.distributed.launching import launch_file
from tests.distributed.scenario import Outcome, Scenario

TOLERANCE = 3e-5
"""Rounding, which Adam carries on: below 1e-5 on one processor; on another 1.9e-5 after two optimizer steps of LoRA."""
LOCAL = ("time/", "work/")


def alone(scenario: Scenario) -> Outcome:
    """The scenario on one process: the same rows, and as many of them in an optimizer step."""
    processes = len(scenario.shares)
    return scenarios.run(
        replace(
            scenario,
            shares=(sum(scenario.shares),),
            passes_of_a_step=scenario.passes_of_a_step * processes,
            sabotage=None,
            fsdp=False,
        )
    )


def together(scenarios_: dict[str, Scenario], folder: Path, *, file: str = "ddp") -> dict[str, list[Outcome]]:
    """Scenarios on as many processes as they have shares, in one start by a launch file; one outcome a process.

    Args:
        scenarios_: All of one launch.
        folder: For what the processes say.
        file: Of recipes/launch.
    """
    first = next(iter(scenarios_.values()))
    ranks = range(len(first.shares))
    wishes = json.dumps([asdict(scenario) for scenario in scenarios_.values()])
    launch_file(
        file, Path(scenarios.__file__), wishes, str(folder), processes=len(ranks),
        mixed_precision=first.mixed_precision,
    )  # fmt: skip
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
    "init_kl_coef": 0.05, "horizon": 50.0, "ent_coef": 0.01, "adam_eps": 1e-5,
}  # fmt: skip
"""With its usual 1e-8 Adam would scale up gradients that are nothing but rounding."""
