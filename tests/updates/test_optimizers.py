"""TensorFlow's Adam and the falling learning rate."""

import math
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_ppo.updates.optimizers import TensorFlowAdam, adam, create_moments, linear_to_zero
from tests.classic.test_classic import trainer_of


def quadratic(parameter: nn.Parameter) -> Tensor:
    return (torch.arange(1.0, 4.0, dtype=torch.float64) * parameter.square()).sum()


def test_tensorflows_adam_equals_the_formula_number_by_number() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = TensorFlowAdam([parameter], 0.1, eps=1e-3)
    theta, m, v = parameter.tolist(), [0.0] * 3, [0.0] * 3
    for t in range(1, 6):
        optimizer.zero_grad()
        quadratic(parameter).backward()
        optimizer.step()
        for i in range(3):
            g = 2 * (i + 1) * theta[i]
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            rate = 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            theta[i] -= rate * m[i] / (math.sqrt(v[i]) + 1e-3)
    assert_close(parameter.detach(), torch.tensor(theta, dtype=torch.float64))


def test_with_a_vanishing_epsilon_it_is_pytorchs_adam_and_with_a_large_one_its_first_step_is_smaller() -> None:
    def first_step(optimizer_of: type, eps: float) -> Tensor:
        parameter = nn.Parameter(torch.tensor([1e-4, -2e-4, 1e-3], dtype=torch.float64))
        before = parameter.detach().clone()
        optimizer = optimizer_of([parameter], lr=0.1, eps=eps)
        quadratic(parameter).backward()
        optimizer.step()
        return (parameter.detach() - before).abs()

    assert_close(first_step(TensorFlowAdam, 1e-30), first_step(torch.optim.Adam, 1e-30))
    assert (first_step(TensorFlowAdam, 1e-5) < first_step(torch.optim.Adam, 1e-5)).all()


def test_its_state_comes_back_and_parameters_without_gradient_stay() -> None:
    moving, still = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(2))
    optimizer = adam([moving, still], lr=0.1, tensorflow=True, eps=1e-5)
    quadratic(moving).backward()
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(2))
    copy = nn.Parameter(moving.detach().clone())
    other = TensorFlowAdam([copy, nn.Parameter(torch.ones(2))], 0.1)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for parameter, stepping in ((moving, optimizer), (copy, other)):
        stepping.zero_grad()
        quadratic(parameter).backward()
        stepping.step()
    assert torch.equal(moving, copy)


def test_the_learning_rate_is_whole_at_first_and_zero_only_after_the_last_iteration() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = linear_to_zero(optimizer, 4), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 0.75, 0.5, 0.25] and optimizer.param_groups[0]["lr"] == 0.0


def test_an_epsilon_of_zero_and_no_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"eps must be > 0, got 0\.0"):
        TensorFlowAdam([nn.Parameter(torch.zeros(1))], 0.1, eps=0.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        linear_to_zero(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 0)


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_moments_made_before_the_first_step_are_those_that_it_would_have_made(
    kind: type[torch.optim.Optimizer], settings: dict[str, bool]
) -> None:
    found = []
    for early in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        layer.bias.requires_grad_(False)
        optimizer = kind(layer.parameters(), lr=0.1, **settings)  # type: ignore[call-arg]
        if early:
            create_moments(optimizer)
            assert not any(moment.any() for moment in optimizer.state[layer.weight].values())
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            create_moments(optimizer)  # what is there stays
        found.append((layer.state_dict(), optimizer.state_dict()["state"]))
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert list(found[1][1]) == [0]


def test_moments_of_other_optimizers_are_their_own_business() -> None:
    parameter = nn.Parameter(torch.ones(2))
    for optimizer in (
        torch.optim.SGD([parameter], lr=0.1), TensorFlowAdam([parameter], 0.1),
        torch.optim.Adam([parameter], amsgrad=True),
    ):  # fmt: skip
        create_moments(optimizer)
        assert not optimizer.state


def test_a_trainers_moments_are_there_before_its_first_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the first gradients in memory, they leave a hole that no later gradient of that size fits into."""
    trainer = trainer_of()
    seen: list[tuple[int, int]] = []
    plain = Accelerator.backward

    def watched(accelerator: Accelerator, loss: Tensor, **settings: object) -> None:
        moments = sum("exp_avg" in state for state in trainer.optimizer.state.values())
        gradients = sum(parameter.grad is not None for parameter in trainer.model.parameters())
        seen.append((moments, gradients))
        plain(accelerator, loss, **settings)

    monkeypatch.setattr(Accelerator, "backward", watched)
    queries = [torch.tensor([3, 4, 5]), torch.tensor([6, 7])]
    responses = [torch.tensor([8, 9]), torch.tensor([10, 11, 12])]
    trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(-1.0)])
    trained = sum(parameter.requires_grad for parameter in trainer.model.parameters())
    assert seen[0] == (trained, 0)
