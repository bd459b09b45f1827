"""Importance weights between a sampler and the trainer."""

import math

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil


def test_the_weight_is_the_ratio_of_probabilities_up_to_the_cap() -> None:
    """Probabilities 1/2 against 1/4, 1/8 and 1/2 give ratios 2, 4 and 1; the cap 3 cuts the second alone."""
    trainer = torch.full((1, 3), math.log(0.5), dtype=torch.float64)
    sampler = torch.tensor([[0.25, 0.125, 0.5]], dtype=torch.float64).log()
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert_close(F.importance_ratio(trainer, sampler, mask), torch.tensor([[2.0, 4.0, 1.0]], dtype=torch.float64))
    weights = F.truncated_importance_weights(trainer, sampler, mask, cap=3.0)
    assert_close(weights, torch.tensor([[2.0, 3.0, 1.0]], dtype=torch.float64))


def test_weighted_samples_of_one_distribution_have_the_mean_of_the_other() -> None:
    """E_μ[min(π/μ, ∞) f] = E_π[f], here summed exactly over three tokens."""
    sampler = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    trainer = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    f = torch.tensor([1.0, -2.0, 7.0], dtype=torch.float64)
    weights = F.truncated_importance_weights(
        trainer.log(), sampler.log(), torch.ones(3, dtype=torch.bool), cap=math.inf
    )
    assert_close((sampler * weights * f).sum(), (trainer * f).sum())


@given(shapes, seeds)
def test_junk_outside_the_mask_reaches_no_weight(shape: tuple[int, int], seed: int) -> None:
    mask = random_mask(seed, *shape)
    trainer, sampler = numbers(seed, *shape), numbers(seed + 9, *shape)
    clean = F.truncated_importance_weights(trainer, sampler, mask, cap=2.0)
    assert_close(F.truncated_importance_weights(spoil(trainer, mask), spoil(sampler, mask), mask, cap=2.0), clean)
    assert (clean[~mask] == 1).all() and (clean <= 2).all() and (clean > 0).all()


def test_weights_carry_no_gradient() -> None:
    trainer = torch.zeros(1, 2, requires_grad=True)
    weights = F.truncated_importance_weights(trainer, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), cap=2.0)
    assert not weights.requires_grad


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cap must be >= 1, got 0\.5: .* Usual: 2\.0"):
        F.truncated_importance_weights(torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), cap=0.5)


@given(shape=shapes, seed=seeds)
def test_every_kind_of_weight_equals_a_loop(shape: tuple[int, int], seed: int) -> None:
    mask, trainer, sampler = random_mask(seed, *shape), numbers(seed, *shape), numbers(seed + 9, *shape)
    low, high = 0.5, 1.5
    for level in ("token", "sequence", "geometric"):
        for mode in ("truncate", "mask", "keep"):
            expected = torch.ones_like(trainer)
            for row, line in enumerate(mask):
                own = line.nonzero().flatten().tolist()
                ratios = {t: math.exp(float(trainer[row, t] - sampler[row, t])) for t in own}
                product = math.prod(ratios.values())
                for t in own:
                    w = {"token": ratios[t], "sequence": product, "geometric": product ** (1 / len(own))}[level]
                    kept = low <= w <= high
                    expected[row, t] = {"truncate": min(w, high), "mask": w * kept, "keep": float(kept)}[mode]
            found = F.importance_weights(
                spoil(trainer, mask), spoil(sampler, mask), mask, level=level, mode=mode, low=low, high=high
            )
            assert_close(found, expected)


def test_ratios_beyond_the_range_of_float32_are_summed_as_logarithms() -> None:
    """e^200 and e^-200 have the product 1; each alone is inf or 0 in float32, and their product nan."""
    trainer, mask = torch.tensor([[200.0, -200.0, 0.3]]) - 300, torch.ones(1, 3, dtype=torch.bool)
    for level, expected in (("sequence", math.exp(0.3)), ("geometric", math.exp(0.1))):
        weights = F.importance_weights(
            trainer, torch.full((1, 3), -300.0), mask, level=level, mode="mask", low=0.5, high=5.0
        )
        assert_close(weights, torch.full((1, 3), expected), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("unchecked")
def test_bounds_without_one_are_refused() -> None:
    ones, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"low <= 1 <= high, got 0\.0 and 0\.9"):
        F.importance_weights(ones, ones, mask, level="token", mode="truncate", low=0.0, high=0.9)
