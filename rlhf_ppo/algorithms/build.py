"""Build an algorithm from its config: the one `match` over all algorithms, closed by `assert_never`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from typing_extensions import assert_never

from rlhf_ppo.algorithms.adaptive_entropy import AdaptiveEntropyUpdate
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
    with_positive_examples,
)
from rlhf_ppo.algorithms.baselines import MovingBaseline, UpdateWithBaseline
from rlhf_ppo.algorithms.config import (
    GAE,
    GRPO,
    GSPO,
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
from rlhf_ppo.algorithms.critic_fits import CriticWarmup, ExtraCriticFits
from rlhf_ppo.algorithms.objectives import (
    clipped_surrogate,
    kl_penalized_surrogate,
    mean_over_sequences,
    policy_gradient,
    sequence_surrogate,
)
from rlhf_ppo.algorithms.penalty_beta import PenaltyBeta
from rlhf_ppo.algorithms.ppo_penalty import AdaptiveBetaUpdate, OldPolicySnapshot
from rlhf_ppo.algorithms.surrogate_config import ClippedSurrogate, PositiveNLL
from rlhf_ppo.algorithms.update_factory import UpdateFactory
from rlhf_ppo.functional import ReferenceKL
from rlhf_ppo.updates import GradientFunction, MinibatchConfig, Objective, Update, count_sequences
from rlhf_ppo.updates.objective import count_actions
from rlhf_ppo.updates.pretraining import PretrainingMix, PretrainingRows, UpdateWithPretraining


@dataclass(frozen=True)
class Algorithm:
    """An algorithm as two callables: advantage estimation and parameter update."""

    estimate_advantages: EstimateAdvantages
    """Rollout -> TrainBatch."""
    update: Update
    """TrainBatch -> record of the update, which changes the parameters."""
    needs_groups: bool = False
    """Whether it needs several responses per prompt."""
    has_critic: bool = True
    """Whether it learns a value function."""


def build_algorithm(
    config: AlgorithmConfig,
    *,
    policy: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
    minibatch_config: Callable[[], MinibatchConfig],
    seed: int,
    compute_gradients: GradientFunction | None = None,
    reference_kl: ReferenceKL | None = None,
    reference: nn.Module | None = None,
    pretraining: PretrainingMix | None = None,
) -> Algorithm:
    """Build the algorithm of `config` for one policy, optimizer and accelerator.

    Args:
        minibatch_config: Returns epochs and sizes; called at each update.
        seed: Seeds the row order; the same on all processes.
        reference_kl: Kind of KL to the reference in the loss, weighed by `Rollout.reference_kl_coef`; None: no KL.
        reference: The prepared reference, used by `reference_kl="full"` alone.
        compute_gradients: Replaces autograd in minibatch updates and critic fits; None: autograd.
        pretraining: Texts that every optimizer step also learns; None: none.
    """
    rows = None if pretraining is None else PretrainingRows(pretraining, seed)
    factory = UpdateFactory(
        policy=policy, optimizer=optimizer, accelerator=accelerator, minibatch_config=minibatch_config, seed=seed,
        reference_kl=reference_kl, reference=reference, compute_gradients=compute_gradients, pretraining=rows,
    )  # fmt: skip
    algorithm = _build(factory, config)
    return algorithm if rows is None else replace(algorithm, update=UpdateWithPretraining(algorithm.update, rows))


def _build(factory: UpdateFactory, config: AlgorithmConfig) -> Algorithm:
    match config:
        case PPOClip():
            objective, update = _clipped_update(factory, config, config.critic)
            return _with_gae(factory, config.gae, config.critic, objective, update, config.positive_nll)
        case PPOPenalty():
            return _ppo_penalty(factory, config)
        case TRPO():
            natural = factory.trust_region_update(config)
            return Algorithm(gae_advantages(config.gae, factory.reduce_sum), natural)
        case Reinforce():
            return _reinforce(factory, config)
        case ReinforcePlusPlus() | RLOO() | GRPO():
            return _without_critic(factory, config)
        case GSPO():
            objective = factory.total_objective(
                sequence_surrogate(config), critic=None, ent_coef=config.ent_coef, clip_low=config.clip_low,
                clip_high=config.clip_high,
            )  # fmt: skip
            update = factory.update(mean_over_sequences(objective), count=count_sequences)
            return Algorithm(group_relative_advantages(config), update, needs_groups=True, has_critic=False)
        case _:
            assert_never(config)


def _with_gae(
    factory: UpdateFactory,
    config: GAE,
    critic: Critic,
    objective: Objective,
    update: Update,
    positive_nll: PositiveNLL | None = None,
) -> Algorithm:
    """An algorithm with GAE advantages, and the critic's warm-up if configured."""
    estimate = with_positive_examples(gae_advantages(config, factory.reduce_sum), positive_nll, factory.reduce_sum)
    return _with_warmup(
        factory, critic, objective, update, estimate, monte_carlo_advantages(config, factory.reduce_sum)
    )


def _clipped_update(
    factory: UpdateFactory, config: ClippedSurrogate, critic: Critic | None, *, sequence_mean: bool = False
) -> tuple[Objective, Update]:
    """Objective and update of the clipped surrogate, with the parts that `config` adds to it."""
    term = clipped_surrogate(config)

    def objective_of(ent_coef: float) -> Objective:
        objective = factory.total_objective(
            term, critic=critic, ent_coef=ent_coef, clip_low=config.clip_low, clip_high=config.clip_high
        )
        return mean_over_sequences(objective) if sequence_mean else objective

    objective = objective_of(config.ent_coef)
    minibatch_update = factory.update(objective, count=count_sequences if sequence_mean else count_actions)
    update: Update = minibatch_update
    if config.adaptive_entropy is not None:
        update = AdaptiveEntropyUpdate(minibatch_update, config.adaptive_entropy, objective_of)
    return objective, update if config.tokens is None else factory.select_tokens(update, config.tokens)


def _with_warmup(
    factory: UpdateFactory,
    critic: Critic,
    objective: Objective,
    update: Update,
    estimate: EstimateAdvantages,
    warmup_estimate: EstimateAdvantages,
) -> Algorithm:
    """An algorithm with further fits of the critic: alone in the first iterations, and after each update."""
    if critic.extra_fits:
        fit = factory.critic_fit(critic.clip_range_value)
        update = ExtraCriticFits(update, fit, factory.accelerator, critic.extra_fits)
    if not critic.warmup_iterations:
        return Algorithm(estimate, update)
    warmup = CriticWarmup(
        update, factory.critic_fit(critic.clip_range_value), objective, factory.accelerator, critic.warmup_iterations,
        factory.reference_argument,
    )  # fmt: skip
    return Algorithm(warmup.switch_estimates(estimate, warmup_estimate), warmup)


def _without_critic(factory: UpdateFactory, config: ReinforcePlusPlus | RLOO | GRPO) -> Algorithm:
    sequence_mean = isinstance(config, GRPO) and config.sequence_mean
    _, update = _clipped_update(factory, config, None, sequence_mean=sequence_mean)
    match config:
        case ReinforcePlusPlus():
            estimate = return_advantages(group_baseline(config), factory.reduce_sum, gamma=config.gamma)
            needs_groups = config.group_baseline
        case RLOO() | GRPO():
            estimate, needs_groups = group_relative_advantages(config), True
    estimate = with_positive_examples(estimate, config.positive_nll, factory.reduce_sum)
    return Algorithm(estimate, update, needs_groups=needs_groups, has_critic=False)


def _ppo_penalty(factory: UpdateFactory, config: PPOPenalty) -> Algorithm:
    beta = PenaltyBeta(config.beta, config.target_kl)
    if config.exact and factory.processes.sharded:
        raise ValueError(
            f"PPOPenalty(exact=True) does not run under {factory.accelerator.distributed_type}: it copies the LM head, "
            "of which a process holds a part. Use exact=False, one process or DDP."
        )
    old = OldPolicySnapshot(factory.module, factory.minibatch_config) if config.exact else None

    def objective_of(beta: float) -> Objective:
        return factory.total_objective(kl_penalized_surrogate(beta), critic=config.critic, ent_coef=config.ent_coef)

    objective = objective_of(beta.value)
    compare_with = None if old is None else old.compare_with
    update = AdaptiveBetaUpdate(factory.update(objective, compare_with=compare_with), beta, objective_of)
    return _with_gae(factory, config.gae, config.critic, objective, update if old is None else old.wrap(update))


def _reinforce(factory: UpdateFactory, config: Reinforce) -> Algorithm:
    def update(critic: Critic | None) -> tuple[Objective, Update]:
        objective = factory.total_objective(policy_gradient, critic=critic, ent_coef=config.ent_coef)
        # A second pass would need an importance ratio, which REINFORCE does not have.
        return objective, factory.update(objective, config=lambda: replace(factory.minibatch_config(), epochs=1))

    reduce_sum, gamma, scale = factory.reduce_sum, config.gamma, config.normalize_std
    match config.baseline:
        case None:
            estimate = return_advantages(no_baseline, reduce_sum, gamma=gamma, shift_mean=False, scale=scale)
            return Algorithm(estimate, update(None)[1], has_critic=False)
        case BatchMean():
            estimate = return_advantages(no_baseline, reduce_sum, gamma=gamma, scale=scale)
            return Algorithm(estimate, update(None)[1], has_critic=False)
        case MovingMean(decay=decay):
            moving = MovingBaseline(decay)
            baseline = moving_baseline(moving, reduce_sum)
            estimate = return_advantages(baseline, reduce_sum, gamma=gamma, shift_mean=False, scale=scale)
            return Algorithm(estimate, UpdateWithBaseline(update(None)[1], moving), has_critic=False)
        case LearnedValue(critic=critic):
            estimate = return_advantages(learned_baseline, reduce_sum, gamma=gamma, scale=scale, bootstrap=True)
            return _with_warmup(factory, critic, *update(critic), estimate, estimate)
        case _:
            assert_never(config.baseline)
