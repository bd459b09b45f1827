"""GSPO, CISPO and the likelihood of good responses against loops over tokens."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil, steps


def batch(seed: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probabilities, advantages, mask."""
    old = -numbers(seed, *shape).abs() - 0.1
    return old + 0.4 * numbers(seed + 1, *shape), old, numbers(seed + 2, *shape), random_mask(seed, *shape)


def gspo_by_loop(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> float:
    """-1/N Σ_i 1/|y_i| Σ_t min(s_i Â_it, clip(s_i) Â_it), the ratio s_i by probabilities of whole sequences."""
    total = 0.0
    for row, line in enumerate(mask):
        own = line.nonzero().flatten().tolist()
        probability = math.prod(math.exp(float(new[row, t])) for t in own)
        old_probability = math.prod(math.exp(float(old[row, t])) for t in own)
        s = (probability / old_probability) ** (1 / len(own))
        clipped = min(max(s, 1 - low), 1 + high)
        total += sum(min(s * float(advantages[row, t]), clipped * float(advantages[row, t])) for t in own) / len(own)
    return -total / len(mask)


@given(seed=seeds, shape=shapes)
def test_gspo_equals_a_loop_over_sequences(seed: int, shape: tuple[int, int]) -> None:
    new, old, advantages, mask = batch(seed, shape)
    loss, _ = F.gspo_loss(
        spoil(new, mask), spoil(old, mask), spoil(advantages, mask), mask, clip_low=0.1, clip_high=0.2
    )
    assert loss.item() == pytest.approx(gspo_by_loop(new, old, advantages, mask, 0.1, 0.2), rel=1e-9)


@given(seed=seeds, shape=shapes)
def test_the_gradient_of_gspo_is_the_slope_of_its_value(seed: int, shape: tuple[int, int]) -> None:
    """With one advantage per response."""
    new, old, advantages, mask = batch(seed, shape)
    advantages = advantages[:, :1].expand(shape)
    junk = spoil(new, mask).requires_grad_()
    loss, _ = F.gspo_loss(junk, spoil(old, mask), advantages, mask, clip_low=0.1, clip_high=0.2)
    (gradient,) = torch.autograd.grad(loss, junk)
    h, slopes = 1e-6, torch.zeros_like(new)
    for row, step in steps(mask):
        shift = torch.zeros_like(new)
        shift[row, step] = h
        up, down = (gspo_by_loop(new + sign * shift, old, advantages, mask, 0.1, 0.2) for sign in (1, -1))
        slopes[row, step] = (up - down) / (2 * h)
    assert_close(gradient, slopes, atol=1e-6, rtol=1e-5)


def test_a_long_response_counts_as_much_as_a_short_one_and_is_cut_as_a_whole() -> None:
    """Log-ratios 0.3 and -0.1 have mean 0.1: s = e^0.1 > 1.05 cuts both tokens, though one of them fell."""
    old = torch.full((2, 2), -1.0, dtype=torch.float64)
    new = torch.tensor([[-0.7, -1.1], [-1.0, math.nan]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, metrics = F.gspo_loss(new, old, torch.ones_like(old), mask, clip_low=0.05, clip_high=0.05)
    assert loss.item() == pytest.approx(-(1.05 + 1) / 2)
    assert metrics["clip_fraction"].item() == pytest.approx(0.5)
    assert torch.autograd.grad(loss, new)[0].tolist() == [[0.0, 0.0], [-0.5, 0.0]]


@pytest.mark.parametrize("drop", [False, True])
@given(seed=seeds, shape=shapes)
def test_cispo_equals_a_loop_and_bounds_or_drops_what_is_beyond(drop: bool, seed: int, shape: tuple[int, int]) -> None:
    new, old, advantages, mask = batch(seed, shape)
    total, cut, gradient, count = 0.0, 0, torch.zeros_like(new), len(steps(mask))
    for row, step in steps(mask):
        n, o, a = (float(x[row, step]) for x in (new, old, advantages))
        weight, is_cut = min(max(math.exp(n - o), 0.9), 1.3), not 0.9 <= math.exp(n - o) <= 1.3
        weight = 0.0 if drop and is_cut else weight
        cut += is_cut
        total -= weight * a * n / count
        gradient[row, step] = -weight * a / count
    junk = spoil(new, mask).requires_grad_()
    loss, metrics = F.cispo_loss(
        junk, spoil(old, mask), spoil(advantages, mask), mask, min_weight=0.9, max_weight=1.3, drop=drop
    )
    assert loss.item() == pytest.approx(total, abs=1e-9)
    assert metrics["clip_fraction"].item() == pytest.approx(cut / count)
    assert_close(torch.autograd.grad(loss, junk)[0], gradient)


def test_at_the_old_policy_cispo_and_gspo_have_the_gradient_of_the_policy_gradient() -> None:
    """All ratios are 1: -Â over the number of tokens; GSPO's over the length and the number of sequences."""
    new, _, advantages, mask = batch(3, (3, 4))
    new.requires_grad_()
    cispo, _ = F.cispo_loss(new, new.detach(), advantages, mask, min_weight=0.0, max_weight=1.0)
    assert_close(torch.autograd.grad(cispo, new)[0], -(advantages * mask) / mask.sum())
    gspo, _ = F.gspo_loss(new, new.detach(), advantages, mask, clip_low=3e-4, clip_high=4e-4)
    assert_close(torch.autograd.grad(gspo, new)[0], -(advantages * mask) / mask.sum(1, keepdim=True) / 3)


def test_micro_batches_of_gspo_add_up() -> None:
    new, old, advantages, mask = batch(5, (4, 5))
    whole, _ = F.gspo_loss(new, old, advantages, mask, clip_low=0.1, clip_high=0.1)
    parts = [
        F.gspo_loss(
            new[rows], old[rows], advantages[rows], mask[rows], clip_low=0.1, clip_high=0.1,
            count=F.sequence_mean_count(mask[rows], 4),
        )[0]
        for rows in ([0], [1, 2, 3])
    ]  # fmt: skip
    assert_close(parts[0] + parts[1], whole)


def test_good_responses_earn_the_mean_log_likelihood_of_their_tokens() -> None:
    """Scores 1, 0, 1 above 0.5: rows 0 and 2, with 1 + 2 of 5 tokens; the loss is -0.1 times their mean, junk apart."""
    logprobs = torch.tensor([[-1.0, math.nan], [-5.0, -5.0], [-2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    scores = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    weights = F.positive_example_weights(scores, mask, coef=0.1, threshold=0.5, share=3 / 5)
    loss = F.weighted_nll_loss(logprobs, spoil(weights, mask), mask)
    assert loss.item() == pytest.approx(0.1 * (1 + 2 + 3) / 3)
    expected = torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.float64) * -0.1 / 3
    assert_close(torch.autograd.grad(loss, logprobs)[0], expected)
    nobody = F.positive_example_weights(scores - 1, mask, coef=0.1, threshold=0.5, share=0.0)
    assert not nobody.any()


@pytest.mark.usefixtures("unchecked")
def test_weights_that_do_not_contain_one_are_refused() -> None:
    ones, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"min_weight <= 1 <= max_weight, got 0\.0 and 0\.5"):
        F.cispo_loss(ones, ones, ones, mask, min_weight=0.0, max_weight=0.5)
