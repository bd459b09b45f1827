"""Where scripts for the classic look for helpers: `trl.core` with the package's name changed."""

from rlhf_ppo.classic.helpers import LengthSampler, respond_to_batch
from rlhf_ppo.utils.seeding import set_seed

__all__ = ["LengthSampler", "respond_to_batch", "set_seed"]
