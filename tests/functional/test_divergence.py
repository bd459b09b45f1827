import math

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import functional as F
from rlhf_ppo.functional import DivergenceKind
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil, steps

KINDS: tuple[DivergenceKind, ...] = ("tv", "kl")


def batch(seed: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probs of tokens between one in a hundred and almost certain, advantages, mask."""
    old = -0.01 - numbers(seed, *shape).abs() * 1.5
    new = torch.minimum(old + 0.5 * numbers(seed + 1, *shape), torch.full_like(old, -0.001))
    return new, old, numbers(seed + 2, *shape), random_mask(seed, *shape)


def distance(new: float, old: float, kind: str) -> float:
    """Between two coins."""
    p, q = math.exp(new), math.exp(old)
    return abs(p - q) if kind == "tv" else q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, shape=shapes)
def test_the_masked_loss_and_its_gradient_equal_a_loop_per_token(
    kind: DivergenceKind, seed: int, shape: tuple[int, int]
) -> None:
    new, old, advantages, mask = batch(seed, shape)
    total, dropped, gradient = 0.0, 0, torch.zeros_like(new)
    for row, step in steps(mask):
        n, o, a = (x[row, step].item() for x in (new, old, advantages))
        if distance(n, o, kind) > 0.05 and (n - o) * a > 0:
            dropped += 1
            continue
        total -= math.exp(n - o) * a
        gradient[row, step] = -math.exp(n - o) * a / len(steps(mask))
    junk = spoil(new, mask).requires_grad_()
    loss, metrics = F.divergence_masked_loss(
        junk, spoil(old, mask), spoil(advantages, mask), mask, kind=kind, threshold=0.05
    )
    assert loss.item() == pytest.approx(total / len(steps(mask)), abs=1e-9)
    assert metrics["clip_fraction"].item() == pytest.approx(dropped / len(steps(mask)))
    assert_close(torch.autograd.grad(loss, junk)[0], gradient)


def test_a_rare_token_may_treble_where_a_clip_would_stop_it_and_a_frequent_one_may_not() -> None:
    """0.001 to 0.003 moves 0.002 of the mass; 0.70 to 0.83, a ratio inside the clip, moves 0.13."""
    old = torch.tensor([[0.001, 0.70]], dtype=torch.float64).log()
    new = torch.tensor([[0.003, 0.83]], dtype=torch.float64).log().requires_grad_()
    ones, mask = torch.ones_like(old), torch.ones(1, 2, dtype=torch.bool)
    by_divergence, _ = F.divergence_masked_loss(new, old, ones, mask, kind="tv", threshold=0.1)
    by_ratio, _ = F.ppo_clip_loss(new, old, ones, mask, clip_low=0.2, clip_high=0.2)
    assert [bool(x) for x in torch.autograd.grad(by_divergence, new)[0][0]] == [True, False]
    assert [bool(x) for x in torch.autograd.grad(by_ratio, new)[0][0]] == [False, True]


def test_the_binary_kl_of_an_almost_certain_token_is_finite() -> None:
    logprobs, old = torch.tensor([0.0, -1e-9]), torch.tensor([-1e-9, 0.0])
    assert torch.isfinite(F.binary_divergence(logprobs, old, "kl")).all()


@pytest.mark.usefixtures("unchecked")
def test_wrong_thresholds_and_kinds_are_refused() -> None:
    zero, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"threshold must be > 0, got 0\.0"):
        F.divergence_masked_loss(zero, zero, zero, mask, kind="tv", threshold=0.0)
    with pytest.raises(ValueError, match=r"'tv' or 'kl', got 'js'"):
        F.binary_divergence(zero, zero, "js")  # type: ignore[arg-type]
