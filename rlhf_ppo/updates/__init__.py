"""How parameters move, given a `TrainBatch`."""

from rlhf_ppo.updates.critic import CriticFit
from rlhf_ppo.updates.minibatch import MinibatchConfig, MinibatchUpdate
from rlhf_ppo.updates.objective import (
    CompareWith,
    Gradients,
    LossTerms,
    Objective,
    Update,
    UpdateRecord,
    count_sequences,
)
from rlhf_ppo.updates.region import TrustRegion
from rlhf_ppo.updates.trust_region import TrustRegionUpdate

__all__ = [
    "CompareWith", "CriticFit", "Gradients", "LossTerms", "MinibatchConfig", "MinibatchUpdate", "Objective",
    "TrustRegion", "TrustRegionUpdate", "Update", "UpdateRecord", "count_sequences",
]  # fmt: skip
