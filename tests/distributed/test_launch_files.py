"""Every launch file under recipes/launch is one that Accelerate reads, and says what its name says."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.distributed.launching import ROOT

FOLDER = ROOT / "recipes" / "launch"
KINDS = {
    "cpu": ("NO", 1), "cpu_2": ("MULTI_GPU", 2), "gpu": ("NO", 1), "ddp": ("MULTI_GPU", 8), "fsdp2": ("FSDP", 8),
    "zero1": ("DEEPSPEED", 8), "zero2": ("DEEPSPEED", 8), "zero3": ("DEEPSPEED", 8),
}  # fmt: skip


def test_there_is_a_line_here_for_every_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name: str) -> None:
    path: Path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kind, processes = KINDS[name]
    assert (str(config.distributed_type).removeprefix("DistributedType."), config.num_processes) == (kind, processes)
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name.removeprefix("zero"))
        # Both belong to PPOConfig: the engine would divide or clip once more.
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1
        assert "gradient_clipping" not in config.deepspeed_config
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    assert yaml.safe_load(path.read_text())["main_training_function"] == "main"


def test_no_cpu_file_of_several_processes_asks_for_use_cpu() -> None:
    """With `use_cpu` Accelerate looks for mpirun and, without it, runs one process and says nothing."""
    assert load_config_from_file(str(FOLDER / "cpu_2.yaml")).use_cpu is False
