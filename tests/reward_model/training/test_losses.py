"""Preference losses against values derived on paper and against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from reward_model.training.losses import (
    bradley_terry_loss,
    centering_penalty,
    davidson_log_probabilities,
    davidson_loss,
    plackett_luce_loss,
    weighted_mean,
)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_pair_of_equal_scores_costs_one_bit() -> None:
    assert_close(bradley_terry_loss(f64(1.5), f64(1.5)), f64(math.log(2)))


def test_bradley_terry_is_minus_log_sigmoid_of_the_difference_less_the_margin() -> None:
    # d = 2, margin 0.5: log(1 + e^-1.5)
    assert_close(bradley_terry_loss(f64(3.0), f64(1.0), margin=f64(0.5)), f64(math.log(1 + math.exp(-1.5))))


def test_a_soft_label_is_fitted_where_sigma_of_the_difference_equals_it() -> None:
    """d/dd [-p log s(d) - (1-p) log s(-d)] = s(d) - p, zero at s(d) = p: d = log(0.8 / 0.2) = log 4."""
    difference = f64(math.log(4.0)).requires_grad_()
    bradley_terry_loss(difference, f64(0.0), preference=f64(0.8)).sum().backward()
    assert_close(difference.grad, f64(0.0), atol=1e-12, rtol=0)


def test_label_smoothing_is_the_soft_label_one_minus_epsilon() -> None:
    chosen, rejected = f64(0.3, 2.0), f64(-1.0, 1.0)
    smoothed = bradley_terry_loss(chosen, rejected, label_smoothing=0.1)
    assert_close(smoothed, bradley_terry_loss(chosen, rejected, preference=f64(0.9, 0.9)))


def test_swapping_a_pair_swaps_its_soft_label() -> None:
    a, b = f64(0.3, 2.0), f64(-1.0, 1.0)
    swapped = bradley_terry_loss(b, a, preference=f64(0.3, 0.1))
    assert_close(bradley_terry_loss(a, b, preference=f64(0.7, 0.9)), swapped)


def test_davidson_probabilities_sum_to_one_and_a_tie_of_equals_has_nu_over_two_plus_nu() -> None:
    probabilities = davidson_log_probabilities(f64(0.0, 1.7), tie_strength=0.5).exp()
    assert_close(probabilities.sum(dim=1), f64(1.0, 1.0))
    assert_close(probabilities[0], f64(1 / 2.5, 1 / 2.5, 0.5 / 2.5))


def test_davidson_with_a_vanishing_tie_strength_is_bradley_terry() -> None:
    chosen, rejected, tie = f64(1.0, -2.0), f64(0.5, 0.0), torch.tensor([False, False])
    loss = davidson_loss(chosen, rejected, tie, tie_strength=1e-12, label_smoothing=0.1)
    assert_close(loss, bradley_terry_loss(chosen, rejected, label_smoothing=0.1), atol=1e-10, rtol=0)


def test_a_tie_pulls_the_scores_together_and_does_not_care_for_order() -> None:
    chosen = f64(1.0).requires_grad_()
    loss = davidson_loss(chosen, f64(0.0), torch.tensor([True]), tie_strength=1.0, margin=f64(5.0))
    loss.sum().backward()
    assert chosen.grad is not None and float(chosen.grad) > 0
    assert_close(loss.detach(), davidson_loss(f64(0.0), f64(1.0), torch.tensor([True]), tie_strength=1.0))


def test_plackett_luce_of_two_items_is_bradley_terry() -> None:
    scores = torch.tensor([[1.0, 0.2], [-1.0, 3.0]], dtype=torch.float64)
    ranks = torch.tensor([[0, 1], [0, 1]])
    loss = plackett_luce_loss(scores, ranks, torch.ones(2, 2, dtype=torch.bool))
    assert_close(loss, bradley_terry_loss(scores[:, 0], scores[:, 1]))


def test_plackett_luce_by_hand() -> None:
    """Scores log 3, log 2, log 1 in this order: 3/6 * 2/3 = 1/3."""
    scores = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64).log()
    loss = plackett_luce_loss(scores, torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool))
    assert_close(loss, f64(math.log(3)))


def test_the_probabilities_of_all_rankings_sum_to_one() -> None:
    from itertools import permutations

    scores = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(4))))
    ranks = torch.arange(4).expand(24, 4)
    loss = plackett_luce_loss(scores[orders], ranks, torch.ones(24, 4, dtype=torch.bool))
    assert_close((-loss).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_items_that_share_the_last_rank_tell_nothing_about_each_other() -> None:
    """Best of four: softmax cross-entropy of the first item (Ziegler et al. 2019)."""
    scores = torch.tensor([[0.5, -1.0, 2.0, 0.1]], dtype=torch.float64)
    loss = plackett_luce_loss(scores, torch.tensor([[0, 1, 1, 1]]), torch.ones(1, 4, dtype=torch.bool))
    assert_close(loss, -scores.log_softmax(dim=1)[:, 0])


def test_padding_of_a_ranking_is_never_read() -> None:
    scores = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    ranks, mask = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool)
    junk = torch.tensor([[math.nan, math.inf]], dtype=torch.float64)
    padded = torch.cat((scores, junk), dim=1).requires_grad_()
    loss = plackett_luce_loss(
        padded, torch.tensor([[0, 1, 2, -1, -1]]), torch.tensor([[True, True, True, False, False]])
    )
    loss.sum().backward()
    assert_close(loss.detach(), plackett_luce_loss(scores, ranks, mask))
    assert padded.grad is not None and torch.isfinite(padded.grad[:, :3]).all()


def test_the_centering_penalty_of_a_pair_is_the_squared_sum() -> None:
    scores = torch.tensor([[1.0, 0.5, math.nan]], dtype=torch.float64)
    assert_close(centering_penalty(scores, torch.tensor([[True, True, False]])), f64(2.25))


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-3, 3))
def test_losses_depend_on_differences_alone(a: float, b: float, shift: float) -> None:
    assert_close(bradley_terry_loss(f64(a + shift), f64(b + shift)), bradley_terry_loss(f64(a), f64(b)))


@pytest.mark.parametrize("weight", [2, 3])
def test_a_weight_counts_as_that_many_equal_comparisons(weight: int) -> None:
    weighted = weighted_mean(f64(1.0, 4.0), f64(1.0, weight))
    assert_close(weighted, f64(1.0, *[4.0] * weight).mean())


def test_parts_of_a_step_add_up_when_they_are_divided_by_the_weight_of_the_whole() -> None:
    losses, weights = f64(1.0, 4.0, 2.0), f64(1.0, 0.5, 2.0)
    parts = [weighted_mean(losses[s], weights[s], weights.sum()) for s in (slice(0, 1), slice(1, 3))]
    assert_close(parts[0] + parts[1], weighted_mean(losses, weights))


def test_comparisons_without_any_weight_give_no_loss_and_no_nan() -> None:
    assert_close(weighted_mean(f64(1.0), f64(0.0)), torch.tensor(0.0, dtype=torch.float64))
