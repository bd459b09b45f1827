import math
import statistics

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil, steps

MASK = torch.tensor([[True, True, False], [False, True, False]])


def test_masked_sum_and_mean_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, math.nan], [math.inf, 6.0, -math.inf]])
    assert_close(F.masked_sum(x, MASK), torch.tensor(9.0))
    assert_close(F.masked_mean(x, MASK), torch.tensor(3.0))
    assert_close(F.masked_mean(x, MASK, 9), torch.tensor(1.0))


def test_an_empty_mask_has_mean_zero() -> None:
    assert F.masked_mean(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_micro_batches_divided_by_the_global_count_add_up_to_the_mean() -> None:
    x, mask = numbers(0, 4, 5), random_mask(0, 4, 5)
    count = mask.sum()
    parts = [F.masked_mean(x[rows], mask[rows], count) for rows in (slice(0, 1), slice(1, 4))]
    assert_close(sum(parts), F.masked_mean(x, mask))


def test_sequence_mean_count_gives_the_mean_of_the_sequences_own_means() -> None:
    """Rows (1, 2) and (6): token mean 3, sequence mean (1.5 + 6) / 2 = 3.75."""
    x = torch.tensor([[1.0, 2.0, 0.0], [0.0, 6.0, 0.0]])
    assert_close(F.masked_mean(x, MASK, F.sequence_mean_count(MASK, 2)), torch.tensor(3.75))


@pytest.mark.parametrize("unbiased", [True, False])
@given(seed=seeds, shape=shapes)
def test_masked_var_is_the_variance_of_the_kept_numbers(unbiased: bool, seed: int, shape: tuple[int, int]) -> None:
    x, mask = numbers(seed, *shape), random_mask(seed, *shape)
    kept = x[mask].tolist()
    if len(kept) < 2:
        expected = 0.0
    else:
        expected = statistics.variance(kept) if unbiased else statistics.pvariance(kept)
    got = F.masked_var(spoil(x, mask), mask, unbiased=unbiased)
    assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("unbiased, first", [(False, -0.4 / math.sqrt(0.6 / 9)), (True, -0.4 / math.sqrt(0.6 / 8))])
def test_whiten_divides_by_the_named_variance_and_keeps_the_mean_on_request(unbiased: bool, first: float) -> None:
    """1.2, 1.3, ..., 2.0: mean 1.6, squares around it sum to 0.6."""
    x = torch.arange(12, 21, dtype=torch.float64).view(3, 3) / 10
    mask = torch.ones(3, 3, dtype=torch.bool)
    assert_close(F.whiten(x, mask, unbiased=unbiased, eps=0.0)[0, 0].item(), first)
    assert_close(F.whiten(x, mask, unbiased=unbiased, eps=0.0, shift_mean=False)[0, 0].item(), first + 1.6)


def test_whiten_puts_eps_inside_the_root() -> None:
    """±1 has biased variance 1; with eps 3 the divisor is √4."""
    x = torch.tensor([[1.0, -1.0]])
    whitened = F.whiten(x, torch.ones(1, 2, dtype=torch.bool), unbiased=False, eps=3.0)
    assert_close(whitened, torch.tensor([[0.5, -0.5]]))


@given(seed=seeds, shape=shapes)
def test_whiten_equals_a_loop_and_ignores_junk(seed: int, shape: tuple[int, int]) -> None:
    x, mask = numbers(seed, *shape), random_mask(seed, *shape)
    kept = x[mask].tolist()
    mean = sum(kept) / len(kept)
    variance = sum((k - mean) ** 2 for k in kept) / max(len(kept) - 1, 1)
    expected = torch.zeros_like(x)
    for row, step in steps(mask):
        expected[row, step] = (x[row, step] - mean) / math.sqrt(variance + 1e-8)
    assert_close(F.whiten(spoil(x, mask), mask), expected)


def test_whiten_of_a_single_step_is_zero_and_not_nan() -> None:
    """n - 1 = 0 there: the classic trainer returned nan for a batch of one one-token response."""
    mask = torch.tensor([[False, True]])
    x = torch.tensor([[math.nan, 5.0]])
    assert_close(F.whiten(x, mask), torch.tensor([[0.0, 0.0]]))
    assert_close(F.whiten(x, mask, shift_mean=False), torch.tensor([[0.0, 5.0]]))


def test_whiten_over_two_processes_equals_whitening_their_joint_batch() -> None:
    x, mask = numbers(3, 4, 5), random_mask(3, 4, 5)
    mine, theirs = slice(0, 2), slice(2, 4)
    joint = F.whiten(x, mask)
    other, mean = x[theirs][mask[theirs]], x[mask].mean()
    answers = iter([torch.stack([other.sum(), torch.tensor(float(len(other)))]), (other - mean).square().sum()])
    assert_close(F.whiten(x[mine], mask[mine], reduce_sum=lambda part: part + next(answers)), joint[mine])


def test_whiten_raises_half_precision_to_float32() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)
    assert F.whiten(x, torch.ones(1, 3, dtype=torch.bool)).dtype == torch.float32


@given(seed=seeds, shape=shapes)
def test_junk_outside_the_mask_reaches_no_gradient(seed: int, shape: tuple[int, int]) -> None:
    mask = random_mask(seed, *shape)
    for function in (F.masked_mean, F.masked_var, lambda x, m: F.whiten(x, m).square().sum()):
        clean = numbers(seed, *shape).requires_grad_()
        junk = spoil(clean.detach(), mask).requires_grad_()
        (expected,) = torch.autograd.grad(function(clean, mask), clean)
        (got,) = torch.autograd.grad(function(junk, mask), junk)
        assert_close(got, expected)
        assert (got[~mask] == 0).all()


def test_gradients_agree_with_finite_differences() -> None:
    x, mask = numbers(1, 3, 4).requires_grad_(), random_mask(1, 3, 4)
    for function in (F.masked_sum, F.masked_mean, F.masked_var, F.whiten):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, mask), x)


def test_last_action_is_the_last_true_of_each_row_whatever_the_gaps() -> None:
    mask = torch.tensor([[True, False, True, False], [True, False, False, False], [False, False, False, True]])
    assert F.last_action_index(mask).tolist() == [2, 0, 3]


def test_last_action_names_the_rows_without_actions() -> None:
    mask = torch.tensor([[True, False], [False, False], [False, False]])
    with pytest.raises(ValueError, match=r"at least one action, got none in row\(s\) \[1, 2\].*Drop these samples"):
        F.last_action_index(mask)


@pytest.mark.usefixtures("unchecked")
def test_a_mask_of_numbers_or_of_another_shape_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.bool.*got torch\.int64.*mask\.bool\(\)"):
        F.masked_mean(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(1, 3\).*Trim both"):
        F.masked_mean(torch.zeros(2, 3), torch.ones(1, 3, dtype=torch.bool))
