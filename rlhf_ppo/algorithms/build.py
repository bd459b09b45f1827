"""The one place that chooses an algorithm: a `match`, closed by `assert_never`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import assert_never

from rlhf_ppo.algorithms.advantages import EstimateAdvantages, from_groups, from_returns, from_values
from rlhf_ppo.algorithms.config import GRPO, RLOO, TRPO, AlgorithmConfig, PPOClip, PPOPenalty, Reinforce
from rlhf_ppo.algorithms.objectives import clipped, likelihood, objective, penalised, unbounded, with_reference
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.controllers import PenaltyBeta
from rlhf_ppo.updates import (
    Gradients,
    MinibatchConfig,
    MinibatchUpdate,
    Objective,
    TrustRegionUpdate,
    Update,
    UpdateRecord,
)
from rlhf_ppo.updates.measure import reached_kl


@dataclass(frozen=True)
class Algorithm:
    """What is optimised, as two callables."""

    estimate_advantages: EstimateAdvantages
    """Rollout -> TrainBatch."""
    update: Update
    """TrainBatch -> what the update did; moves the parameters."""
    needs_groups: bool = False
    """Whether it compares several responses to one prompt."""


def build_algorithm(
    config: AlgorithmConfig,
    *,
    policy: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
    minibatch: Callable[[], MinibatchConfig],
    seed: int,
    gradients: Gradients | None = None,
) -> Algorithm:
    """The algorithm that `config` names, over one policy, optimiser and set of processes.

    `gradients` replaces autograd's passes in the minibatch updates.
    """

    def reduce_sum(tensor: Tensor) -> Tensor:
        reduced: Tensor = accelerator.reduce(tensor, reduction="sum")
        return reduced

    def update(terms: Objective, sizes: Callable[[], MinibatchConfig] = minibatch) -> MinibatchUpdate:
        return MinibatchUpdate(
            policy=policy, optimizer=optimizer, accelerator=accelerator, objective=terms, config=sizes, seed=seed,
            gradients=gradients,
        )  # fmt: skip

    match config:
        case PPOClip():
            terms = objective(
                clipped(config), critic=config.critic, ent_coef=config.ent_coef,
                clip_low=config.clip_low, clip_high=config.clip_high,
            )  # fmt: skip
            return Algorithm(from_values(config.gae, reduce_sum), update(terms))
        case PPOPenalty():
            beta = PenaltyBeta(config.beta, config.target)

            def penalty(value: float) -> Objective:
                return objective(penalised(value), critic=config.critic, ent_coef=config.ent_coef)

            return Algorithm(
                from_values(config.gae, reduce_sum), AdaptPenalty(update(penalty(beta.value)), beta, penalty)
            )
        case TRPO():
            natural = TrustRegionUpdate(
                policy=policy, optimizer=optimizer, accelerator=accelerator, config=minibatch, seed=seed,
                objective=objective(unbounded, critic=None, ent_coef=config.ent_coef), region=config,
                clip_range_value=config.clip_range_value,
            )  # fmt: skip
            return Algorithm(from_values(config.gae, reduce_sum), natural)
        case Reinforce():
            critic = config.critic if config.learned_baseline else None
            terms = objective(likelihood, critic=critic, ent_coef=config.ent_coef)
            # A second pass would need an importance ratio, which REINFORCE does not have.
            return Algorithm(from_returns(config, reduce_sum), update(terms, lambda: replace(minibatch(), epochs=1)))
        case RLOO():
            terms = objective(clipped(config), critic=None, ent_coef=config.ent_coef)
            return Algorithm(from_groups(config), update(terms), needs_groups=True)
        case GRPO():
            term = with_reference(clipped(config), config.kl_in_loss) if config.kl_in_loss else clipped(config)
            terms = objective(term, critic=None, ent_coef=config.ent_coef)
            return Algorithm(from_groups(config), update(terms), needs_groups=True)
        case _:
            assert_never(config)


class AdaptPenalty:
    """Run an update, then adapt β to the KL it reached (Schulman et al. 2017, §4).

    Args:
        update: Minimises the objective of the present β.
        beta: Follows the KL.
        objective: Of a β.
    """

    def __init__(self, update: MinibatchUpdate, beta: PenaltyBeta, objective: Callable[[float], Objective]) -> None:
        self.inner = update
        self.beta = beta
        self.objective = functools.cache(objective)

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """One update, then β x 2 or β / 2 outside the band around the target, by the KL after its last step."""
        inner = self.inner
        inner.objective = self.objective(self.beta.value)
        record = inner(batch)
        kl = reached_kl(
            inner.policy, batch, inner.accelerator,
            size=inner.config.micro_batch_size, token_budget=inner.config.token_budget,
        )  # fmt: skip
        record.extras = {"policy/beta": self.beta.value, "policy/reached_kl": kl}
        self.beta.update(kl)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Of the update and of β."""
        return {"update": self.inner.state_dict(), "beta": self.beta.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.inner.load_state_dict(state["update"])
        self.beta.load_state_dict(state["beta"])
