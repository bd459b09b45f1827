"""How long threads spin: set before torch is loaded by what is run, never by what is imported, never over the user."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ppo.utils.openmp import SHORT_SPIN, is_command, spin_shortly

ROOT = Path(__file__).parents[2]
CHOICES = ("OMP_WAIT_POLICY", *SHORT_SPIN)


def environment(**chosen: str) -> dict[str, str]:
    """Without a choice but this one; torch is replaced by what shows its environment and ends the process."""
    known = {name: value for name, value in os.environ.items() if name not in CHOICES}
    return {**known, **chosen, "PYTHONPATH": f"{Path(__file__).parent / 'no_torch'}{os.pathsep}{ROOT}"}


COMMANDS = [
    ["recipes/ppo_gpt2_sentiment.py"], ["recipes/train_reward_model.py"],
    ["-m", "reward_model.train", "--data", "d", "--model", "m", "--output_dir", "o"],
    *(["-m", f"reward_model.{name}", "m", "--data", "d"] for name in ("evaluate", "score")),
    ["-m", "reward_model.serve", "m"], ["-m", "rlhf_ppo.plan"], ["-m", "rlhf_ppo.replay", "dump"],
    ["-m", "rlhf_ppo.merge", "adapter", "merged"],
]  # fmt: skip


def seen_by_torch(command: list[str], **chosen: str) -> list[str]:
    """The variables in the environment at the moment torch is imported."""
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(**chosen), capture_output=True, text=True, check=False
    )
    return result.stdout.split()


FAST_TIER = (0, 2)
"""Indices of commands: a process each."""


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=" ".join(command), marks=() if index in FAST_TIER else pytest.mark.slow)
        for index, command in enumerate(COMMANDS)
    ],
)
def test_what_is_run_has_the_short_spin_before_torch_is_loaded(command: list[str]) -> None:
    assert seen_by_torch(command) == [f"{name}={value}" for name, value in SHORT_SPIN.items()]


@pytest.mark.parametrize(
    ("command", "chosen"),
    [pytest.param(COMMANDS[0], "OMP_WAIT_POLICY", marks=pytest.mark.slow), (COMMANDS[2], "GOMP_SPINCOUNT")],
)
def test_the_users_choice_stands(command: list[str], chosen: str) -> None:
    assert seen_by_torch(command, **{chosen: "7"}) == [f"{chosen}=7"]


@pytest.mark.parametrize("chosen", CHOICES)
def test_one_choice_of_the_user_is_enough_to_set_nothing(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {chosen: "7"})
    spin_shortly()
    assert os.environ == {chosen: "7"}


@pytest.mark.parametrize("statement", ["import rlhf_ppo, reward_model", "import ppo_gpt2_sentiment"])
def test_an_import_leaves_the_environment_alone(statement: str) -> None:
    assert seen_by_torch(["-c", f"import sys; sys.path.append('recipes'); {statement}"]) == []


def test_only_a_module_of_ours_or_our_script_is_a_command() -> None:
    assert is_command(["python", "-m", "rlhf_ppo", "ppo"]) and is_command(["python", "/venv/bin/rlhf-ppo", "ppo"])
    assert is_command(["python", "-W", "ignore", "-m", "reward_model.train", "--help"])
    assert not is_command(["python", "-m", "pytest", "-m", "not slow", "rlhf_ppo.plan"])
    assert not is_command(["python", "mine.py", "rlhf-ppo"]) and not is_command(["python", "-m", "rlhf_ppo_extra"])
    assert not is_command(["python", "mine.py"]) and not is_command(["python", "-m"])
