"""The traced NumPy program is the objective's gradient, not another one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from rlhf_ppo.algorithms import AlgorithmConfig, Critic, LearnedValue, build_algorithm
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.control import Categorical, ControlInputs, ControlPolicy, Gaussian, control_algorithm
from rlhf_ppo.control.numpy_gradients import NumpyGradients
from rlhf_ppo.updates import MinibatchConfig, UpdateRecord

ROWS = 24


def policy(kind: str) -> ControlPolicy:
    torch.manual_seed(0)
    return ControlPolicy(
        5, Gaussian(2) if kind == "joints" else Categorical(3), 2 if kind == "joints" else 3, hidden=(8,)
    )


def batch(own: ControlPolicy) -> TrainBatch:
    """Random steps by a policy that differs a little from `own`; two of them are auto-reset steps."""
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(ROWS, 1, 5, generator=generator)
    noise = own.distribution.noise((ROWS, 1), generator)
    with torch.no_grad():
        inputs = ControlInputs(observations=observations, actions=own.act(observations, noise))
        output = own(inputs)
    logprobs, values, advantages, returns = (torch.randn(ROWS, 1, generator=generator) for _ in range(4))
    mask = torch.ones(ROWS, 1, dtype=torch.bool)
    mask[3], mask[11] = False, False
    return TrainBatch(
        inputs=inputs, mask=mask, logprobs=output.logprobs + 0.3 * logprobs, values=output.values[:, :1] + 0.3 * values,
        advantages=advantages, returns=returns,
    )  # fmt: skip


def updated(
    algorithm: AlgorithmConfig, kind: str, *, lowered: bool, data: TrainBatch
) -> tuple[ControlPolicy, UpdateRecord]:
    own = policy(kind)
    optimizer = torch.optim.Adam(own.parameters(), lr=0.01, eps=1e-5)
    built = build_algorithm(
        algorithm, policy=own, optimizer=optimizer, accelerator=Accelerator(cpu=True), seed=3,
        minibatch_config=lambda: MinibatchConfig(epochs=2, minibatch_size=8, max_grad_norm=0.5, most_skips_in_a_row=3),
        compute_gradients=NumpyGradients(own) if lowered else None,
    )  # fmt: skip
    return own, built.update(data)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ppo-clip", "joints"),
        pytest.param("ppo-penalty", "choices", marks=pytest.mark.slow),
        pytest.param("reinforce", "joints", marks=pytest.mark.slow),
    ],
)
def test_the_lowered_update_takes_the_steps_of_autograd(name: Any, kind: str) -> None:
    """Shuffled minibatches of 8 rows, masked ones among them, entropy and clipped values in the loss."""
    algorithm: Any = control_algorithm(name, ent_coef=0.01)
    critic = Critic(vf_coef=0.5, clip_range_value=0.2)
    valued: Any = {"baseline": LearnedValue(critic=critic)} if name == "reinforce" else {"critic": critic}
    algorithm = replace(algorithm, **valued)
    data = batch(policy(kind))
    (plain, expected), (lean, found) = (updated(algorithm, kind, lowered=flag, data=data) for flag in (False, True))
    for left, right in zip(lean.parameters(), plain.parameters(), strict=True):
        assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert_close(found.ratio(), expected.ratio(), rtol=1e-5, atol=1e-6)
    for left_step, right_step in zip(found.metrics, expected.metrics, strict=True):
        assert left_step == pytest.approx(right_step, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("clip_range_value", [None, 0.2])
def test_the_lowered_fit_of_trpo_s_critic_takes_the_steps_of_autograd(clip_range_value: float | None) -> None:
    """The policy takes its natural-gradient step either way; the lowered gradients must not touch it."""
    algorithm = replace(control_algorithm("trpo"), clip_range_value=clip_range_value)
    data = batch(policy("joints"))
    (plain, expected), (lean, found) = (updated(algorithm, "joints", lowered=flag, data=data) for flag in (False, True))
    assert found.extras == expected.extras
    for left, right in zip(lean.parameters(), plain.parameters(), strict=True):
        assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert not any(map(torch.equal, policy("joints").critic.parameters(), lean.critic.parameters()))


@pytest.mark.slow
def test_a_new_objective_is_traced_anew() -> None:
    """Otherwise an adapted β would go on as it was."""
    own, data = policy("joints"), batch(policy("joints"))
    gradients, rows = NumpyGradients(own), torch.arange(8)
    strengths = []
    for beta in (1.0, 100.0):
        algorithm: Any = control_algorithm("ppo-penalty")
        update: Any = build_algorithm(
            replace(algorithm, beta=beta), policy=own, optimizer=torch.optim.Adam(own.parameters()), seed=0,
            accelerator=Accelerator(cpu=True), minibatch_config=MinibatchConfig, compute_gradients=gradients,
        ).update  # fmt: skip
        gradients(update.inner.objective, data, rows)
        assert own.distribution.log_std.grad is not None  # type: ignore[union-attr]
        strengths.append(float(own.distribution.log_std.grad.norm()))  # type: ignore[union-attr]
    assert strengths[1] > 10 * strengths[0]


def test_not_finite_losses_are_skipped_by_the_update_and_not_by_numpy() -> None:
    data = batch(policy("joints"))
    data = replace(data, advantages=torch.full_like(data.advantages, 3e38))
    before = [parameter.clone() for parameter in policy("joints").parameters()]
    with pytest.warns(UserWarning, match="not finite"), pytest.raises(FloatingPointError):
        updated(control_algorithm("ppo-clip"), "joints", lowered=True, data=data)
    assert all(torch.equal(left, right) for left, right in zip(before, policy("joints").parameters(), strict=True))
