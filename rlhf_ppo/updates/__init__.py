"""How parameters move, given a `TrainBatch`."""

from rlhf_ppo.updates.critic import CriticFit
from rlhf_ppo.updates.minibatch import MinibatchConfig, MinibatchUpdate
from rlhf_ppo.updates.objective import CompareWith, Gradients, Objective, Terms, Update, UpdateRecord, sequences
from rlhf_ppo.updates.region import TrustRegion
from rlhf_ppo.updates.trust_region import TrustRegionUpdate

__all__ = [
    "CompareWith", "CriticFit", "Gradients", "MinibatchConfig", "MinibatchUpdate", "Objective", "Terms", "TrustRegion",
    "TrustRegionUpdate", "Update", "UpdateRecord", "sequences",
]  # fmt: skip
