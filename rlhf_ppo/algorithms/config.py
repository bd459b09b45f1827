"""One frozen config for each algorithm; their union is the setting that chooses."""

from dataclasses import dataclass, field
from typing import TypeAlias

from rlhf_ppo.field_types import check_fields
from rlhf_ppo.updates import TrustRegion


@dataclass(frozen=True, kw_only=True)
class GAE:
    """How advantages are estimated with a value function (Schulman et al. 2016)."""

    gamma: float = 1.0
    """Discount γ in [0, 1]; 1 because a response is one short episode."""
    lam: float = 0.95
    """λ in [0, 1]: 0 is one-step TD, 1 is Monte Carlo."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("gamma", "lam"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(
                    f"{name} must be in [0, 1], got {value}: outside, the sum over an episode diverges or "
                    "alternates in sign. Use a value such as 0.95."
                )


@dataclass(frozen=True, kw_only=True)
class Critic:
    """The value function's share of the objective."""

    vf_coef: float = 0.1
    """c_1: weight of the value loss against the policy loss."""
    clip_range_value: float | None = 0.2
    """How far a value may move from the old one before its loss is clipped, in units of reward; None: not clipped."""


@dataclass(frozen=True, kw_only=True)
class PPOClip:
    """PPO with the clipped surrogate (Schulman et al. 2017, eq. 7)."""

    clip_low: float = 0.2
    """ε below 1: how far a probability ratio may fall before its gradient is cut."""
    clip_high: float = 0.2
    """ε above 1; larger than `clip_low` leaves room for exploration (DAPO, Yu et al. 2025)."""
    dual_clip: float | None = None
    """c > 1: bound of the objective for negative advantages (Ye et al. 2020); None: no bound."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""
    gae: GAE = field(default_factory=GAE)
    critic: Critic = field(default_factory=Critic)


@dataclass(frozen=True, kw_only=True)
class PPOPenalty:
    """PPO with an adaptive penalty on KL(π_old || π_θ) (Schulman et al. 2017, §4)."""

    beta: float = 1.0
    """Initial weight of the KL to the *old* policy in the loss; not the `kl_coef` of the reward."""
    target: float = 0.01
    """d_targ, nats per action: β doubles above 1.5 d_targ and halves below d_targ / 1.5."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""
    gae: GAE = field(default_factory=GAE)
    critic: Critic = field(default_factory=Critic)


@dataclass(frozen=True, kw_only=True)
class TRPO(TrustRegion):
    """Trust region policy optimisation (Schulman et al. 2015), for policies of up to about 100 M parameters.

    One natural-gradient step on each batch, whatever the learning rate: that and `ppo_epochs`, `mini_batch_size` are
    those of the value head, which is fitted after the step on hidden states that stay as they are. Refused under
    FSDP and ZeRO and with parameters or autocast of low precision.
    """

    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""
    gae: GAE = field(default_factory=GAE)
    clip_range_value: float | None = None
    """Of the value loss, as in `Critic`."""


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """REINFORCE (Williams 1992): one pass over the batch, discounted returns, optionally minus a learned value."""

    gamma: float = 1.0
    """Discount γ in [0, 1]."""
    learned_baseline: bool = False
    """Subtract V(s_t), which is trained beside the policy; otherwise the batch mean is the baseline."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""
    critic: Critic = field(default_factory=Critic)


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the other responses to a prompt are its baseline."""

    clip_low: float = 0.2
    """ε below 1 when a batch is passed over more than once."""
    clip_high: float = 0.2
    """ε above 1."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Group-relative PPO (Shao et al. 2024): scores are standardised within the responses to a prompt."""

    clip_low: float = 0.2
    """ε below 1."""
    clip_high: float = 0.2
    """ε above 1."""
    normalize_std: bool = True
    """Divide by the group's standard deviation; off is Dr. GRPO (Liu et al. 2025)."""
    kl_in_loss: float = 0.0
    """Weight of the k3 estimate of KL(π_θ || π_ref) in the loss."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""


AlgorithmConfig: TypeAlias = PPOClip | PPOPenalty | TRPO | Reinforce | RLOO | GRPO
