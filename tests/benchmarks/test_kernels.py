"""Each fast path can be switched off by itself, and then its plain twin computes the same."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks.ppo import TOLERANCES, differences, prepare
from tests.benchmarks.sides import Ours
from tests.benchmarks.switches import SWITCHES
from tests.benchmarks.workloads import WORKLOADS

IN_FLOAT32 = [name for name, switch in SWITCHES.items() if switch.equal and "cpu-bf16" not in switch.workloads[:1]]
"""tests/kernels holds each fast path to its twin; here each is switched off as the measurement does it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in IN_FLOAT32 if name != "unpadded"])
def test_a_fast_path_off_takes_the_same_step(name: str, tmp_path: Path) -> None:
    """Statistics, log-probabilities and every parameter."""
    switch = SWITCHES[name]
    workload = replace(WORKLOADS["tiny"], model_type="gpt2" if name == "gelu" else "llama")
    task = prepare(workload, tmp_path)
    results = []
    for settings, place in (({}, nullcontext()), (switch.settings, switch.off())):
        with place:
            side = Ours(task, settings)
            side.prove()
            side.step()
        side.save(str(path := tmp_path / f"{len(results)}.pt"))
        results.append(torch.load(path))
    start = {f"pretrained_model.{name}": value for name, value in workload.model().state_dict().items()}
    gaps = differences(results[0], results[1], start)
    assert all(gaps[what] <= limit for what, limit in TOLERANCES.items()), gaps
