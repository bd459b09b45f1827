"""Importing this lends the names of TRL's classic (<= 0.11.4) that are gone to the installed `trl`.

    import rlhf_ppo.compat
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    from trl.core import LengthSampler

runs then, beside the rest of TRL 1.x: modules that TRL no longer has (`trl.core`, `trl.extras`, `trl.environment`,
`trl.trainer.ppo_trainer`, ...) are made, and modules that it has get the names that they lack. Nothing that TRL has is
replaced, save a later `PPOTrainer` and `PPOConfig`, and a `create_reference_model` that TRL has deprecated.
"""

import sys
from importlib import import_module

from rlhf_ppo.utils.classic_paths import CLASSIC_PATHS, ClassicPaths, classic_names, is_module, lend_names


def lend_to_trl() -> None:
    """Lend the classic's names to `trl`, which must be installed; later calls do nothing."""
    if any(isinstance(finder, ClassicPaths) and finder.package == "trl" for finder in sys.meta_path):
        return
    import_module("trl")
    for path in CLASSIC_PATHS:
        name = f"trl.{path}".rstrip(".")
        if is_module(name):
            module = import_module(name)
            lent = {item for item in classic_names(path) if item in _REPLACED or not hasattr(module, item)}
            for item in _REPLACED & vars(module).keys():
                delattr(module, item)
            lend_names(module, path, lent)
    sys.meta_path.append(ClassicPaths("trl"))


_REPLACED = {"PPOTrainer", "PPOConfig", "create_reference_model"}

lend_to_trl()
