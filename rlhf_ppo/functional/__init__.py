"""Pure tensor mathematics: tensors in, tensors out; no configuration, no state, no I/O.

Everywhere `mask` is True at actions of the policy, log-probabilities are in nats, and `r_t`, `V(s_t)`, `Â_t`, `R_t` are
rewards, values, advantages and value targets. Arguments that all losses share are described in `losses`.
"""

from rlhf_ppo.functional.advantages import (
    discounted_returns,
    gae,
    grpo_advantages,
    length_adaptive_lam,
    rloo_advantages,
    turn_gae,
)
from rlhf_ppo.functional.calibration import value_bias_by_position
from rlhf_ppo.functional.divergence import DivergenceKind, binary_divergence, divergence_masked_loss
from rlhf_ppo.functional.gaussian import gaussian_entropy, gaussian_kl, gaussian_logprobs
from rlhf_ppo.functional.importance import (
    ImportanceLevel,
    importance_ratio,
    importance_weights,
    truncated_importance_weights,
)
from rlhf_ppo.functional.kl import KLKind, ReferenceKL, categorical_kl, kl_estimate, next_state_kl
from rlhf_ppo.functional.logprobs import (
    Head,
    TokenStatistics,
    chunked_categorical_kl,
    chunked_token_statistics,
    entropy_from_logits,
    token_logprobs,
)
from rlhf_ppo.functional.losses import (
    Metrics,
    compute_ppo_total_loss,
    entropy_bonus,
    kl_penalty_loss,
    ppo_clip_loss,
    reinforce_loss,
    surrogate_loss,
    value_loss,
)
from rlhf_ppo.functional.masked import (
    Count,
    ReduceSum,
    identity,
    last_action_index,
    masked_mean,
    masked_sum,
    masked_var,
    sequence_mean_count,
    whiten,
    whitening_statistics,
    zero_where_masked,
)
from rlhf_ppo.functional.rewards import (
    PenaltyMode,
    classic_whiten_rewards,
    clip_scores,
    kl_shaped_rewards,
    missing_eos_penalty,
    normalize_episode_scores,
    soft_overlong_penalty,
    total_scores,
)
from rlhf_ppo.functional.sequence_losses import cispo_loss, gspo_loss, positive_example_weights, weighted_nll_loss
from rlhf_ppo.functional.token_selection import token_covariances, top_share_threshold
from rlhf_ppo.functional.trust_region import (
    LineSearchResult,
    categorical_metric,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    gaussian_metric,
    line_search,
    step_weights,
    trust_region_step,
    unflatten,
)
from rlhf_ppo.utils.moved_names import forward_old_names

__all__ = [
    "Count",
    "DivergenceKind",
    "Head",
    "ImportanceLevel",
    "KLKind",
    "LineSearchResult",
    "Metrics",
    "PenaltyMode",
    "ReduceSum",
    "ReferenceKL",
    "TokenStatistics",
    "binary_divergence",
    "categorical_kl",
    "categorical_metric",
    "chunked_categorical_kl",
    "chunked_token_statistics",
    "cispo_loss",
    "classic_whiten_rewards",
    "clip_scores",
    "compute_ppo_total_loss",
    "conjugate_gradient",
    "discounted_returns",
    "divergence_masked_loss",
    "entropy_bonus",
    "entropy_from_logits",
    "fisher_vector_product",
    "flatten",
    "gae",
    "gaussian_entropy",
    "gaussian_kl",
    "gaussian_logprobs",
    "gaussian_metric",
    "grpo_advantages",
    "gspo_loss",
    "identity",
    "importance_ratio",
    "importance_weights",
    "kl_estimate",
    "kl_penalty_loss",
    "kl_shaped_rewards",
    "last_action_index",
    "length_adaptive_lam",
    "line_search",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "missing_eos_penalty",
    "next_state_kl",
    "normalize_episode_scores",
    "positive_example_weights",
    "ppo_clip_loss",
    "reinforce_loss",
    "rloo_advantages",
    "sequence_mean_count",
    "soft_overlong_penalty",
    "step_weights",
    "surrogate_loss",
    "token_covariances",
    "token_logprobs",
    "top_share_threshold",
    "total_scores",
    "truncated_importance_weights",
    "trust_region_step",
    "turn_gae",
    "unflatten",
    "value_bias_by_position",
    "value_loss",
    "weighted_nll_loss",
    "whiten",
    "whitening_statistics",
    "zero_where_masked",
]

forward_old_names(__name__)
