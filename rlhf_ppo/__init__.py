"""RLHF fine-tuning of language models: token-level PPO with a value head, a frozen reference and a reward model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import rlhf_ppo.utils.openmp  # noqa: F401  # isort: skip  it must come before torch
from rlhf_ppo.utils.classic_paths import classic_name, classic_names, forward_classic_paths
from rlhf_ppo.utils.moved_names import forward_old_names

if TYPE_CHECKING:
    from rlhf_ppo.api import *  # noqa: F403
    from rlhf_ppo.api import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `rlhf_ppo.api` when one of its names is asked for: it needs torch, and a command's help does not."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    api = import_module("rlhf_ppo.api")
    if name in globals():  # a subpackage that came with it
        return globals()[name]
    if not hasattr(api, name) and name not in classic_names(""):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(api, name) if hasattr(api, name) else classic_name("", name)
    return value


forward_classic_paths()
forward_old_names(__name__)
