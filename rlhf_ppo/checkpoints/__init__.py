"""Checkpoints: folders that are whole or absent, what they hold, how a run goes on from them, and the best models.

For loops of one's own: `save_checkpoint`, `restore_checkpoint`, and `RandomStreams` among the parts they are given.
`PPOTrainer.train` does all of it itself.
"""

from rlhf_ppo.checkpoints.folders import CheckpointError, checkpoints, find_damage, latest
from rlhf_ppo.checkpoints.random_streams import RandomStreams
from rlhf_ppo.checkpoints.resume import (
    CheckpointNotWrittenError,
    Restored,
    Stateful,
    restore_checkpoint,
    save_checkpoint,
)

__all__ = [
    "CheckpointError",
    "CheckpointNotWrittenError",
    "RandomStreams",
    "Restored",
    "Stateful",
    "checkpoints",
    "find_damage",
    "latest",
    "restore_checkpoint",
    "save_checkpoint",
]
