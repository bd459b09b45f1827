"""The script for a GPU is whole: every cell in small on a CPU, and on a pretended GPU."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.benchmarks import gpu
from tests.support.pretend_cuda import pretend_cuda

SAMPLERS = ("greedy, continuous", "decode, generate", "decode, continuous", "decode, vllm")  # of others, and slow


def names() -> list[str]:
    return [name for name in gpu.Bench(tiny=True).cells() if not name.startswith(SAMPLERS)]


@pytest.mark.slow
def test_every_cell_runs_on_a_cpu_and_finished_ones_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    cells = [name for name in names() if "checkpointing" not in name and "plain head" not in name]
    arguments = ["--tiny", "--output", str(output), "--only", *cells]
    gpu.main([*arguments, "--seconds", "0"])
    assert capsys.readouterr().out == ""
    gpu.main(arguments)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [name for name, cell in found.items() if "error" in cell] == []
    assert set(cells) <= set(found)
    assert found["greedy, loop"] == {"same": True}
    assert found["step, tiny_llama"]["apart_over_moved"] == 0
    capsys.readouterr()
    gpu.main(arguments)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_every_cell_runs_on_a_pretended_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    output = tmp_path / "gpu.json"
    AcceleratorState._reset_state(True)
    with pretend_cuda():
        gpu.main(["--tiny", "--output", str(output), "--only", *names()])
    AcceleratorState._reset_state(True)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert {name: cell for name, cell in found.items() if "error" in cell} == {}
    assert found["step, tiny_llama"]["apart_over_moved"] < 1e-2
    assert found["float16 overflow"]["skipped_steps"] > 0


def test_a_cell_that_fails_is_written_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: gpu.Bench) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu.Bench, "products", refuse)
    gpu.main(["--tiny", "--output", str(tmp_path / "gpu.json"), "--only", "matrix", "greedy, loop"])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["matrix products"]["error"] == "RuntimeError: out of memory"
    assert found["greedy, loop"] == {"same": True}
