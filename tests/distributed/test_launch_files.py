"""Every launch file under recipes/launch is one that Accelerate reads, and says what its name says."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.distributed import scenario
from tests.distributed.comparing import TOLERANCE, alone, together, worst
from tests.distributed.launching import ROOT, launch_file
from tests.distributed.scenario import FSDP2, Scenario

FOLDER = ROOT / "recipes" / "launch"
KINDS = {
    "cpu": ("NO", 1), "cpu_2": ("MULTI_GPU", 2), "gpu": ("NO", 1), "ddp": ("MULTI_GPU", 8), "fsdp2": ("FSDP", 8),
    "fsdp2_offload": ("FSDP", 8), "fsdp2_cpu": ("FSDP", 2),
    "multi_node_0": ("MULTI_GPU", 16), "multi_node_1": ("MULTI_GPU", 16),
} | {f"zero{stage}{suffix}": ("DEEPSPEED", 8) for stage in (1, 2, 3) for suffix in ("", "_offload")}  # fmt: skip


def test_there_is_a_line_here_for_every_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name: str) -> None:
    path: Path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kind, processes = KINDS[name]
    assert (str(config.distributed_type).removeprefix("DistributedType."), config.num_processes) == (kind, processes)
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[len("zero")])
        wanted = "cpu" if name.endswith("_offload") else "none"
        assert config.deepspeed_config["offload_optimizer_device"] == wanted
        assert config.deepspeed_config["offload_param_device"] == (wanted if name.startswith("zero3") else "none")
        # Both belong to PPOConfig: the engine would divide or clip once more.
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1
        assert "gradient_clipping" not in config.deepspeed_config
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_offload_params"] is name.endswith("_offload")
    assert yaml.safe_load(path.read_text())["main_training_function"] == "main"


def test_no_cpu_file_of_several_processes_asks_for_use_cpu() -> None:
    """With `use_cpu` Accelerate looks for mpirun and, without it, runs one process and says nothing."""
    for name in ("cpu_2", "fsdp2_cpu"):
        assert load_config_from_file(str(FOLDER / f"{name}.yaml")).use_cpu is False


@pytest.mark.parametrize("name", KINDS)
def test_the_launcher_accepts_the_file(name: str) -> None:
    """As far as `accelerate launch` goes before it starts processes: options checked, environment made."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    processes = int(arguments.num_processes)
    assert processes == KINDS[name][1]
    if KINDS[name][0] == "DEEPSPEED":
        arguments.deepspeed_fields_from_accelerate_config = ""  # launch_command sets it
        _, environment = prepare_deepspeed_cmd_env(arguments)
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[len("zero")]
    elif processes > 1:
        environment = prepare_multi_gpu_env(arguments)
        assert (
            environment["ACCELERATE_MIXED_PRECISION"]
            == load_config_from_file(str(FOLDER / f"{name}.yaml")).mixed_precision
        )
        assert environment.get("ACCELERATE_USE_FSDP", "false") == str(KINDS[name][0] == "FSDP").lower()
        if KINDS[name][0] == "FSDP":
            assert environment["FSDP_VERSION"] == "2"
            assert {name: environment[name] for name in FSDP2} == FSDP2, "the tests run what the launcher says"


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:KL divergence is starting to become negative")
@pytest.mark.parametrize("name", ["cpu", "gpu", "fsdp2", "fsdp2_cpu"])
def test_what_the_file_launches_takes_the_steps_of_one_process(name: str, tmp_path: Path) -> None:
    """On the CPU, two processes where the file means several. DDP, ZeRO and machines: test_parity, test_zero, ..."""
    processes = min(2, KINDS[name][1])
    case = Scenario(shares=(5, 4) if processes == 2 else (9,), rows_of_a_pass=2)
    outcomes = together({name: case}, tmp_path, file=name)[name]
    assert [outcome.parted > 0 for outcome in outcomes] == [KINDS[name][0] == "FSDP"] * processes
    what, difference = worst(alone(case), outcomes)
    assert difference <= TOLERANCE, f"{what} differs by {difference:.2g}"


@pytest.mark.distributed
def test_what_needs_a_gpu_says_so_where_there_is_none(tmp_path: Path) -> None:
    wishes = json.dumps([{"shares": [5, 4]}])
    said = launch_file("fsdp2_offload", Path(scenario.__file__), wishes, str(tmp_path), expect=1)
    assert "FSDP2's offload pins memory for an accelerator, and there is none" in said


def test_the_files_of_two_machines_differ_in_nothing_but_the_machine() -> None:
    first, second = (yaml.safe_load((FOLDER / f"multi_node_{rank}.yaml").read_text()) for rank in range(2))
    assert [first.pop("machine_rank"), second.pop("machine_rank")] == [0, 1]
    assert first == second


def test_the_slurm_script_launches_once_on_each_machine(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands: what each machine would run, options of the recipe with spaces included."""
    for name, script in {
        "scontrol": "echo first-host; echo second-host",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'printf "<%s>" "$@"; echo',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "host[1-2]",
        "SLURM_NNODES": "2", "SLURM_JOB_ID": "41", "GPUS_PER_NODE": "4",
    }  # fmt: skip
    command = ["bash", str(FOLDER / "slurm.sh"), "--output-dir", "a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [f"<--machine_rank><{rank}>" in line for rank, line in enumerate(lines)] == [True, True]
    for line in lines:
        assert "<--num_machines><2><--num_processes><8>" in line
        assert "<--main_process_ip><first-host><--main_process_port><20041>" in line
        assert line.endswith("<recipes/ppo_gpt2_sentiment.py><--output-dir><a b>")
