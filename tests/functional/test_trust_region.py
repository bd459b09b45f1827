import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, seeds


def network(actions: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, actions)).double()


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def dense_hessian(model: nn.Sequential, loss) -> Tensor:  # type: ignore[no-untyped-def]
    """Second derivatives of `loss(outputs)` with respect to all weights, row by row."""
    weights = parameters(model)
    grad = F.flatten(torch.autograd.grad(loss(), weights, create_graph=True))
    rows = [torch.autograd.grad(entry, weights, retain_graph=True, allow_unused=True) for entry in grad]
    return torch.stack([F.flatten(row, like=weights) for row in rows])


def test_flatten_and_unflatten_are_inverse_and_none_reads_as_zeros() -> None:
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor([7.0])]
    vector = F.flatten(tensors)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert_close(F.unflatten(vector, tensors), tensors)
    assert F.flatten([None, tensors[1]], like=tensors).tolist() == [0, 0, 0, 0, 0, 0, 7]


def test_flatten_of_none_and_unflatten_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got None.*as `like`"):
        F.flatten([None, torch.zeros(2)])
    with pytest.raises(ValueError, match=r"expected a vector of 2 entries, got 3"):
        F.unflatten(torch.zeros(3), [torch.zeros(2)])


def test_categorical_fisher_product_is_the_hessian_of_the_mean_kl() -> None:
    """F = ∇² mean KL(π_old || π_θ) at θ = θ_old, over the masked states only."""
    model, states = network(), numbers(0, 6, 3)
    mask = torch.tensor([True, True, False, True, True, False])
    old = model(states).detach()
    hessian = dense_hessian(model, lambda: F.masked_mean(F.categorical_kl(old, model(states)), mask))
    logits = model(states)
    weights = F.step_weights(mask, mask.sum()).double()
    product = F.fisher_vector_product(
        [logits], parameters(model), metric=F.categorical_metric(logits, weights), damping=0.1
    )
    for seed in range(3):
        vector = numbers(seed, len(hessian))
        assert_close(product(vector), hessian @ vector + 0.1 * vector)


def test_gaussian_fisher_product_is_the_hessian_of_the_mean_kl() -> None:
    model, states = network(2), numbers(0, 6, 3)
    log_std = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))
    model.register_parameter("log_std", log_std)
    old_mean, old_log_std = model(states).detach(), log_std.detach().clone()

    def mean_kl() -> Tensor:
        """KL between diagonal Gaussians: log σ/σ_old + (σ_old² + (μ_old - μ)²) / 2σ² - ½, summed over actions."""
        squares = (2 * old_log_std).exp() + (old_mean - model(states)).square()
        return (log_std - old_log_std + squares / (2 * (2 * log_std).exp()) - 0.5).sum(-1).mean()

    hessian = dense_hessian(model, mean_kl)
    mean = model(states)
    spread = log_std.expand_as(mean)
    weights = F.step_weights(torch.ones(6, dtype=torch.bool), 6).double()
    product = F.fisher_vector_product([mean, spread], parameters(model), metric=F.gaussian_metric(spread, weights))
    vector = numbers(1, len(hessian))
    assert_close(product(vector), hessian @ vector)


def test_fisher_products_of_pieces_add_up_and_unused_parameters_have_no_curvature() -> None:
    model, states = network(), numbers(0, 6, 3)
    weights = [*parameters(model), nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    mask = torch.ones(6, dtype=torch.bool)

    def product(rows: slice, vector: Tensor) -> Tensor:
        logits = model(states[rows])
        metric = F.categorical_metric(logits, F.step_weights(mask[rows], 6).double())
        return F.fisher_vector_product([logits], weights, metric=metric)(vector)

    vector = numbers(1, sum(weight.numel() for weight in weights))
    whole = product(slice(0, 6), vector)
    assert_close(product(slice(0, 2), vector) + product(slice(2, 6), vector), whole)
    assert (whole[-2:] == 0).all()


@given(seed=seeds, size=st.integers(1, 8))
def test_conjugate_gradient_solves_positive_definite_systems(seed: int, size: int) -> None:
    """In exact arithmetic `size` products suffice; a few more absorb rounding."""
    root = numbers(seed, size, size)
    matrix = root @ root.T + torch.eye(size, dtype=torch.float64)
    target = numbers(seed + 1, size)
    solution = F.conjugate_gradient(lambda v: matrix @ v, target, iterations=3 * size, tolerance=1e-24)
    assert_close(matrix @ solution, target, atol=1e-8, rtol=1e-8)


def test_conjugate_gradient_stops_at_negative_curvature_and_at_a_zero_target() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0]))
    assert F.conjugate_gradient(lambda v: matrix @ v, torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]
    assert F.conjugate_gradient(lambda v: v / 0, torch.zeros(2)).tolist() == [0.0, 0.0]


def test_trust_region_step_has_the_allowed_kl_in_the_quadratic_model() -> None:
    matrix, x = torch.diag(torch.tensor([2.0, 8.0])), torch.tensor([1.0, -1.0])
    step = F.trust_region_step(x, matrix @ x, 0.05)
    assert_close(0.5 * step.dot(matrix @ step), torch.tensor(0.05))


@pytest.mark.parametrize("max_kl, tolerance", [(1e-2, 0.3), (1e-4, 0.03), (1e-6, 0.003)])
def test_a_full_step_has_the_kl_and_the_improvement_that_its_models_foretell(max_kl: float, tolerance: float) -> None:
    """The whole chain on a small policy. Damping counts as KL, so the realized one is that of the undamped model,
    below what was asked for; the error of both models falls with the length of the step, as √δ.
    """
    model, states, advantages = network(), numbers(0, 64, 3), numbers(1, 64)
    actions, mask = torch.arange(64) % 4, torch.ones(64, dtype=torch.bool)
    weights, old = parameters(model), model(states).detach()
    old_logprobs = F.token_logprobs(old, actions)
    logits = model(states)
    loss, _ = F.surrogate_loss(F.token_logprobs(logits, actions), old_logprobs, advantages, mask)
    gradient = -F.flatten(torch.autograd.grad(loss, weights, retain_graph=True))
    metric = F.categorical_metric(logits, F.step_weights(mask, 64).double())
    product = F.fisher_vector_product([logits], weights, metric=metric, damping=0.1)
    direction = F.conjugate_gradient(product, gradient)
    start = F.flatten([weight.detach() for weight in weights])

    def evaluate(vector: Tensor) -> tuple[float, float]:
        nn.utils.vector_to_parameters(vector, weights)
        with torch.no_grad():
            moved = model(states)
            new, _ = F.surrogate_loss(F.token_logprobs(moved, actions), old_logprobs, advantages, mask)
            return float(loss - new), float(F.categorical_kl(old, moved).mean())

    step = F.trust_region_step(direction, product(direction), max_kl)
    foretold = 0.5 * step.dot(product(step) - 0.1 * step)
    result = F.line_search(evaluate, start, step, max_kl=1.5 * max_kl)
    assert result.accepted and result.backtracks == 0
    assert result.kl == pytest.approx(float(foretold), rel=tolerance)
    assert foretold <= max_kl
    assert result.improvement == pytest.approx(float(gradient.dot(step)), rel=tolerance)


def test_line_search_takes_the_first_candidate_that_improves_within_the_region() -> None:
    """Improvement x(1.2 - x), KL x²: 1 and ½ exceed KL 0.1, ¼ has KL 0.0625 and improves by 0.2375."""
    result = F.line_search(
        lambda x: (float(x * (1.2 - x)), float(x * x)), torch.zeros(1), torch.ones(1), max_kl=0.1, shrink=0.5
    )
    assert (result.accepted, result.backtracks, result.parameters.tolist()) == (True, 2, [0.25])
    assert (result.improvement, result.kl) == pytest.approx((0.2375, 0.0625))


@pytest.mark.parametrize("verdict", [(0.0, 0.0), (-1.0, 0.0), (1.0, 1.0), (math.nan, 0.0), (1.0, math.nan)])
def test_a_failed_line_search_hands_back_the_start_bit_for_bit(verdict: tuple[float, float]) -> None:
    start, asked = numbers(0, 5), []
    before = start.clone()

    def evaluate(vector: Tensor) -> tuple[float, float]:
        asked.append(vector)
        return verdict

    result = F.line_search(evaluate, start, torch.ones(5).double(), max_kl=0.1, max_backtracks=3)
    assert not result.accepted and result.backtracks == len(asked) == 4
    assert torch.equal(result.parameters, before)
    assert (result.improvement, result.kl) == (0.0, 0.0)


def test_steps_without_a_length_are_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"max_kl must be > 0, got 0\.0"):
        F.trust_region_step(x, x, 0.0)
    for curved in (-x, x * 0, x * math.nan):
        with pytest.raises(ValueError, match=r"xᵀFx > 0 and finite, got .*raise the damping"):
            F.trust_region_step(x, curved, 0.01)
    with pytest.raises(ValueError, match=r"shrink must be between 0 and 1, got 1\.0"):
        F.line_search(lambda v: (1.0, 0.0), x, x, max_kl=0.1, shrink=1.0)
