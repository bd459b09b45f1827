"""Algorithm configurations with the usual hyperparameters of control tasks."""

from typing import Literal, TypeAlias, get_args

from rlhf_ppo.algorithms import GAE, TRPO, AlgorithmConfig, Critic, LearnedValue, PPOClip, PPOPenalty, Reinforce
from rlhf_ppo.algorithms.config import critic_settings

AlgorithmName: TypeAlias = Literal["ppo-clip", "ppo-penalty", "trpo", "reinforce"]


def control_algorithm(
    name: AlgorithmName, *, gamma: float = 0.99, lam: float = 0.95, clip_range: float = 0.2, ent_coef: float = 0.0,
    vf_coef: float = 0.5,
) -> AlgorithmConfig:  # fmt: skip
    """Configuration of the algorithm `name`: γ = 0.99, value clipping off (Andrychowicz et al. 2021).

    Args:
        name: The algorithm.
        gamma: Discount γ.
        lam: λ of GAE; unused by REINFORCE.
        clip_range: ε of PPO-clip.
        ent_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss; unused by TRPO, which fits the critic separately.

    Raises:
        ValueError: The name is unknown.
    """
    gae, critic = GAE(gamma=gamma, lam=lam), Critic(vf_coef=vf_coef, clip_range_value=None)
    match name:
        case "ppo-clip":
            return PPOClip(clip_low=clip_range, clip_high=clip_range, ent_coef=ent_coef, gae=gae, critic=critic)
        case "ppo-penalty":
            return PPOPenalty(ent_coef=ent_coef, gae=gae, critic=critic)
        case "trpo":
            return TRPO(ent_coef=ent_coef, gae=gae)
        case "reinforce":
            return Reinforce(gamma=gamma, baseline=LearnedValue(critic=critic), ent_coef=ent_coef)
        case _:
            raise ValueError(
                f"expected an algorithm of {', '.join(get_args(AlgorithmName))}, got {name!r}: algorithms over groups "
                "compare responses to one prompt, and control has no prompts. Pass one of these."
            )


def discount(algorithm: AlgorithmConfig) -> float:
    """The discount γ; a ValueError for algorithms and settings that control does not know."""
    critic = critic_settings(algorithm)
    if critic is not None and (critic.learning_rate is not None or critic.freeze != "nothing"):
        raise ValueError(
            f"expected Critic(learning_rate=None, freeze='nothing'), got {critic.learning_rate} and {critic.freeze!r}: "
            "control has one optimizer and trains the whole critic, so they would change nothing. Leave them out."
        )
    match algorithm:
        case Reinforce():
            return algorithm.gamma
        case PPOPenalty(exact=True):
            raise ValueError(
                "expected PPOPenalty(exact=False), got True: control does not keep the old policy, and would "
                "silently penalize the estimate. Leave `exact` out."
            )
        case PPOClip() | PPOPenalty() | TRPO():
            return algorithm.gae.gamma
        case _:
            raise ValueError(
                f"expected PPOClip, PPOPenalty, TRPO or Reinforce, got {type(algorithm).__name__}: it compares "
                "responses to one prompt, and control has no prompts. Use an algorithm with a value function."
            )
