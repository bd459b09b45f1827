"""β, the adaptive KL coefficient of PPO-penalty."""

import math


class Coefficient:
    """A coefficient whose value is its whole state."""

    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, float]:
        """The value; settings belong to the configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class PenaltyBeta(Coefficient):
    """β of PPO-penalty, which keeps the KL to the *old policy* near a target (Schulman et al. 2017, §4).

        β ← β / 2   where KL < target / 1.5
        β ← β · 2   where KL > target · 1.5

    Args:
        beta: Initial β, > 0.
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
        super().__init__(beta)
        self.target = target

    def update(self, current: float, n_steps: int = 1) -> None:
        """Adapt β to the mean KL(π_old || π_θ) per action after an update.

        Args:
            current: The KL, nats.
            n_steps: Unused: the rule applies once per update.

        Raises:
            ValueError: The KL is not finite.
        """
        check_finite_kl(current)
        if current < self.target / 1.5:
            self.value /= 2
        elif current > self.target * 1.5:
            self.value *= 2


def check_finite_kl(current: float) -> None:
    """Raise ValueError for a KL that is nan or infinite."""
    if not math.isfinite(current):
        raise ValueError(
            f"expected a finite KL, got {current}: the coefficient would be {current} for the rest of the run. "
            "The log-probabilities of this iteration are not finite; check the step's loss and gradient norm."
        )
