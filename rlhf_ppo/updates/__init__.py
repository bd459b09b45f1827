"""How parameters move, given a `TrainBatch`."""

from rlhf_ppo.updates.minibatch import MinibatchConfig, MinibatchUpdate
from rlhf_ppo.updates.objective import Objective, Terms, Update, UpdateRecord

__all__ = ["MinibatchConfig", "MinibatchUpdate", "Objective", "Terms", "Update", "UpdateRecord"]
