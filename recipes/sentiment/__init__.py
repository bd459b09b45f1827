"""What the sentiment recipe stands on: fetched assets, review parts, small language models and independent judges.

A folder beside the recipe rather than a library: a script launched from `recipes/` imports it as `sentiment`.
"""

from rlhf_ppo.utils.openmp import spin_shortly

__all__ = ["spin_shortly"]
