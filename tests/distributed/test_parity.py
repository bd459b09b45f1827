"""Two processes take the steps of one: every statistic and every weight, whoever sampled which row."""

from dataclasses import replace

import pytest

from tests.distributed.comparing import EVERYTHING_GLOBAL, TOLERANCE, alone, together, worst
from tests.distributed.scenario import Outcome, Scenario, build

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:KL divergence is starting to become negative"),
    pytest.mark.filterwarnings("ignore:The average ratio of batch"),
    pytest.mark.filterwarnings("ignore:Skipped a minibatch"),
]

CASES = {
    "odd number of rows, the last minibatch leaves one process without work": Scenario(shares=(5, 4)),
    "gradient accumulation": Scenario(shares=(5, 4), rows_of_a_pass=1, passes_of_a_step=2),
    "one process holds almost everything": Scenario(shares=(8, 1)),
    "whitening, moments, clipping, controller, entropy": Scenario(shares=(5, 4), settings=EVERYTHING_GLOBAL),
    "cut by tokens": Scenario(shares=(5, 4), settings={"token_budget": 24}),
    "every step skipped by the ratio guard": Scenario(shares=(5, 4), settings={"ratio_threshold": 0.5}),
    "early stop": Scenario(
        shares=(5, 4), learning_rate=3e-3, settings={"early_stopping": True, "target_kl": 1e-4}
    ),
    "a score that overflows the loss": Scenario(shares=(5, 4), broken_row=True),
    "KL penalty whose weight adapts": Scenario(shares=(5, 4), algorithm="penalty"),
    "no critic": Scenario(shares=(6, 2), algorithm="rloo", group_size=2),
    "a ratio per response": Scenario(shares=(6, 2), algorithm="gspo", group_size=2),
    "good responses, tokens of high entropy, further fits of the critic": Scenario(
        shares=(5, 4), algorithm="further parts"
    ),
    "GPT-2": Scenario(shares=(5, 4), model="gpt2", learning_rate=0.01),
    "LoRA": Scenario(shares=(5, 4), lora=True),
    "gradient checkpointing": Scenario(shares=(5, 4), settings={"gradient_checkpointing": True}),
}  # fmt: skip


PARTED = ("gradient accumulation", "one process holds almost everything", "LoRA", "gradient checkpointing")
FSDP = {f"FSDP2, {name}": replace(CASES[name], fsdp=True) for name in PARTED}
FSDP["FSDP2, whitening, moments, clipping, controller, entropy, cut by tokens"] = Scenario(
    shares=(5, 4), fsdp=True, settings=EVERYTHING_GLOBAL | {"token_budget": 24}
)
FSDP["FSDP2, the ratio guard acts"] = Scenario(shares=(5, 4), fsdp=True, settings={"ratio_threshold": 1.003})
FSDP["FSDP2, GPT-2, a score that overflows the loss"] = replace(CASES["GPT-2"], fsdp=True, broken_row=True)

SABOTAGE = {what: Scenario(shares=(5, 4), sabotage=what, settings=EVERYTHING_GLOBAL) for what in ("count", "whitening")}
SABOTAGE["count, FSDP2"] = replace(SABOTAGE["count"], fsdp=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Every scenario on two processes."""
    return together(CASES | FSDP | SABOTAGE, tmp_path_factory.mktemp("outcomes"))


@pytest.mark.parametrize("name", [*CASES, *FSDP])
def test_two_processes_take_the_steps_of_one(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    what, difference = worst(alone((CASES | FSDP)[name]), outcomes[name])
    print(f"{name}: {difference:.1e} ({what})")
    assert difference <= TOLERANCE, f"{what} differs by {difference:.2g}"


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_the_comparison_notices_what_is_local_instead_of_global(
    sabotage: str, outcomes: dict[str, list[Outcome]]
) -> None:
    """Dividing by a process's own tokens is the classic mistake: short responses would weigh more."""
    _, difference = worst(alone(SABOTAGE[sabotage]), outcomes[sabotage])
    assert difference > 1e-3  # what rounding does is a hundredth of it


def test_under_fsdp2_processes_really_hold_parts(outcomes: dict[str, list[Outcome]]) -> None:
    """Accelerate would quietly run DDP on a CPU, and the comparison would compare nothing new."""
    for name, processes in outcomes.items():
        assert all((outcome.parted > 0) == ("FSDP2" in name) for outcome in processes), name


def test_the_guards_really_acted(outcomes: dict[str, list[Outcome]]) -> None:
    """Otherwise the scenarios above would compare nothing of them."""

    def total(name: str, statistic: str) -> float:
        return sum(row[statistic] for row in outcomes[name][1].statistics)

    assert total("every step skipped by the ratio guard", "ppo/updates_skipped") == 18
    assert total("a score that overflows the loss", "ppo/updates_skipped") == 6
    assert 0 < total("FSDP2, the ratio guard acts", "ppo/updates_skipped") < 18
    assert total("FSDP2, GPT-2, a score that overflows the loss", "ppo/updates_skipped") == 6
    assert 0 < total("early stop", "ppo/stopped_early") <= 3
    odd = outcomes["odd number of rows, the last minibatch leaves one process without work"][1]
    assert set(odd.passes) == {1, 2}


def test_all_processes_take_equally_many_optimizer_steps(outcomes: dict[str, list[Outcome]]) -> None:
    """Otherwise one would wait for gradients that another never sends."""
    for name, processes in outcomes.items():
        steps = [[row["ppo/updates"] for row in outcome.statistics] for outcome in processes]
        assert steps[0] == steps[1], name
        assert min(steps[0]) > 0


def test_under_lora_the_kl_at_the_start_is_zero_and_only_adapters_and_value_head_move(
    outcomes: dict[str, list[Outcome]],
) -> None:
    first, last = outcomes["LoRA"][0].statistics[0], outcomes["LoRA"][0].statistics[-1]
    assert first["objective/kl"] == 0.0
    assert last["objective/kl"] != 0.0
    start = {name: value.detach() for name, value in build(CASES["LoRA"]).model.named_parameters()}
    moved = {name for name, value in outcomes["LoRA"][0].parameters.items() if not value.equal(start[name])}
    assert moved == {name for name in start if "lora_" in name or name.startswith("v_head")}
