"""Checkpoints: atomic folders with checksums, saved and restored, and the best models of a run.

`PPOTrainer.train` does all of it itself. For your own loop: `save_checkpoint` and `restore_checkpoint` with a
`RandomStreams` in `per_process`, within `lock_run_folder`.
"""

from rlhf_ppo.checkpoints.folders import CheckpointError, find_damage, latest_checkpoint, list_checkpoints
from rlhf_ppo.checkpoints.lock import FolderInUseError, lock_run_folder
from rlhf_ppo.checkpoints.random_streams import RandomStreams
from rlhf_ppo.checkpoints.resume import (
    CheckpointNotWrittenError,
    RestoredCheckpoint,
    Stateful,
    restore_checkpoint,
    save_checkpoint,
)
from rlhf_ppo.utils.moved_names import forward_old_names

__all__ = [
    "CheckpointError",
    "CheckpointNotWrittenError",
    "FolderInUseError",
    "RandomStreams",
    "RestoredCheckpoint",
    "Stateful",
    "find_damage",
    "latest_checkpoint",
    "list_checkpoints",
    "lock_run_folder",
    "restore_checkpoint",
    "save_checkpoint",
]

forward_old_names(__name__)
