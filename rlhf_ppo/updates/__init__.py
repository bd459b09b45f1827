"""Updates: what changes the parameters, given a `TrainBatch`."""

from rlhf_ppo.updates.critic_fit import CriticFit
from rlhf_ppo.updates.minibatch import MinibatchConfig, MinibatchUpdate
from rlhf_ppo.updates.objective import (
    CompareWith,
    GradientFunction,
    LossTerms,
    Objective,
    Update,
    UpdateRecord,
    count_sequences,
)
from rlhf_ppo.updates.trust_region import TrustRegionUpdate
from rlhf_ppo.updates.trust_region_config import TrustRegionConfig

__all__ = [
    "CompareWith", "CriticFit", "GradientFunction", "LossTerms", "MinibatchConfig", "MinibatchUpdate", "Objective",
    "TrustRegionConfig", "TrustRegionUpdate", "Update", "UpdateRecord", "count_sequences",
]  # fmt: skip
