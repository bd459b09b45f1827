"""Two machines, each with its own `accelerate launch` and launch file: here both are this one."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.distributed import scenario as scenarios
from tests.distributed.comparing import TOLERANCE, alone, worst
from tests.distributed.launching import ROOT, free_port, launch
from tests.distributed.scenario import Outcome, Scenario

pytestmark = [pytest.mark.distributed]


def test_two_machines_take_the_steps_of_one_process(tmp_path: Path) -> None:
    """The shipped files, told only where machine 0 is and that each has one process without a GPU."""
    scenario = Scenario(shares=(5, 4))
    changes = ("--num_processes", "2", "--mixed_precision", "no", "--main_process_ip", "127.0.0.1")
    changes += ("--main_process_port", free_port())
    arguments = (scenarios.__file__, json.dumps([asdict(scenario)]), str(tmp_path))

    def machine(rank: int) -> str:
        file = str(ROOT / "recipes" / "launch" / f"multi_node_{rank}.yaml")
        return launch(("-m", "accelerate.commands.launch", "--config_file", file, *changes, *arguments))

    with ThreadPoolExecutor() as machines:
        list(machines.map(machine, range(2)))
    outcomes = [Outcome(**torch.load(tmp_path / f"0-{rank}.pt", weights_only=False)) for rank in range(2)]
    what, difference = worst(alone(scenario), outcomes)
    assert difference <= TOLERANCE, f"{what} differs by {difference:.2g}"
