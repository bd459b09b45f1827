"""The script for a GPU is whole: bfloat16 under autocast, tiny shapes, on whatever device there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import gpu

pytestmark = [pytest.mark.filterwarnings("ignore:No dataset is provided")]


def test_it_runs_dry_and_skips_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--output", str(tmp_path / "gpu.json"), "--sides", "ours", "reward model"]
    gpu.main([*arguments, "--workloads", "gpu-skew"])
    assert capsys.readouterr().out.count("gpu-skew") == 3
    gpu.main([*arguments, "--workloads", "gpu-skew"])
    assert capsys.readouterr().out == ""
    cells = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["gpu-skew"]["cells"]
    assert set(cells) == {"ours, generate", "ours, step", "reward model, score"}
    assert all(cell["samples_per_s"] > 0 for cell in cells.values())
