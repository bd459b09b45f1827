"""Where scripts for TRL's classic (<= 0.11.4) look for names: module paths below `trl`, or below this package.

`rlhf_ppo.core`, `rlhf_ppo.trainer.ppo_trainer` and the like are such paths; `rlhf_ppo.compat` lends them to `trl`.
"""

import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def _names(module: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, module)


_CORE = {
    **_names("rlhf_ppo.utils.seeding", "set_seed"),
    **_names("rlhf_ppo.classic.helpers", "LengthSampler", "respond_to_batch"),
    **_names(
        "rlhf_ppo.classic.core_functions", "WANDB_PADDING", "PPODecorators", "clip_by_value", "convert_to_scalar",
        "entropy_from_logits", "flatten_dict", "logprobs_from_logits", "masked_mean", "masked_var", "masked_whiten",
        "stack_dicts", "stats_to_np", "top_k_top_p_filtering", "whiten",
    ),
}  # fmt: skip
_VALUE_HEADS = _names("rlhf_ppo.models", "AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead")
_BASE = _names("rlhf_ppo.models", "PreTrainedModelWrapper", "create_reference_model")
_ARCHITECTURES = _names("rlhf_ppo.models", "SUPPORTED_ARCHITECTURES")
_GENERATION = _names("rlhf_ppo.classic.helpers", "unwrap_model_for_generation")
_MODELS = _VALUE_HEADS | _BASE | _ARCHITECTURES
_TRAINER = _names("rlhf_ppo.trainer", "PPOTrainer") | _names("rlhf_ppo.learner.config", "PPOConfig")
_TRAINER_UTILS = {
    **_names("rlhf_ppo.learner.kl_controllers", "AdaptiveKLController", "FixedKLController"),
    **_names("rlhf_ppo.classic.running_moments", "RunningMoments", "get_global_statistics"),
    **_names("rlhf_ppo.models.dropout", "disable_dropout_in_model"),
    **_names("rlhf_ppo.classic.helpers", "exact_div"),
}
_BEST_OF_N = _names("rlhf_ppo.classic.best_of_n", "BestOfNSampler")
_AVAILABLE = _names("transformers.utils", "is_npu_available", "is_peft_available", "is_xpu_available")
_ENVIRONMENT = _names("rlhf_ppo.environments.text_environment", "TextEnvironment", "TextHistory")

CLASSIC_PATHS: dict[str, dict[str, str]] = {
    "": _MODELS | _TRAINER | _BEST_OF_N | _ENVIRONMENT | _names("rlhf_ppo.utils.seeding", "set_seed"),
    "core": _CORE,
    "environment": _ENVIRONMENT,
    "environment.base_environment": _ENVIRONMENT,
    "extras": _BEST_OF_N,
    "extras.best_of_n_sampler": _BEST_OF_N,
    "import_utils": _AVAILABLE,
    "models": _MODELS | _GENERATION,
    "models.modeling_base": _BASE | _names("rlhf_ppo.models.reference", "LAYER_PATTERNS"),
    "models.modeling_value_head": _VALUE_HEADS | _BASE | _names("rlhf_ppo.models", "ValueHead"),
    "models.utils": _VALUE_HEADS | _ARCHITECTURES | _GENERATION,
    "trainer": _TRAINER | _TRAINER_UTILS | {"BaseTrainer": "rlhf_ppo.classic.surface"},
    "trainer.base": {"BaseTrainer": "rlhf_ppo.classic.surface"},
    "trainer.ppo_config": {"PPOConfig": "rlhf_ppo.learner.config"},
    "trainer.ppo_trainer": _TRAINER | _TRAINER_UTILS | _CORE | _MODELS | _GENERATION,
    "trainer.utils": _TRAINER_UTILS,
}
"""Path below `trl` -> {name: module that has it here}; "" is the package itself."""

_OWN_NAMES = {
    "BaseTrainer": "ClassicSurface", "disable_dropout_in_model": "disable_dropout",
    "is_npu_available": "is_torch_npu_available", "is_xpu_available": "is_torch_xpu_available",
}  # fmt: skip
"""Name in the classic -> the name here, where they differ."""


def classic_names(path: str) -> dict[str, str]:
    """The names of a classic module that there are here: all but those of a module that is not installed."""
    return {name: home for name, home in CLASSIC_PATHS[path].items() if is_module(home)}


def classic_name(path: str, name: str) -> Any:
    """The object that the classic had under this path and name."""
    return getattr(import_module(CLASSIC_PATHS[path][name]), _OWN_NAMES.get(name, name))


class ClassicPaths(MetaPathFinder, Loader):
    """Import hook: a path of the classic that is no module of `package` gives a module with the classic's names.

    Args:
        package: "rlhf_ppo" or "trl".
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        below = name.removeprefix(f"{self.package}.")
        if below == name or below not in CLASSIC_PATHS or not classic_names(below):
            return None
        is_package = any(other.startswith(f"{below}.") for other in CLASSIC_PATHS)
        return ModuleSpec(name, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        below = module.__name__.removeprefix(f"{self.package}.")
        module.__doc__ = f"The names of TRL's classic `trl.{below}`."
        vars(module)["__all__"] = sorted(classic_names(below))
        lend_names(module, below, classic_names(below))


def lend_names(module: ModuleType, path: str, names: Collection[str]) -> None:
    """Let a module answer to some of the classic's names, importing what they stand for when asked.

    Args:
        module: Asked for names that it does not hold.
        path: A key of `CLASSIC_PATHS`.
        names: Some of that path.
    """
    earlier = vars(module).get("__getattr__")

    def __getattr__(name: str) -> Any:
        if name not in names:
            if earlier is not None:
                return earlier(name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        value = vars(module)[name] = classic_name(path, name)
        return value

    vars(module)["__getattr__"] = __getattr__


def forward_classic_paths() -> None:
    """Make the classic's module paths importable below `rlhf_ppo`."""
    if not any(isinstance(finder, ClassicPaths) and finder.package == "rlhf_ppo" for finder in sys.meta_path):
        sys.meta_path.append(ClassicPaths("rlhf_ppo"))


def is_module(module: str) -> bool:
    """Whether there is such a module."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False
