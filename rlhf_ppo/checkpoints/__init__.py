"""Checkpoints: folders that are whole or absent, what they hold, how a run goes on from them, and the best models.

For loops of one's own: `save_checkpoint`, `restore_checkpoint`, `RandomStreams` among the parts they are given, and
`lock_run_folder` around them.
`PPOTrainer.train` does all of it itself.
"""

from rlhf_ppo.checkpoints.folders import CheckpointError, checkpoints, find_damage, latest
from rlhf_ppo.checkpoints.lock import FolderInUseError, lock_run_folder
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
    "FolderInUseError",
    "RandomStreams",
    "Restored",
    "Stateful",
    "checkpoints",
    "find_damage",
    "latest",
    "lock_run_folder",
    "restore_checkpoint",
    "save_checkpoint",
]
