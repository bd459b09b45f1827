"""Every algorithm finds the known optimum of the token bandit, in seconds."""

import pytest

from rlhf_ppo import GRPO, RLOO, TRPO, AlgorithmConfig, PPOClip, PPOPenalty, Reinforce
from tests.learning.bandit import bandit, optimum, play, probabilities, total_variation

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided")

ITERATIONS = 60
ALGORITHMS = {
    "ppo-clip": PPOClip(),
    "ppo-penalty": PPOPenalty(),
    "reinforce": Reinforce(),
    "reinforce-value": Reinforce(learned_baseline=True),
    "rloo": RLOO(),
    "grpo": GRPO(),
}


@pytest.mark.parametrize(
    ("name", "kl_coef"),
    [(name, kl_coef) for name in ALGORITHMS for kl_coef in (0.5, 0.0) if (name, kl_coef) != ("ppo-penalty", 0.5)],
)
def test_the_policy_goes_to_the_optimum_of_the_bandit(name: str, kl_coef: float) -> None:
    """π_ref exp(r / β) / Z with the KL in the reward, the best token without, within 2 % total variation."""
    algorithm: AlgorithmConfig = ALGORITHMS[name]
    trainer = bandit(algorithm, kl_coef=kl_coef, iterations=ITERATIONS)
    goal = optimum(trainer, kl_coef)
    assert total_variation(probabilities(trainer), goal) > 0.2
    play(trainer, ITERATIONS, group_size=8 if isinstance(algorithm, RLOO | GRPO) else 1)
    assert total_variation(probabilities(trainer), goal) < 0.02


def test_beta_of_the_penalty_follows_the_kl_after_the_update() -> None:
    """With one optimiser step an update, every statistic is of the policy before it: KL 0, and β would only halve."""
    trainer = bandit(PPOPenalty(beta=1.0, target=1e-4), kl_coef=0.5, ppo_epochs=1, mini_batch_size=128)
    before = probabilities(trainer)
    play(trainer, 1)
    reached = float((before * (before / probabilities(trainer)).log()).sum())
    assert trainer.metrics["ppo/policy/reached_kl"] == pytest.approx(reached, rel=0.5)  # an estimate from 128 draws
    assert reached > 1.5e-4
    play(trainer, 1)
    assert trainer.metrics["ppo/policy/beta"] == 2.0


def test_trpo_goes_to_the_optimum_of_the_bandit() -> None:
    """Its steps have one length in KL to the very end, so that sets how near it comes."""
    trainer = bandit(TRPO(max_kl=4e-4, damping=0.01), kl_coef=0.5)
    goal = optimum(trainer, 0.5)
    play(trainer, 40)
    assert total_variation(probabilities(trainer), goal) < 0.02
