import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil, steps

ONE = torch.tensor([[True]])


def batch(seed: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probs a few tenths apart, advantages, mask."""
    old = numbers(seed, *shape)
    return old + 0.4 * numbers(seed + 1, *shape), old, numbers(seed + 2, *shape), random_mask(seed, *shape)


def clip_loop(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, dual: float | None) -> dict[str, float]:
    """Case by case over the sign of the advantage, as the article's two pictures show it; ε = 0.2 and 0.3."""
    total = dict.fromkeys(("loss", "clip_fraction", "approx_kl", "policy_kl", "k3", "ratio_mean"), 0.0)
    for row, step in steps(mask):
        difference = (new[row, step] - old[row, step]).item()
        ratio, advantage = math.exp(difference), advantages[row, step].item()
        if advantage > 0:
            objective, cut = (1.3 * advantage, True) if ratio > 1.3 else (ratio * advantage, False)
        else:
            objective, cut = (0.8 * advantage, True) if ratio < 0.8 else (ratio * advantage, False)
            if dual is not None and ratio > dual:
                objective, cut = dual * advantage, True
        total["loss"] -= objective
        total["clip_fraction"] += cut
        total["approx_kl"] += difference**2 / 2
        total["policy_kl"] -= difference
        total["k3"] += ratio - 1 - difference
        total["ratio_mean"] += ratio
    return {name: value / len(steps(mask)) for name, value in total.items()}


@pytest.mark.parametrize("dual", [None, 1.2])
@given(seed=seeds, shape=shapes)
def test_ppo_clip_loss_and_metrics_equal_a_loop_per_token(
    dual: float | None, seed: int, shape: tuple[int, int]
) -> None:
    new, old, advantages, mask = batch(seed, shape)
    junk = spoil(new, mask), spoil(old, mask), spoil(advantages, mask), mask
    loss, metrics = F.ppo_clip_loss(*junk, clip_low=0.2, clip_high=0.3, dual_clip=dual)
    got = {"loss": loss.item()} | {name: value.item() for name, value in metrics.items()}
    assert got == pytest.approx(clip_loop(new, old, advantages, mask, dual), abs=1e-9)


@pytest.mark.parametrize(
    "ratio, advantage, slope",
    [(1.5, 1.0, 0.0), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.0), (4.0, -1.0, 0.0)],
)
def test_clipping_cuts_the_gradient_only_where_the_ratio_has_gone_the_way_it_was_pushed(
    ratio: float, advantage: float, slope: float
) -> None:
    """d(-ρ A)/d log π = -ρ A, and 0 where cut; ratio 4 with a negative advantage is beyond the dual clip 3."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, metrics = F.ppo_clip_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), ONE, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert_close(grad.item(), slope)
    assert metrics["clip_fraction"].item() == float(slope == 0.0)


@given(seed=seeds, shape=shapes)
def test_at_the_old_policy_every_policy_loss_has_the_policy_gradient(seed: int, shape: tuple[int, int]) -> None:
    """At θ = θ_old every ratio is 1 and every KL gradient 0: ∇L = -Â · mask / count."""
    _, old, advantages, mask = batch(seed, shape)
    expected = -(advantages * mask) / mask.sum()
    losses: dict[str, Any] = {
        "clip": lambda new: F.ppo_clip_loss(new, old, advantages, mask, clip_low=0.2, clip_high=0.2)[0],
        "penalty": lambda new: F.kl_penalty_loss(new, old, advantages, mask, beta=3.0)[0],
        "surrogate": lambda new: F.surrogate_loss(new, old, advantages, mask)[0],
        "reinforce": lambda new: F.reinforce_loss(new, advantages, mask),
    }
    for loss in losses.values():
        new = old.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(new), new)
        assert_close(grad, expected)


def test_at_the_old_policy_the_metrics_say_so() -> None:
    _, old, advantages, mask = batch(0, (3, 4))
    _, metrics = F.ppo_clip_loss(old, old, advantages, mask, clip_low=0.2, clip_high=0.2)
    got = {name: value.item() for name, value in metrics.items()}
    assert got == {"clip_fraction": 0, "approx_kl": 0, "policy_kl": 0, "k3": 0, "ratio_mean": 1}


def test_kl_penalty_loss_with_a_given_divergence_by_hand() -> None:
    """Ratio 1, A = 2, β = 10, KL = 0.1: L = -(2 - 1)."""
    zero = torch.zeros(1, 1)
    loss, metrics = F.kl_penalty_loss(zero, zero, zero + 2, ONE, beta=10.0, old_kl=zero + 0.1)
    assert_close((loss.item(), metrics["old_kl"].item()), (-1.0, 0.1), rtol=1e-6, atol=0)


def test_kl_penalty_estimate_has_the_value_and_gradient_of_the_exact_divergence_on_average() -> None:
    """Enumerate the actions of one state, each weighted by π_old."""
    old_logits, logits = numbers(0, 6), numbers(1, 6).requires_grad_()
    old = old_logits.log_softmax(0)
    exact = F.categorical_kl(old_logits, logits)
    estimate = torch.zeros((), dtype=torch.float64)
    for action in range(6):
        new = logits.log_softmax(0)[action].view(1, 1)
        loss, _ = F.kl_penalty_loss(new, old[action].view(1, 1), torch.zeros(1, 1, dtype=torch.float64), ONE, beta=1.0)
        estimate = estimate + old[action].exp() * loss
    assert_close(estimate, exact)
    assert_close(torch.autograd.grad(estimate, logits), torch.autograd.grad(exact, logits))


@given(seed=seeds, shape=shapes, clip_range=st.sampled_from([None, 0.2, 1.0]))
def test_value_loss_and_metrics_equal_a_loop_per_token(
    seed: int, shape: tuple[int, int], clip_range: float | None
) -> None:
    values, old, returns = (numbers(seed + k, *shape) for k in range(3))
    mask = random_mask(seed, *shape)
    total = dict.fromkeys(("loss", "clip_fraction", "error", "mean"), 0.0)
    for row, step in steps(mask):
        value, before, target = (x[row, step].item() for x in (values, old, returns))
        squares = [(value - target) ** 2]
        if clip_range is not None:
            squares.append((min(max(value, before - clip_range), before + clip_range) - target) ** 2)
        total["loss"] += 0.5 * max(squares)
        total["clip_fraction"] += squares[-1] > squares[0]
        total["error"] += squares[0]
        total["mean"] += value
    expected = {name: value / len(steps(mask)) for name, value in total.items()}
    loss, metrics = F.value_loss(
        spoil(values, mask), spoil(old, mask), spoil(returns, mask), mask, clip_range=clip_range
    )
    got = {"loss": loss.item()} | {name: value.item() for name, value in metrics.items()}
    assert got == pytest.approx(expected, abs=1e-9)


LOSSES: dict[str, Any] = {
    "clip": lambda x, a, b, m, c: F.ppo_clip_loss(x, a, b, m, clip_low=0.2, clip_high=0.3, dual_clip=3.0, count=c)[0],
    "penalty": lambda x, a, b, m, c: F.kl_penalty_loss(x, a, b, m, beta=0.5, count=c)[0],
    "exact penalty": lambda x, a, b, m, c: F.kl_penalty_loss(a.detach(), a, b, m, beta=0.5, old_kl=x, count=c)[0],
    "surrogate": lambda x, a, b, m, c: F.surrogate_loss(x, a, b, m, count=c)[0],
    "reinforce": lambda x, a, b, m, c: F.reinforce_loss(x, b, m, count=c),
    "value": lambda x, a, b, m, c: F.value_loss(x, a, b, m, clip_range=0.3, count=c)[0],
    "plain value": lambda x, a, b, m, c: F.value_loss(x, a, b, m, clip_range=None, count=c)[0],
    "entropy": lambda x, a, b, m, c: F.entropy_bonus(x, m, count=c),
}


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds, shape=shapes)
def test_junk_outside_the_mask_reaches_neither_loss_nor_gradient(name: str, seed: int, shape: tuple[int, int]) -> None:
    new, old, third, mask = batch(seed, shape)
    clean, junk = new.clone().requires_grad_(), spoil(new, mask).requires_grad_()
    expected = LOSSES[name](clean, old, third, mask, None)
    got = LOSSES[name](junk, spoil(old, mask), spoil(third, mask), mask, None)
    assert_close(got, expected)
    (gradient,), (wanted,) = torch.autograd.grad(got, junk), torch.autograd.grad(expected, clean)
    assert_close(gradient, wanted)
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    new, old, third, mask = batch(3, (3, 4))
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, old, third, mask, None), new.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_with_the_global_count_add_up_in_any_order_of_rows(name: str) -> None:
    """8 rows at once = 8 times one row, permuted, for token means and for sequence means."""
    new, old, third, mask = batch(4, (8, 5))
    for counts in (mask.sum().expand(8, 1), F.sequence_mean_count(mask, 8)):
        whole = LOSSES[name](new, old, third, mask, counts)
        parts = [
            LOSSES[name](*(x[row : row + 1] for x in (new, old, third, mask, counts)))
            for row in (3, 1, 4, 0, 5, 2, 7, 6)
        ]
        assert_close(sum(parts), whole)


def test_metrics_carry_no_gradient() -> None:
    new, old, advantages, mask = batch(0, (2, 3))
    new.requires_grad_()
    metrics = [
        F.ppo_clip_loss(new, old, advantages, mask, clip_low=0.2, clip_high=0.2)[1],
        F.kl_penalty_loss(new, old, advantages, mask, beta=1.0)[1],
        F.value_loss(new, old, advantages, mask, clip_range=0.2)[1],
    ]
    assert not any(value.requires_grad for entries in metrics for value in entries.values())


def test_entropy_bonus_is_the_mean_entropy() -> None:
    entropy = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    assert F.entropy_bonus(entropy, torch.tensor([[True, False], [True, True]])) == 2.0


def test_compute_ppo_total_loss_equals_the_sum_of_its_three_terms_per_step() -> None:
    """L = -mean(min(ρA, clip(ρ)A)) + c1 mean((V - R)²) - c2 mean(S), with the article's ε .2, c1 .5, c2 .01."""
    new, old, advantages, mask = batch(5, (3, 4))
    values, returns, entropy = (numbers(10 + k, 3, 4) for k in range(3))
    everywhere = torch.ones_like(mask)
    for chosen, argument in ((everywhere, None), (mask, mask)):
        total = 0.0
        for row, step in steps(chosen):
            ratio = math.exp(new[row, step] - old[row, step])
            advantage = advantages[row, step].item()
            total -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            total += 0.5 * (values[row, step] - returns[row, step]).item() ** 2 - 0.01 * entropy[row, step].item()
        got = F.compute_ppo_total_loss(new, old, advantages, values, returns, entropy, mask=argument)
        assert got.item() == pytest.approx(total / len(steps(chosen)))


def test_compute_ppo_total_loss_takes_the_articles_positional_arguments_and_any_shape() -> None:
    """Ratio 1, A = 1, V - R = 2, S = 4: -1 + 0.25 · 4 - 0.5 · 4."""
    one = torch.ones(5)
    assert F.compute_ppo_total_loss(one, one, one, 3 * one, one, 4 * one, 0.1, 0.25, 0.5).item() == -2.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"clip_low": 1.0, "clip_high": 0.2}, r"clip_low=1\.0.*must contain 1"),
        ({"clip_low": 0.2, "clip_high": -0.1}, r"clip_high=-0\.1"),
        ({"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.0}, r"dual_clip must be > 1, got 1\.0.*None"),
    ],
)
def test_clip_ranges_out_of_bounds_are_refused(settings: dict[str, float], message: str) -> None:
    zero = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=message):
        F.ppo_clip_loss(zero, zero, zero, ONE, **settings)


def test_a_negative_beta_and_an_empty_value_clip_are_refused() -> None:
    zero = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"beta must be >= 0, got -1\.0"):
        F.kl_penalty_loss(zero, zero, zero, ONE, beta=-1.0)
    with pytest.raises(ValueError, match=r"clip_range must be > 0 or None, got 0\.0"):
        F.value_loss(zero, zero, zero, ONE, clip_range=0.0)
