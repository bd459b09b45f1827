"""Numbers that TRL 0.11.4's classic trainer produced, computed again from the pure functions.

`tests/golden/classic_ppo.json` was written by running that trainer; section A holds inputs and results without a
model, section B the path of its adaptive KL coefficient.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import functional as F
from rlhf_ppo.learner.kl_controllers import AdaptiveKLController

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "classic_ppo.json").read_text())
MODEL_FREE = GOLDEN["A_model_free"]
CONFIG = MODEL_FREE["config"]
KINDS: dict[str, F.KLKind] = {"kl": "k1", "abs": "abs", "mse": "k2"}
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


def inputs() -> dict[str, Tensor]:
    arrays = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in MODEL_FREE["inputs"].items()}
    return arrays | {"mask": arrays["mask"].bool()}


def shaped(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """KL, rewards, and rewards as the classic's GAE sees them."""
    x, (kind, whitened) = inputs(), case.split(",")
    kl = F.kl_estimate(x["logprobs"], x["ref_logprobs"], KINDS[kind])
    rewards, _ = F.kl_shaped_rewards(kl, x["scores"], x["mask"], kl_coef=CONFIG["kl_coef"])
    if whitened == "whiten_rewards=False":
        return kl, rewards, rewards
    tail = x["mask"].shape[1] - 1 - F.last_action_index(x["mask"])
    seen = F.classic_whiten_rewards(rewards, x["mask"], tail=tail, gamma=CONFIG["gamma"], lam=CONFIG["lam"])
    return kl, rewards, seen


def credit(case: str) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns."""
    x, rewards = inputs(), shaped(case)[2]
    mask = x["mask"]
    terminated = torch.arange(mask.shape[1]).expand_as(mask) == F.last_action_index(mask).unsqueeze(1)
    values = torch.cat([x["values"], torch.zeros(len(mask), 1, dtype=torch.float64)], dim=1)
    advantages, returns = F.gae(
        rewards, values, terminated, torch.zeros_like(mask), gamma=CONFIG["gamma"], lam=CONFIG["lam"], mask=mask
    )
    return F.whiten(advantages, mask), returns


def losses(case: str) -> dict[str, float]:
    """The classic's statistics, under its names."""
    x, (advantages, returns) = inputs(), credit(case)
    mask = x["mask"]
    policy, policy_metrics = F.ppo_clip_loss(
        x["new_logprobs"], x["logprobs"], advantages, mask,
        clip_low=CONFIG["cliprange"], clip_high=CONFIG["cliprange"],
    )  # fmt: skip
    value, value_metrics = F.value_loss(
        x["new_values"], x["values"], returns, mask, clip_range=CONFIG["cliprange_value"]
    )
    uniform = F.entropy_from_logits(torch.zeros(*mask.shape, 5, dtype=torch.float64))
    numbers = {
        "loss/policy": policy,
        "loss/value": value,
        "loss/total": policy + CONFIG["vf_coef"] * value,
        "policy/entropy": F.entropy_bonus(uniform, mask),
        "policy/approxkl": policy_metrics["approx_kl"],
        "policy/policykl": policy_metrics["policy_kl"],
        "policy/clipfrac": policy_metrics["clip_fraction"],
        "policy/advantages_mean": F.masked_mean(advantages, mask),
        "returns/mean": F.masked_mean(returns, mask),
        "returns/var": F.masked_var(returns, mask),
        "val/vpred": value_metrics["mean"],
        "val/error": value_metrics["error"],
        "val/clipfrac": value_metrics["clip_fraction"],
        "val/mean": F.masked_mean(x["values"], mask),
        "val/var": F.masked_var(x["values"], mask),
    }
    return {name: number.item() for name, number in numbers.items()}


@pytest.mark.parametrize("case", MODEL_FREE["cases"])
def test_rewards_advantages_and_returns_are_the_classic_trainers(case: str) -> None:
    mask = inputs()["mask"]
    kl, rewards, _ = shaped(case)
    advantages, returns = credit(case)
    for name, got in (("kl", kl), ("rewards", rewards), ("advantages", advantages), ("returns", returns)):
        expected = torch.tensor(MODEL_FREE["cases"][case][name], dtype=torch.float64)
        assert_close(got[mask], expected[mask], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", MODEL_FREE["cases"])
def test_losses_and_statistics_are_the_classic_trainers(case: str) -> None:
    expected: dict[str, Any] = MODEL_FREE["cases"][case]
    got = losses(case)
    assert got == pytest.approx(expected["stats"], abs=1e-5)
    assert got["loss/policy"] == pytest.approx(expected["policy_loss"], abs=1e-5)
    assert got["loss/value"] * CONFIG["vf_coef"] == pytest.approx(expected["weighted_value_loss"], abs=1e-5)


def test_the_adaptive_kl_coefficient_takes_the_classic_trainers_path() -> None:
    golden = GOLDEN["B_adaptive_kl"]
    controller = AdaptiveKLController(golden["init"], golden["target"], golden["horizon"])
    for kl, coefficient in golden["trajectory_[kl,coef_after]"]:
        controller.update(kl, golden["n_steps"])
        assert controller.value == pytest.approx(coefficient, abs=1e-8)
