"""Two processes are one process on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.support.patience import PATIENCE

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")


def run(base: Path, output: Path, *, processes: int, micro_batch_size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    arguments = [str(WORKER), str(base), str(output), str(micro_batch_size)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    content: dict[str, Any] = torch.load(f"{output}.pt")
    return content


@pytest.mark.distributed
def test_two_processes_take_the_same_steps_as_one(tiny_base: Path, tmp_path: Path) -> None:
    """Weighted pairs and ties: loss and gradient of every step agree to 1e-5, whatever the cut into micro-batches."""
    one = run(tiny_base, tmp_path / "one", processes=1, micro_batch_size=16)
    accumulated = run(tiny_base, tmp_path / "accumulated", processes=1, micro_batch_size=4)
    two = run(tiny_base, tmp_path / "two", processes=2, micro_batch_size=4)
    assert len(one["gradients"]) == 4
    for other in (accumulated, two):
        assert_close(other["losses"], one["losses"], atol=1e-5, rtol=0)
        for found, expected in zip(other["gradients"], one["gradients"], strict=True):
            assert_close(found, expected, atol=1e-5, rtol=0)
        assert_close(other["metrics"], one["metrics"], atol=1e-4, rtol=0)
