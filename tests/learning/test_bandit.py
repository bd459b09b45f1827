"""Every algorithm finds the known optimum of the token bandit, in seconds."""

from typing import Any

import pytest

from rlhf_ppo import (
    CISPO,
    GRPO,
    GSPO,
    RLOO,
    TRPO,
    AlgorithmConfig,
    Critic,
    DivergenceMask,
    LearnedValue,
    MovingMean,
    PPOClip,
    PPOPenalty,
    Reinforce,
    ReinforcePlusPlus,
)
from tests.learning.bandit import bandit, optimum, play, probabilities, total_variation

ITERATIONS = {0.5: 60, 0.0: 36}
"""By the weight of the KL: the best token alone is found sooner than a distribution."""
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "ppo-clip": PPOClip(),
    "ppo-penalty": PPOPenalty(),
    "reinforce": Reinforce(),
    "rloo": RLOO(),
    "grpo": GRPO(),
}
COEFFICIENTS = [0.5, pytest.param(0.0, marks=pytest.mark.slow)]
"""Without the KL the optimum is the best token alone: the slow tier, recorded in docs/results/bandit.md."""
REGIONS = {0.5: TRPO(max_kl=4e-4, damping=0.01), 0.0: TRPO(max_kl=0.01, damping=0.01)}
"""TRPO's steps have one length in KL to the very end, so that sets how near it comes."""

REGION_ITERATIONS = {0.5: 40, 0.0: 60}

VARIANTS: dict[str, tuple[AlgorithmConfig, float, dict[str, Any]]] = {
    "reinforce++": (ReinforcePlusPlus(), 0.5, {}),
    "reinforce++, group baseline": (ReinforcePlusPlus(group_baseline=True), 0.0, {}),
    "learned value": (Reinforce(baseline=LearnedValue()), 0.5, {}),
    "moving mean": (Reinforce(baseline=MovingMean()), 0.5, {}),
    "exact penalty": (PPOPenalty(exact=True), 0.5, {}),
    "divergence mask": (PPOClip(divergence=DivergenceMask(threshold=0.1)), 0.5, {}),
    "sequence mean": (GRPO(sequence_mean=True), 0.0, {}),
    "gspo": (GSPO(), 0.5, {}),
    "gspo, no KL": (GSPO(), 0.0, {"iterations": 60}),
    "cispo": (PPOClip(cispo=CISPO(max_weight=5.0)), 0.5, {}),
    "cispo that drops": (PPOClip(cispo=CISPO(min_weight=0.5, max_weight=5.0, drop=True)), 0.5, {}),
    "warm critic": (PPOClip(critic=Critic(warmup_iterations=5)), 0.5, {}),
    "split KL": (PPOClip(), 0.5, {"kl_placement": "split", "kl_penalty": "full", "iterations": 160}),
    "full KL in the loss": (PPOClip(), 0.5, {"kl_placement": "loss", "kl_penalty": "full", "iterations": 160}),
}


def distance(
    algorithm: AlgorithmConfig, kl_coef: float, *, group_size: int = 1, iterations: int | None = None, **settings: Any
) -> float:
    """Total variation to the optimum after learning."""
    iterations = iterations or ITERATIONS[kl_coef]
    trainer = bandit(algorithm, kl_coef=kl_coef, iterations=iterations, **settings)
    goal = optimum(trainer, kl_coef)
    assert total_variation(probabilities(trainer), goal) > 0.2
    play(trainer, iterations, group_size=group_size)
    return total_variation(probabilities(trainer), goal)


def group_of(algorithm: AlgorithmConfig) -> int:
    """Eight responses side by side for those that compare them."""
    compares = isinstance(algorithm, RLOO | GRPO | GSPO) or getattr(algorithm, "group_baseline", False)
    return 8 if compares else 1


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", COEFFICIENTS)
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_policy_goes_to_the_optimum_of_the_bandit(name: str, kl_coef: float) -> None:
    """π_ref exp(r / β) / Z with the KL in the reward, the best token without, within 2 % total variation."""
    algorithm = ALGORITHMS[name]
    assert distance(algorithm, kl_coef, group_size=group_of(algorithm)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", COEFFICIENTS)
def test_trpo_goes_to_the_optimum_of_the_bandit(kl_coef: float) -> None:
    iterations = REGION_ITERATIONS[kl_coef] + 20  # some starts of the value head are near the bound without these
    assert distance(REGIONS[kl_coef], kl_coef, iterations=iterations) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_goes_to_the_optimum_of_the_bandit(name: str) -> None:
    """The coefficient of the KL means the same in the reward, in the loss, and split between the two."""
    algorithm, kl_coef, settings = VARIANTS[name]
    assert distance(algorithm, kl_coef, group_size=group_of(algorithm), **settings) < 0.02


def test_beta_of_the_penalty_follows_the_kl_after_the_update() -> None:
    """With one optimizer step an update, every statistic is of the policy before it: KL 0, and β would only halve."""
    trainer = bandit(PPOPenalty(beta=1.0, target_kl=1e-4), kl_coef=0.5, ppo_epochs=1, mini_batch_size=128)
    before = probabilities(trainer)
    play(trainer, 1)
    reached = float((before * (before / probabilities(trainer)).log()).sum())
    assert trainer.metrics["ppo/policy/reached_kl"] == pytest.approx(reached, rel=0.5)  # an estimate from 128 draws
    assert reached > 1.5e-4
    play(trainer, 1)
    assert trainer.metrics["ppo/policy/beta"] == 2.0
