"""The one place that chooses an algorithm: a `match`, closed by `assert_never`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from typing_extensions import assert_never

from rlhf_ppo.algorithms.advantages import (
    EstimateAdvantages,
    from_groups,
    from_returns,
    from_values,
    group_baseline,
    learned_baseline,
    monte_carlo,
    moving_baseline,
    no_baseline,
)
from rlhf_ppo.algorithms.baselines import MovingBaseline, WithBaseline
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
from rlhf_ppo.algorithms.objectives import bounded, likelihood, penalized, per_sequence, unbounded
from rlhf_ppo.algorithms.parts import Parts
from rlhf_ppo.algorithms.penalty import AdaptPenalty, KeepOldPolicy
from rlhf_ppo.algorithms.penalty_beta import PenaltyBeta
from rlhf_ppo.algorithms.warmup import CriticWarmup
from rlhf_ppo.functional import ReferenceKL
from rlhf_ppo.updates import Gradients, MinibatchConfig, Objective, TrustRegionUpdate, Update, sequences


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
    parts = Parts(
        policy=policy, optimizer=optimizer, accelerator=accelerator, minibatch=minibatch, seed=seed,
        reference_kl=reference_kl, reference=reference, gradients=gradients,
    )  # fmt: skip
    match config:
        case PPOClip():
            clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
            terms = parts.objective(bounded(config), critic=config.critic, ent_coef=config.ent_coef, **clip)
            return _with_values(parts, config.gae, config.critic, terms, parts.update(terms))
        case PPOPenalty():
            return _ppo_penalty(parts, config)
        case TRPO():
            natural = TrustRegionUpdate(
                policy=policy, optimizer=optimizer, accelerator=accelerator, config=minibatch, seed=seed,
                objective=parts.objective(unbounded, critic=None, ent_coef=config.ent_coef), region=config,
                clip_range_value=config.clip_range_value, compare_with=parts.with_reference, gradients=gradients,
            )  # fmt: skip
            return Algorithm(from_values(config.gae, parts.reduce_sum), natural)
        case Reinforce():
            return _reinforce(parts, config)
        case ReinforcePlusPlus():
            terms = parts.objective(bounded(config), critic=None, ent_coef=config.ent_coef)
            estimate = from_returns(group_baseline(config), parts.reduce_sum, gamma=config.gamma)
            return Algorithm(estimate, parts.update(terms), needs_groups=config.group_baseline)
        case RLOO():
            terms = parts.objective(bounded(config), critic=None, ent_coef=config.ent_coef)
            return Algorithm(from_groups(config), parts.update(terms), needs_groups=True)
        case GRPO():
            terms = parts.objective(bounded(config), critic=None, ent_coef=config.ent_coef)
            update = parts.update(per_sequence(terms), count=sequences) if config.sequence_mean else parts.update(terms)
            return Algorithm(from_groups(config), update, needs_groups=True)
        case _:
            assert_never(config)


def _with_values(parts: Parts, config: GAE, critic: Critic, terms: Objective, update: Update) -> Algorithm:
    """An algorithm with GAE, after the critic's warm-up if one is asked for."""
    estimate = from_values(config, parts.reduce_sum)
    return _warmed(parts, critic, terms, update, estimate, monte_carlo(config, parts.reduce_sum))


def _warmed(
    parts: Parts,
    critic: Critic,
    terms: Objective,
    update: Update,
    estimate: EstimateAdvantages,
    monte_carlo: EstimateAdvantages,
) -> Algorithm:
    if not critic.warmup_iterations:
        return Algorithm(estimate, update)
    fit = parts.critic_fit(critic.clip_range_value)
    warmup = CriticWarmup(update, fit, terms, parts.accelerator, critic.warmup_iterations)
    return Algorithm(warmup.estimating(estimate, monte_carlo), warmup)


def _ppo_penalty(parts: Parts, config: PPOPenalty) -> Algorithm:
    beta = PenaltyBeta(config.beta, config.target_kl)
    old = KeepOldPolicy(parts.module, parts.minibatch) if config.exact else None

    def penalty(weight: float) -> Objective:
        return parts.objective(penalized(weight), critic=config.critic, ent_coef=config.ent_coef)

    terms = penalty(beta.value)
    compare_with = None if old is None else old.compare_with
    update = AdaptPenalty(parts.update(terms, compare_with=compare_with), beta, penalty)
    return _with_values(parts, config.gae, config.critic, terms, update if old is None else old.around(update))


def _reinforce(parts: Parts, config: Reinforce) -> Algorithm:
    def update(critic: Critic | None) -> tuple[Objective, Update]:
        terms = parts.objective(likelihood, critic=critic, ent_coef=config.ent_coef)
        # A second pass would need an importance ratio, which REINFORCE does not have.
        return terms, parts.update(terms, sizes=lambda: replace(parts.minibatch(), epochs=1))

    reduce_sum, gamma, scale = parts.reduce_sum, config.gamma, config.normalize_std
    match config.baseline:
        case None:
            return Algorithm(
                from_returns(no_baseline, reduce_sum, gamma=gamma, shift_mean=False, scale=scale), update(None)[1]
            )
        case BatchMean():
            return Algorithm(from_returns(no_baseline, reduce_sum, gamma=gamma, scale=scale), update(None)[1])
        case MovingMean(decay=decay):
            moving = MovingBaseline(decay)
            baseline = moving_baseline(moving, reduce_sum)
            estimate = from_returns(baseline, reduce_sum, gamma=gamma, shift_mean=False, scale=scale)
            return Algorithm(estimate, WithBaseline(update(None)[1], moving))
        case LearnedValue(critic=critic):
            estimate = from_returns(learned_baseline, reduce_sum, gamma=gamma, scale=scale, bootstrap=True)
            return _warmed(parts, critic, *update(critic), estimate, estimate)
        case _:
            assert_never(config.baseline)
