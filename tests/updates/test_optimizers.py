"""TensorFlow's Adam and the falling learning rate."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_ppo.updates.optimizers import TensorFlowAdam, adam, linear_to_zero


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
