"""`ClippedSurrogate`, the settings of the policy loss that algorithms with probability ratios share, and its parts."""

from dataclasses import dataclass

from rlhf_ppo.functional import DivergenceKind
from rlhf_ppo.functional.losses import check_clip
from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class DivergenceMask:
    """Mask tokens with a large divergence from the old policy instead of clipping ratios (DPPO, Qi et al. 2026)."""

    kind: DivergenceKind = "tv"
    """"tv": |p_old - p| of the sampled token; "kl": the KL over two outcomes, this token or any other, nats."""
    threshold: float
    """Tokens above this divergence are dropped if their gradient increases it."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.threshold > 0:
            raise ValueError(f"threshold must be > 0, got {self.threshold}: nothing would be learned after one step.")


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """Bounds of CISPO's importance weights (MiniMax-M1, Chen et al. 2025), which replace ratio clipping."""

    max_weight: float
    """Largest weight of a token, >= 1; the article's 1 + ε_high, which it leaves open."""
    min_weight: float = 0.0
    """Smallest weight, in [0, 1]; 0: no lower bound, as in the article."""
    drop: bool = False
    """Drop tokens beyond the bounds instead. With `importance_sampling="bypass"`, this is double-sided importance
    sampling."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.min_weight <= 1 <= self.max_weight:
            raise ValueError(
                f"expected 0 <= min_weight <= 1 <= max_weight, got {self.min_weight} and {self.max_weight}: tokens of "
                "the old policy itself, whose ratio is 1, would get another weight. Try CISPO(max_weight=5.0)."
            )


@dataclass(frozen=True, kw_only=True)
class PositiveNLL:
    """Negative log-likelihood of good responses, added to the policy loss (VAPO, Yue et al. 2025)."""

    coef: float = 0.1
    """μ: weight against the policy loss."""
    threshold: float = 0.0
    """A response is good if its score, after scaling, is larger. Use 0 if right answers score 1, and wrong ones 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.coef < 0:
            raise ValueError(f"coef must be >= 0, got {self.coef}: good responses would be unlearned. VAPO uses 0.1.")


@dataclass(frozen=True, kw_only=True)
class AdaptiveEntropy:
    """Adapt the weight of the entropy to hold the entropy at a target or above (Skywork-OR1, He et al. 2025).

    H is the entropy that an update measures, and c the weight. If H < target, c grows by `step`, else it shrinks by
    `step`. The next update uses c if H <= target, and 0 otherwise.
    """

    target: float
    """Entropy to hold, nats per token."""
    step: float = 0.005
    """Change of the weight per update, > 0."""
    start: float = 0.0
    """Weight of the first update."""
    largest: float = 0.1
    """Upper bound of the weight. Without it, a target that cannot be reached would raise the weight without end."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.step > 0 and 0 <= self.start <= self.largest and self.target > 0):
            raise ValueError(
                f"expected target > 0, step > 0 and 0 <= start <= largest, got {self}: the weight would not move "
                "towards the target. Try AdaptiveEntropy(target=0.5)."
            )


@dataclass(frozen=True, kw_only=True)
class TopEntropyTokens:
    """Only the tokens of the batch with the largest entropy enter the policy loss (Wang et al. 2025)."""

    share: float = 0.2
    """Share of the tokens that is kept, in (0, 1]. The choice takes one forward pass over the batch."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}: no token would be left. Usual: 0.2.")


@dataclass(frozen=True, kw_only=True)
class ClipCovariance:
    """Some tokens with a large covariance of log-probability and advantage leave the policy loss (Cui et al. 2025)."""

    share: float = 2e-4
    """Number of drawn tokens, as a share of all tokens. They are drawn from those within the bounds."""
    low: float = 1.0
    """Smallest covariance of a token that may be drawn."""
    high: float = 5.0
    """Largest covariance of a token that may be drawn."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not (0 < self.share <= 1 and self.low < self.high):
            raise ValueError(
                f"expected 0 < share <= 1 and low < high, got {self}: no token could be drawn. Usual: ClipCovariance()."
            )


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate:
    """Settings of the policy loss that algorithms with probability ratios share."""

    clip_low: float = 0.2
    """ε below 1: a ratio under 1 - ε gets no gradient that would lower it further."""
    clip_high: float = 0.2
    """ε above 1. A value above `clip_low` leaves room for exploration (DAPO, Yu et al. 2025)."""
    divergence: DivergenceMask | None = None
    """Replaces ratio clipping; None: ratio clipping."""
    cispo: CISPO | None = None
    """Replaces ratio clipping; None: ratio clipping."""
    positive_nll: PositiveNLL | None = None
    """Adds the negative log-likelihood of good responses; None: does not."""
    tokens: TopEntropyTokens | ClipCovariance | None = None
    """Which tokens enter the policy loss; None: all."""
    ent_coef: float = 0.0
    """c_2: weight of the exact full-vocabulary entropy."""
    adaptive_entropy: AdaptiveEntropy | None = None
    """Adapts c_2 to a target entropy; None: c_2 is `ent_coef`."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_clip(self.clip_low, self.clip_high)
        if self.divergence is not None and self.cispo is not None:
            raise ValueError(
                f"expected one replacement of ratio clipping, got divergence={self.divergence} and cispo={self.cispo}: "
                "one of them would be ignored. Leave one at None."
            )
        if self.adaptive_entropy is not None and self.ent_coef != 0:
            raise ValueError(
                f"expected ent_coef=0 beside adaptive_entropy, got {self.ent_coef}: it would be ignored. Set "
                "AdaptiveEntropy(start=...) instead."
            )
