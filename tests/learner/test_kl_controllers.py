import math

import pytest

from rlhf_ppo.algorithms.penalty_beta import PenaltyBeta
from rlhf_ppo.learner.kl_controllers import AdaptiveKLController, FixedKLController, KLController


def test_the_adaptive_controller_follows_its_equation_and_clips_the_error() -> None:
    """KL 6.6 at target 6 is an error of 0.1: 0.2 · (1 + 0.1 · 100 / 1000) . KL 60 counts as 0.2, KL 0 as -0.2."""
    for kl, factor in ((6.6, 1.01), (6.0, 1.0), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)):
        controller = AdaptiveKLController(0.2, 6.0, 1000)
        controller.update(kl, 100)
        assert controller.value == pytest.approx(0.2 * factor)


def test_a_horizon_far_below_the_batch_leaves_a_coefficient_above_zero() -> None:
    """1 - 0.2 · 512 / 100 = -0.024 would reward the distance from the reference."""
    controller = AdaptiveKLController(0.2, 6.0, 100)
    controller.update(0.0, 512)
    assert controller.value == pytest.approx(0.02)


def test_the_adaptive_controller_settles_where_the_kl_meets_its_target() -> None:
    """A policy whose KL is 1 / kl_coef: the fixed point is kl_coef = 1 / target."""
    controller = AdaptiveKLController(1.0, 5.0, 1000)
    for _ in range(400):
        controller.update(1 / controller.value, 100)
    assert controller.value == pytest.approx(0.2, rel=1e-3)


def test_the_fixed_controller_does_not_move() -> None:
    controller = FixedKLController(0.1)
    controller.update(math.nan, 100)
    assert controller.value == 0.1


def test_the_penalty_doubles_above_and_halves_below_the_band_of_one_and_a_half() -> None:
    """Target 0.3: the band is [0.2, 0.45], its edges included."""
    for kl, expected in ((0.19, 0.5), (0.21, 1.0), (0.44, 1.0), (0.46, 2.0)):
        beta = PenaltyBeta(1.0, 0.3)
        beta.update(kl)
        assert beta.value == expected


@pytest.mark.parametrize("make", [lambda: FixedKLController(0.3), lambda: AdaptiveKLController(0.3, 6.0, 100.0)])
def test_a_controller_continues_from_its_state(make) -> None:  # type: ignore[no-untyped-def]
    first, second = make(), make()
    first.update(20.0, 10)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        assert isinstance(controller, KLController)
        controller.update(3.0, 10)
    assert first.value == second.value


def test_the_penalty_continues_from_its_state() -> None:
    first, second = PenaltyBeta(1.0, 0.01), PenaltyBeta(1.0, 0.01)
    first.update(1.0)
    second.load_state_dict(first.state_dict())
    assert second.value == 2.0


@pytest.mark.parametrize("controller", [AdaptiveKLController(0.2, 6.0, 100), PenaltyBeta(1.0, 0.01)])
@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_refused_and_leaves_the_coefficient(controller: KLController, kl: float) -> None:
    before = controller.value
    with pytest.raises(ValueError, match=r"expected a finite KL, got (nan|inf).*gradient norm"):
        controller.update(kl, 1)
    assert controller.value == before


def test_settings_that_would_move_the_wrong_way_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target=0\.0, horizon=100.*FixedKLController"):
        AdaptiveKLController(0.2, 0.0, 100)
    with pytest.raises(ValueError, match=r"beta=0\.0, target=0\.01.*never moves"):
        PenaltyBeta(0.0, 0.01)
