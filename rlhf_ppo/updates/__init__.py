"""How parameters move, given a `TrainBatch`."""

from rlhf_ppo.updates.minibatch import MinibatchConfig, MinibatchUpdate
from rlhf_ppo.updates.objective import Gradients, Objective, Terms, Update, UpdateRecord
from rlhf_ppo.updates.region import TrustRegion
from rlhf_ppo.updates.trust_region import TrustRegionUpdate

__all__ = [
    "Gradients", "MinibatchConfig", "MinibatchUpdate", "Objective", "Terms", "TrustRegion", "TrustRegionUpdate",
    "Update", "UpdateRecord",
]  # fmt: skip
