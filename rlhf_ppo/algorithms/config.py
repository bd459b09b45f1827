"""One frozen config per algorithm; `AlgorithmConfig` is their union."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rlhf_ppo.algorithms.surrogate_config import ClippedSurrogate
from rlhf_ppo.functional.losses import check_clip
from rlhf_ppo.updates import TrustRegionConfig
from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class GAE:
    """Generalized advantage estimation (Schulman et al. 2016)."""

    gamma: float = 1.0
    """Discount γ in [0, 1]; 1 because a response is one short episode."""
    lam: float = 0.95
    """λ in [0, 1]: 0 is one-step TD, 1 is Monte Carlo."""
    value_lam: float | None = None
    """λ of the value targets; None: `lam`. At 1, targets do not depend on the critic (VC-PPO, Yuan et al. 2025)."""
    length_alpha: float | None = None
    """α in λ = 1 - 1 / (α · length), clipped to [0.5, 1] (VAPO, Yue et al. 2025); None: λ is `lam`."""
    unit: Literal["token", "turn"] = "token"
    """Unit in which γ, λ and `length_alpha` count time. With "turn" (Turn-PPO, arXiv 2512.17008), all tokens of a turn
    share one advantage, and a response without observations is one turn."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("gamma", "lam", "value_lam"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(
                    f"{name} must be in [0, 1], got {value}: outside, the sum over an episode diverges or "
                    "alternates in sign. Use a value such as 0.95."
                )
        if self.length_alpha is not None and not self.length_alpha > 0:
            raise ValueError(f"length_alpha must be > 0 or None, got {self.length_alpha}: VAPO uses 0.05.")


@dataclass(frozen=True, kw_only=True)
class Critic:
    """Weight and clipping of the value loss, and warm-up of the critic."""

    vf_coef: float = 0.1
    """c_1: weight of the value loss."""
    clip_range_value: float | None = 0.2
    """How far a value may move from the old value before its loss is clipped, in units of reward; None: not clipped."""
    warmup_iterations: int = 0
    """Initial iterations that fit the critic alone, to Monte Carlo returns of the frozen policy (VC-PPO)."""
    learning_rate: float | None = None
    """Learning rate of value head or separate critic in the default optimizer; None: the policy's."""
    extra_fits: int = 0
    """How often the critic alone is fitted again after each update; a fit makes `ppo_epochs` passes over the batch."""
    freeze: Literal["nothing", "attention", "trunk"] = "nothing"
    """Which weights of a separate critic (`attach_critic`) are not trained; "trunk": all but its head."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.extra_fits < 0 or (self.learning_rate is not None and not self.learning_rate > 0):
            raise ValueError(
                f"expected extra_fits >= 0 and a positive learning_rate or None, got {self.extra_fits} and "
                f"{self.learning_rate}: the critic would not learn. To train it no further, set vf_coef=0."
            )
        if self.vf_coef < 0 or self.warmup_iterations < 0:
            raise ValueError(
                f"vf_coef and warmup_iterations must be >= 0, got {self.vf_coef} and {self.warmup_iterations}: a "
                "negative weight would drive values away from their targets."
            )


@dataclass(frozen=True, kw_only=True)
class PPOClip(ClippedSurrogate):
    """PPO with the clipped surrogate (Schulman et al. 2017, eq. 7)."""

    dual_clip: float | None = None
    """c > 1: bounds the objective where the advantage is negative (Ye et al. 2020); None: no bound."""
    gae: GAE = field(default_factory=GAE)
    critic: Critic = field(default_factory=Critic)


@dataclass(frozen=True, kw_only=True)
class PPOPenalty:
    """PPO with an adaptive penalty on KL(π_old || π_θ) (Schulman et al. 2017, §4)."""

    beta: float = 1.0
    """Initial weight of the KL to the *old* policy in the loss; not the `kl_coef` of the reward."""
    target_kl: float = 0.01
    """d_targ, nats per action: β doubles above 1.5 d_targ and halves below d_targ / 1.5."""
    exact: bool = False
    """Penalize the exact KL over the vocabulary, which stores the old policy's hidden states. False: penalize its
    unbiased estimate from the sampled tokens, ρ - 1 - log ρ."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""
    gae: GAE = field(default_factory=GAE)
    critic: Critic = field(default_factory=Critic)


@dataclass(frozen=True, kw_only=True)
class TRPO(TrustRegionConfig):
    """Trust region policy optimization (Schulman et al. 2015), for policies of up to about 100 M parameters.

    It takes one natural-gradient step per batch. Then the value head is fitted on fixed hidden states; learning rate,
    `ppo_epochs` and `mini_batch_size` apply to this fit only. Raises ValueError under FSDP and ZeRO, and with
    parameters or autocast in low precision.
    """

    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""
    gae: GAE = field(default_factory=GAE)
    clip_range_value: float | None = None
    """Largest change of a value before its loss is clipped, as in `Critic`; None: not clipped."""


@dataclass(frozen=True, kw_only=True)
class BatchMean:
    """Baseline of REINFORCE: the mean return of the batch of all processes."""


@dataclass(frozen=True, kw_only=True)
class MovingMean:
    """Baseline of REINFORCE: an exponential moving mean over earlier batches (Williams 1992, §6)."""

    decay: float = 0.9
    """Weight of the old mean after each batch, in [0, 1)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}: at 1 the mean stays constant. Usual: 0.9.")


@dataclass(frozen=True, kw_only=True)
class LearnedValue:
    """Baseline of REINFORCE: V(s_t), trained together with the policy."""

    critic: Critic = field(default_factory=Critic)


Baseline: TypeAlias = BatchMean | MovingMean | LearnedValue


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """REINFORCE (Williams 1992): one pass over the batch, discounted returns minus a baseline."""

    gamma: float = 1.0
    """Discount γ in [0, 1]."""
    baseline: Baseline | None = field(default_factory=BatchMean)
    """Subtracted from the returns; None: no baseline, which has high variance."""
    normalize_std: bool = True
    """Divide by the standard deviation over the batch of all processes, which removes the scale of the rewards."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(ClippedSurrogate):
    """REINFORCE++ (Hu et al. 2025): returns-to-go without a critic, standardized over the batch, clipped ratios."""

    gamma: float = 1.0
    """Discount γ in [0, 1]."""
    group_baseline: bool = False
    """First subtract the mean return of the responses to the same prompt ("w/ baseline"); needs groups."""


@dataclass(frozen=True, kw_only=True)
class RLOO(ClippedSurrogate):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the other responses to a prompt are its baseline.

    Ratio clipping has an effect only with more than one optimizer step per batch.
    """


@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedSurrogate):
    """Group-relative PPO (Shao et al. 2024): scores are standardized within the responses to a prompt.

    The article's KL to the reference, k3 in the loss, is `PPOConfig(kl_placement="loss", kl_penalty="k3")`.
    """

    normalize_std: bool = True
    """Divide by the group's standard deviation; False: Dr. GRPO (Liu et al. 2025)."""
    sequence_mean: bool = False
    """The loss is the mean over responses of the mean over each response's tokens, as in the article. False: the mean
    over all tokens (DAPO, Yu et al. 2025)."""


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """Group sequence policy optimization (Zheng et al. 2025): GRPO with one probability ratio per response."""

    clip_low: float = 3e-4
    """ε below 1. The clipped ratio is that of the response: the geometric mean of its tokens' ratios."""
    clip_high: float = 4e-4
    """ε above 1."""
    normalize_std: bool = True
    """Divide by the group's standard deviation."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_clip(self.clip_low, self.clip_high)


AlgorithmConfig: TypeAlias = PPOClip | PPOPenalty | TRPO | Reinforce | ReinforcePlusPlus | RLOO | GRPO | GSPO


def critic_settings(config: AlgorithmConfig) -> Critic | None:
    """The settings of the critic that an algorithm learns; None if it has none of its own."""
    match config:
        case PPOClip(critic=critic) | PPOPenalty(critic=critic) | Reinforce(baseline=LearnedValue(critic=critic)):
            return critic
        case _:
            return None
