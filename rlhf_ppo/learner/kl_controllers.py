"""Controllers of the KL coefficient: fixed, or adapted to hold the KL to the reference near a target."""

from typing import Protocol, runtime_checkable

from rlhf_ppo.algorithms.penalty_beta import Coefficient, check_finite_kl

MIN_FACTOR = 0.1
"""Least factor of one update of `AdaptiveKLController`."""


@runtime_checkable
class KLController(Protocol):
    """A KL coefficient that the learner reads, updates once per iteration, and saves."""

    value: float
    """The present coefficient."""

    def update(self, current: float, n_steps: int) -> None:
        """Update the coefficient from the KL that was measured under it."""

    def state_dict(self) -> dict[str, float]:
        """The state that changes over time."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved state."""


class FixedKLController(Coefficient):
    """A constant KL coefficient.

    Args:
        kl_coef: Weight of the KL to the reference.
    """

    def __init__(self, kl_coef: float) -> None:
        super().__init__(kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Do nothing."""


class AdaptiveKLController(Coefficient):
    """A KL coefficient adapted to hold the KL to the reference near a target (Ziegler et al. 2019, §2.2).

        e = clip(KL / target - 1, -0.2, 0.2)
        kl_coef ← kl_coef · max(1 + e · n / horizon, 0.1)

    With n > 4.5 horizons the equation of the paper could make the coefficient 0 or negative, which would reward the
    distance from the reference: it falls to a tenth at most.

    Args:
        init_kl_coef: The coefficient at the start.
        target: KL per response to hold, nats, > 0.
        horizon: Responses over which an error of 1 would double the coefficient, > 0.

    Raises:
        ValueError: The target or the horizon is not positive.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        if not (target > 0 and horizon > 0):
            raise ValueError(
                f"target and horizon must be > 0, got target={target}, horizon={horizon}: the coefficient would move "
                "the wrong way. For a constant coefficient use FixedKLController."
            )
        super().__init__(init_kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Raise the coefficient if the mean KL per response is above the target, lower it if below.

        Args:
            current: Mean over responses of the KL summed over tokens, nats.
            n_steps: Responses it was measured on, over all processes.

        Raises:
            ValueError: The KL is not finite.
        """
        check_finite_kl(current)
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= max(1 + error * n_steps / self.horizon, MIN_FACTOR)
