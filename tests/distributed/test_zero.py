"""DeepSpeed ZeRO, launched by its files, takes the steps of one process: gradients, guards, clipping, statistics."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from tests.distributed import loop
from tests.distributed.comparing import EVERYTHING_GLOBAL, TOLERANCE, alone, together, worst
from tests.distributed.launching import launch_file
from tests.distributed.scenario import Scenario

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-distributed installs it"),
    pytest.mark.filterwarnings("ignore:KL divergence is starting to become negative"),
    pytest.mark.filterwarnings("ignore:The average ratio of batch"),
    pytest.mark.filterwarnings("ignore:Skipped a minibatch"),
]

# In "the ratio guard acts" dropped and taken steps alternate: what the engine forgets must not come back later.
CASES = {
    "gradient accumulation": Scenario(shares=(5, 4), rows_of_a_pass=1, passes_of_a_step=2),
    "whitening, moments, clipping, controller, entropy": Scenario(shares=(5, 4), settings=EVERYTHING_GLOBAL),
    "LoRA": Scenario(shares=(5, 4), lora=True),
    "the ratio guard acts": Scenario(shares=(5, 4), settings={"ratio_threshold": 1.003}),
    "a score that overflows the loss": Scenario(shares=(5, 4), broken_row=True),
    "one process holds almost everything": Scenario(shares=(8, 1)),
    "the reference waits in main memory": Scenario(shares=(5, 4), settings={"reference_placement": "offloaded"}),
}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_under_zero_take_the_steps_of_one(stage: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The engine's gradient norm is left out where a step was dropped: it is not measured there."""
    outcomes = together(CASES, tmp_path_factory.mktemp(f"zero{stage}"), file=f"zero{stage}")
    for name, scenario in CASES.items():
        expected = alone(scenario)
        skipped = [row["ppo/updates_skipped"] for row in expected.statistics]
        assert (sum(skipped) > 0) == (name in ("the ratio guard acts", "a score that overflows the loss"))
        if any(skipped):
            for row in (*expected.statistics, *(row for outcome in outcomes[name] for row in outcome.statistics)):
                row.pop("ppo/policy/grad_norm")
        what, difference = worst(expected, outcomes[name])
        assert (outcomes[name][0].parted > 0) == (stage == 3)
        print(f"ZeRO-{stage}, {name}: {difference:.1e} ({what})")
        assert difference <= TOLERANCE, f"{name}: {what} differs by {difference:.2g}"


@pytest.mark.parametrize("stage", [1, 2])
def test_what_needs_whole_parameters_runs_where_only_the_optimizer_is_sharded(
    stage: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cases = {name: Scenario(shares=(5, 4), algorithm=name) for name in ("exact penalty", "top entropy")}
    cases["full KL"] = Scenario(shares=(5, 4), settings={"kl_placement": "loss", "kl_penalty": "full"})
    outcomes = together(cases, tmp_path_factory.mktemp(f"whole{stage}"), file=f"zero{stage}")
    for name, scenario in cases.items():
        what, difference = worst(alone(scenario), outcomes[name])
        assert difference <= TOLERANCE, f"{name}: {what} differs by {difference:.2g}"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_optimizer_and_parameters_in_main_memory_the_steps_are_the_same(
    stage: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Here everything is in main memory anyway: what is tested is the engine's code for it, with torch's Adam."""
    cases = {"offload": CASES["gradient accumulation"]}
    outcomes = together(cases, tmp_path_factory.mktemp(f"offload{stage}"), file=f"zero{stage}_offload")
    what, difference = worst(alone(cases["offload"]), outcomes["offload"])
    assert difference <= TOLERANCE, f"{what} differs by {difference:.2g}"


def test_in_bfloat16_policy_and_reference_start_from_the_same_numbers(tmp_path: Path) -> None:
    """The engine keeps the policy in bfloat16: a reference in float32 would be another model."""
    cases = {
        name: Scenario(shares=(5, 4), mixed_precision="bf16", same_start=True, settings=settings)
        for name, settings in {"parts": {}, "whole": {"reference_placement": "whole"}}.items()
    }
    for name, outcomes in together(cases, tmp_path, file="zero3").items():
        assert outcomes[0].statistics[0]["objective/kl"] == 0.0, name


@pytest.mark.parametrize("stage", [2, 3])
def test_the_managed_loop_samples_saves_and_resumes_under_zero(stage: int, tmp_path: Path) -> None:
    """Resumed equals uninterrupted to the last bit, and what is saved as the best model is whole."""
    launch_file(f"zero{stage}", Path(loop.__file__), "run", str(tmp_path), str(stage))
    for rank in range(2):
        outcome = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, expected in outcome["whole"].items():
            assert torch.equal(outcome["resumed"][name], expected), name
    saved = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "whole" / "best"))
    shapes = {name: parameter.shape for name, parameter in saved.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in outcome["whole"].items()}
