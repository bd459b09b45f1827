"""Coefficients that follow a measured KL: to the reference (in the reward), or to the old policy (in the loss)."""

import math
from typing import Protocol, runtime_checkable


@runtime_checkable
class Controller(Protocol):
    """A coefficient that a trainer reads, then updates once per iteration, and saves."""

    value: float

    def update(self, current: float, n_steps: int) -> None:
        """Follow the KL measured while `value` was in force."""

    def state_dict(self) -> dict[str, float]:
        """What changes over time."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved state."""


class FixedKLController:
    """A KL coefficient that stays what it is.

    Args:
        kl_coef: Weight of the KL to the reference.
    """

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved coefficient."""
        self.value = state["value"]


class AdaptiveKLController:
    """Steers the KL to the reference towards a target (Ziegler et al. 2019, §2.2).

        e = clip(KL / target - 1, -0.2, 0.2)
        kl_coef ← kl_coef · (1 + e · n / horizon)

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
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Follow the mean KL per response.

        Args:
            current: Mean over responses of the KL summed over tokens, nats.
            n_steps: Responses it was measured on, over all processes.

        Raises:
            ValueError: The KL is not finite.
        """
        _check_finite(current)
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The coefficient; target and horizon belong to the configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved coefficient."""
        self.value = state["value"]


class PenaltyBeta:
    """β of PPO-penalty, which holds the KL to the *old policy* near a target (Schulman et al. 2017, §4).

        β ← β / 2   where KL < target / 1.5
        β ← β · 2   where KL > target · 1.5

    Args:
        beta: β at the start, > 0.
        target: Mean KL per action of one update, nats, > 0.

    Raises:
        ValueError: β or the target is not positive.
    """

    def __init__(self, beta: float, target: float) -> None:
        if not (beta > 0 and target > 0):
            raise ValueError(
                f"beta and target must be > 0, got beta={beta}, target={target}: β only doubles and halves, so "
                "from 0 it never moves. The article starts at beta=1.0 with targets of 0.003 to 0.03."
            )
        self.value = beta
        self.target = target

    def update(self, current: float, n_steps: int = 1) -> None:
        """Follow the mean KL(π_old || π_θ) per action after an update.

        Args:
            current: The KL, nats.
            n_steps: Not used: the rule looks at one update at a time.

        Raises:
            ValueError: The KL is not finite.
        """
        _check_finite(current)
        if current < self.target / 1.5:
            self.value /= 2
        elif current > self.target * 1.5:
            self.value *= 2

    def state_dict(self) -> dict[str, float]:
        """The current β; the target belongs to the configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved β."""
        self.value = state["value"]


def _check_finite(current: float) -> None:
    if not math.isfinite(current):
        raise ValueError(
            f"expected a finite KL, got {current}: the coefficient would be {current} for the rest of the run. "
            "The log-probabilities of this iteration are broken; look at the step's loss and gradient norm."
        )
