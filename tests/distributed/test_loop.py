"""The managed loop on two processes: one set of files, exact resumption, and no hang when one process fails."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.checkpoints.nested_state import load_nested_state
from tests.distributed import loop
from tests.distributed.launching import launch

pytestmark = pytest.mark.distributed

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs wrote."""
    path = tmp_path_factory.mktemp("loop")
    loop.trainer().train(loop.share_of_e, replace(loop.unjudged(path / "single"), iterations=2))
    shutil.copytree(path / "single", path / "of one process")
    launch((*TORCHRUN, loop.__file__, "run", str(path), "0"))  # under DDP, then under FSDP2 in fsdp2/
    return path


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, Any]]:
    """What each process ended with."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def parted(folder: Path) -> list[dict[str, Any]]:
    """The same under FSDP2."""
    return [torch.load(folder / "fsdp2" / f"{rank}.pt", weights_only=False) for rank in range(2)]


def untimed(row: dict[str, float]) -> dict[str, float]:
    """Without clocks, and without work: an evaluation before an interruption is not repeated after it."""
    return {name: value for name, value in row.items() if not name.startswith(("time/", "work/"))}


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one_on_every_process(
    outcomes: list[dict[str, Any]],
) -> None:
    for outcome in outcomes:
        for name, expected in outcomes[0]["whole"].items():
            assert torch.equal(outcome["whole"][name], expected), name
            assert torch.equal(outcome["resumed"][name], expected), name


def test_adapters_of_policy_and_critic_resume_exactly_and_start_at_the_reference(folder: Path) -> None:
    ends = [torch.load(folder / f"lora-{rank}.pt", weights_only=False) for rank in range(2)]
    moved = 0
    for name, expected in ends[0]["whole"].items():
        moved += bool("lora_B" in name and expected.any())
        for end in ends:
            assert torch.equal(end["whole"][name], expected) and torch.equal(end["resumed"][name], expected), name
    assert moved == 4, "two layers, an adapter of the policy and one of the critic in each"
    whole, interrupted, resumed = ends[0]["first"]
    assert whole == interrupted == 0.0 != resumed


def test_under_fsdp2_the_loop_samples_evaluates_and_resumes_exactly(
    parted: list[dict[str, Any]], outcomes: list[dict[str, Any]]
) -> None:
    """Both kinds take the same steps; whatever a checkpoint has brought back goes on to the last bit."""
    for outcome in parted:
        for name, expected in parted[0]["whole"].items():
            assert torch.equal(outcome["whole"][name], expected), name
            assert torch.equal(outcome["resumed"][name], expected), name
    for row, compared in zip(parted[0]["history"], outcomes[0]["history"], strict=True):
        for name in ("env/reward_mean", "objective/kl", "tokens/responses_len_mean", "ppo/policy/grad_norm"):
            assert row[name] == pytest.approx(compared[name], rel=1e-3, abs=1e-6), name


def test_what_fsdp2_saves_is_whole_and_loads_anywhere(folder: Path, parted: list[dict[str, Any]]) -> None:
    saved = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "fsdp2" / "whole" / "best"))
    shapes = {name: parameter.shape for name, parameter in saved.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in parted[0]["whole"].items()}
    for kind in ("whole", "fsdp2/whole"):
        checkpoint = load_file(folder / kind / "checkpoint-4" / "model.safetensors")
        assert {name: value.shape for name, value in checkpoint.items()} == shapes


def test_metrics_are_global_and_written_once(folder: Path, outcomes: list[dict[str, Any]]) -> None:
    rows = {
        name: [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    }
    assert [row["iteration"] for row in rows["whole"]] == [1, 2, 3, 4]
    assert [untimed(row) for row in rows["resumed"]] == [untimed(row) for row in rows["whole"]]
    histories = [[untimed(row) for row in outcome["history"]] for outcome in outcomes]
    assert histories[0] == histories[1]
    assert rows["whole"][0]["env/reward_skipped"] == 1 / 8  # process 1 leaves out one of its four samples


def test_held_out_prompts_come_back_in_their_order_each_once(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert outcome["prompts"] == loop.TEXTS
        # The source leaves out the first prompt of process 1; a skipped score reads as 0 there.
        assert all(len(values) == len(loop.TEXTS) for values in outcome["measures"].values())


def test_a_run_of_one_process_goes_on_with_two_and_says_what_is_not_exact(
    folder: Path, outcomes: list[dict[str, Any]]
) -> None:
    """Weights and Adam's moments are those of the one process; then both draw, each its own, and agree on the end."""
    saved = load_file(folder / "of one process" / "checkpoint-2" / "model.safetensors")
    moments = load_nested_state(folder / "of one process" / "checkpoint-2" / "optimizer.safetensors")["state"][0]
    first, second = (outcome["grown"] for outcome in outcomes)
    for name, value in saved.items():
        assert torch.equal(first["restored"][name], value), name
        assert torch.equal(second["restored"][name], value), name
        assert torch.equal(first["weights"][name], second["weights"][name]), name
    assert all(torch.equal(first["optimizer"][name], value) for name, value in moments.items())
    assert any(not torch.equal(first["weights"][name], value) for name, value in saved.items())
    said = "written by 1 process(es), this run has 2. Weights, optimizer, schedule, controller, moments"
    assert all(any(said in sentence for sentence in one["said"]) for one in (first, second))
    assert first["history"][0]["env/reward_skipped"] == 1 / 8  # eight samples instead of four, process 1 leaves out one


@pytest.mark.filterwarnings("default:checkpoint-. was written by 2 process")
def test_a_run_of_two_processes_goes_on_with_one_from_the_same_weights(
    folder: Path, outcomes: list[dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(folder / "whole", tmp_path / "run")
    found = loop.goes_on_with_another_number(tmp_path / "run", done=4)
    for name, expected in outcomes[0]["whole"].items():
        assert torch.equal(found["restored"][name], expected), name
    assert any("written by 2 process(es), this run has 1." in sentence for sentence in found["said"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[4]["env/reward_skipped"] == 0.0  # four samples, and no process 1


def test_when_one_process_fails_all_end_and_the_cause_is_named(tmp_path: Path) -> None:
    output = launch((*TORCHRUN, loop.__file__, "fail", str(tmp_path)), expect=1)
    assert "the reward model of process 1 has lost its connection" in output


def test_a_process_without_samples_learns_from_the_others_and_a_killed_one_ends_all(tmp_path: Path) -> None:
    """One start for both. The launcher names who was killed; the other process sees its connection close."""
    output = launch((*TORCHRUN, loop.__file__, "die", str(tmp_path)), expect=1)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name
    rows = [json.loads(line) for line in (tmp_path / "metrics.1.jsonl").read_text().splitlines()]
    assert [row["env/reward_skipped"] for row in rows] == [0.5] * 4
    assert (tmp_path / "lost" / "checkpoint-0" / "manifest.json").is_file()
    assert "Signal 9 (SIGKILL)" in output
    assert "rank      : 1" in output
