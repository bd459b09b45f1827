"""The diagonal Gaussian against float64 sums written out, and against itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import functional as F

floats = st.floats(-2.0, 2.0)


def density(mean: float, log_std: float, action: float) -> float:
    std = math.exp(log_std)
    return math.exp(-((action - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))


@settings(max_examples=25)
@given(st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=3))
def test_logprobs_are_those_of_the_density(joints: list[tuple[float, float, float]]) -> None:
    mean, log_std, action = (torch.tensor(column, dtype=torch.float64) for column in zip(*joints, strict=True))
    expected = sum(math.log(density(*joint)) for joint in joints)
    assert_close(F.gaussian_logprobs(mean[None], log_std, action[None]), torch.tensor([expected], dtype=torch.float64))


def test_entropy_and_divergence_are_the_means_of_logprobs() -> None:
    """S = -E[log π] and KL(p || q) = E_p[log p - log q], by quadrature over one joint."""
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
    mean, log_std, other, other_std = (torch.tensor([x], dtype=torch.float64) for x in (0.3, -0.2, -0.5, 0.4))
    here = F.gaussian_logprobs(mean.expand_as(grid), log_std, grid)
    there = F.gaussian_logprobs(other.expand_as(grid), other_std, grid)
    weights = here.exp() * float(grid[1, 0] - grid[0, 0])
    assert_close(F.gaussian_entropy(log_std), -(weights * here).sum())
    assert_close(F.gaussian_kl(mean, log_std, other, other_std), (weights * (here - there)).sum())


def test_divergence_to_itself_is_zero_and_its_curvature_is_the_metric() -> None:
    """The Hessian of KL at the same policy is what TRPO's Fisher products are built from."""
    point = torch.tensor([0.4, -0.3, 0.1, 0.2], dtype=torch.float64)

    def divergence(x: Tensor) -> Tensor:
        return F.gaussian_kl(point[:2], point[2:], x[:2], x[2:])

    assert divergence(point) == 0
    hessian: Tensor = torch.autograd.functional.hessian(divergence, point)  # type: ignore[assignment,no-untyped-call]
    metric = F.gaussian_metric(point[2:], torch.ones((), dtype=torch.float64))
    for direction in torch.eye(4, dtype=torch.float64):
        assert_close(hessian @ direction, torch.cat(metric((direction[:2], direction[2:]))))


@pytest.mark.parametrize("function", [F.gaussian_logprobs, lambda m, s, a: F.gaussian_kl(m, s, a, s + 0.1)])
def test_gradients_are_those_of_finite_differences(function: object) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, action = (torch.randn(3, 2, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    log_std = torch.randn(2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(function, (mean, log_std, action))  # type: ignore[arg-type,no-untyped-call]
