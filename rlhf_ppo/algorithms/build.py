"""The one place that chooses an algorithm: a `match`, closed by `assert_never`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from typing_extensions import assert_never

from rlhf_ppo.algorithms.advantages import (
    EstimateAdvantages,
    gae_advantages,
    group_baseline,
    group_relative_advantages,
    learned_baseline,
    monte_carlo_advantages,
    moving_baseline,
    no_baseline,
    return_advantages,
)
from rlhf_ppo.algorithms.baselines import MovingBaseline, UpdateWithBaseline
from rlhf_ppo.algorithms.config import (
    GAE,
    GRPO,
    RLOO,
    TRPO,
    AlgorithmConfig,
    BatchMean,
    Critic,
    LearnedValue,
    MovingMean,
    PPOClip,
    PPOPenalty,
    Reinforce,
    ReinforcePlusPlus,
)
from rlhf_ppo.algorithms.objectives import (
    clipped_surrogate,
    kl_penalized_surrogate,
    mean_over_sequences,
    policy_gradient,
    surrogate,
)
from rlhf_ppo.algorithms.parts import AlgorithmParts
from rlhf_ppo.algorithms.penalty import AdaptiveBetaUpdate, OldPolicyKeeper
from rlhf_ppo.algorithms.penalty_beta import PenaltyBeta
from rlhf_ppo.algorithms.warmup import CriticWarmup
from rlhf_ppo.functional import ReferenceKL
from rlhf_ppo.updates import Gradients, MinibatchConfig, Objective, TrustRegionUpdate, Update, count_sequences


@dataclass(frozen=True)
class Algorithm:
    """What is optimized, as two callables."""

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
    reference_kl: ReferenceKL | None = None,
    reference: nn.Module | None = None,
) -> Algorithm:
    """The algorithm that `config` names, over one policy, optimizer and set of processes.

    Args:
        config: Which, and its settings.
        policy: The prepared policy.
        optimizer: Its prepared optimizer.
        accelerator: Of both.
        minibatch: Sizes of passes and steps, asked at each update.
        seed: Of shuffles. The same on all processes.
        reference_kl: The KL to the reference in the loss, weighed by `Rollout.reference_kl_coef`; None: there is none.
        reference: The prepared reference, read by `reference_kl="full"` alone.
        gradients: Replaces autograd's passes in the minibatch updates and in fits of the critic.
    """
    parts = AlgorithmParts(
        policy=policy, optimizer=optimizer, accelerator=accelerator, minibatch=minibatch, seed=seed,
        reference_kl=reference_kl, reference=reference, gradients=gradients,
    )  # fmt: skip
    match config:
        case PPOClip():
            terms = parts.total_objective(
                clipped_surrogate(config), critic=config.critic, ent_coef=config.ent_coef, clip_low=config.clip_low,
                clip_high=config.clip_high,
            )  # fmt: skip
            return _with_values(parts, config.gae, config.critic, terms, parts.update(terms))
        case PPOPenalty():
            return _ppo_penalty(parts, config)
        case TRPO():
            natural = TrustRegionUpdate(
                policy=policy, optimizer=optimizer, accelerator=accelerator, config=minibatch, seed=seed,
                objective=parts.total_objective(surrogate, critic=None, ent_coef=config.ent_coef), region=config,
                clip_range_value=config.clip_range_value, compare_with=parts.reference_argument, gradients=gradients,
            )  # fmt: skip
            return Algorithm(gae_advantages(config.gae, parts.reduce_sum), natural)
        case Reinforce():
            return _reinforce(parts, config)
        case ReinforcePlusPlus():
            terms = parts.total_objective(clipped_surrogate(config), critic=None, ent_coef=config.ent_coef)
            estimate = return_advantages(group_baseline(config), parts.reduce_sum, gamma=config.gamma)
            return Algorithm(estimate, parts.update(terms), needs_groups=config.group_baseline)
        case RLOO():
            terms = parts.total_objective(clipped_surrogate(config), critic=None, ent_coef=config.ent_coef)
            return Algorithm(group_relative_advantages(config), parts.update(terms), needs_groups=True)
        case GRPO():
            terms = parts.total_objective(clipped_surrogate(config), critic=None, ent_coef=config.ent_coef)
            update = (
                parts.update(mean_over_sequences(terms), count=count_sequences)
                if config.sequence_mean
                else parts.update(terms)
            )
            return Algorithm(group_relative_advantages(config), update, needs_groups=True)
        case _:
            assert_never(config)


def _with_values(parts: AlgorithmParts, config: GAE, critic: Critic, terms: Objective, update: Update) -> Algorithm:
    """An algorithm with GAE, after the critic's warm-up if one is asked for."""
    estimate = gae_advantages(config, parts.reduce_sum)
    return _warmed(parts, critic, terms, update, estimate, monte_carlo_advantages(config, parts.reduce_sum))


def _warmed(
    parts: AlgorithmParts,
    critic: Critic,
    terms: Objective,
    update: Update,
    estimate: EstimateAdvantages,
    monte_carlo_advantages: EstimateAdvantages,
) -> Algorithm:
    if not critic.warmup_iterations:
        return Algorithm(estimate, update)
    fit = parts.critic_fit(critic.clip_range_value)
    warmup = CriticWarmup(update, fit, terms, parts.accelerator, critic.warmup_iterations)
    return Algorithm(warmup.estimating(estimate, monte_carlo_advantages), warmup)


def _ppo_penalty(parts: AlgorithmParts, config: PPOPenalty) -> Algorithm:
    beta = PenaltyBeta(config.beta, config.target_kl)
    old = OldPolicyKeeper(parts.module, parts.minibatch) if config.exact else None

    def penalty(weight: float) -> Objective:
        return parts.total_objective(kl_penalized_surrogate(weight), critic=config.critic, ent_coef=config.ent_coef)

    terms = penalty(beta.value)
    compare_with = None if old is None else old.compare_with
    update = AdaptiveBetaUpdate(parts.update(terms, compare_with=compare_with), beta, penalty)
    return _with_values(parts, config.gae, config.critic, terms, update if old is None else old.around(update))


def _reinforce(parts: AlgorithmParts, config: Reinforce) -> Algorithm:
    def update(critic: Critic | None) -> tuple[Objective, Update]:
        terms = parts.total_objective(policy_gradient, critic=critic, ent_coef=config.ent_coef)
        # A second pass would need an importance ratio, which REINFORCE does not have.
        return terms, parts.update(terms, sizes=lambda: replace(parts.minibatch(), epochs=1))

    reduce_sum, gamma, scale = parts.reduce_sum, config.gamma, config.normalize_std
    match config.baseline:
        case None:
            return Algorithm(
                return_advantages(no_baseline, reduce_sum, gamma=gamma, shift_mean=False, scale=scale), update(None)[1]
            )
        case BatchMean():
            return Algorithm(return_advantages(no_baseline, reduce_sum, gamma=gamma, scale=scale), update(None)[1])
        case MovingMean(decay=decay):
            moving = MovingBaseline(decay)
            baseline = moving_baseline(moving, reduce_sum)
            estimate = return_advantages(baseline, reduce_sum, gamma=gamma, shift_mean=False, scale=scale)
            return Algorithm(estimate, UpdateWithBaseline(update(None)[1], moving))
        case LearnedValue(critic=critic):
            estimate = return_advantages(learned_baseline, reduce_sum, gamma=gamma, scale=scale, bootstrap=True)
            return _warmed(parts, critic, *update(critic), estimate, estimate)
        case _:
            assert_never(config.baseline)
