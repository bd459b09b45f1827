"""Old import paths of version 0.1, which keep working for one release with a DeprecationWarning."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED_MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "rlhf_ppo.controllers": ("rlhf_ppo.learner.kl_controllers", {"Controller": "KLController"}),
    "rlhf_ppo.normalizers": ("rlhf_ppo.learner.running_moments", {}),
    "rlhf_ppo.optimisers": ("rlhf_ppo.updates.optimizers", {}),
    "rlhf_ppo.signals": ("rlhf_ppo.loop.signals", {}),
    "rlhf_ppo.leaving": ("rlhf_ppo.distributed.shutdown", {"leave_safely": "wait_for_gloo_threads"}),
    "rlhf_ppo.watch": ("rlhf_ppo.diagnostics", {}),
    "rlhf_ppo.watch.guards": ("rlhf_ppo.diagnostics.guards", {}),
    "rlhf_ppo.models.one_base": (
        "rlhf_ppo.models.shared_base_adapters", {"put_reward_adapter": "attach_reward_adapter"},
    ),
    "rlhf_ppo.rollout.sampling": ("rlhf_ppo.samplers.base", {"WeightFollower": "WeightSyncedSampler"}),
    "rlhf_ppo.rollout.decoding": ("rlhf_ppo.samplers.decode_loop", {}),
    "rlhf_ppo.rollout.transformers_generate": ("rlhf_ppo.samplers.transformers_generate", {}),
    "rlhf_ppo.rollout.continuous": ("rlhf_ppo.samplers.continuous", {}),
    "rlhf_ppo.rollout.vllm": ("rlhf_ppo.samplers.vllm", {}),
    "rlhf_ppo.rollout.engines": ("rlhf_ppo.samplers.make_sampler", {"usual_cap": "default_importance_cap"}),
    "rlhf_ppo.rollout.reward_sources": (
        "rlhf_ppo.rewards.sources", {"Scores": "RewardScores", "Sources": "RewardSources", "combine": "named_sources"},
    ),
    "rlhf_ppo.rollout.token_scores": ("rlhf_ppo.rewards.token_scores", {}),
    "reward_model.adoption": ("reward_model.models.adoption", {}),
    "reward_model.card_page": ("reward_model.evaluation.card_page", {}),
    "reward_model.client": ("reward_model.serving.client", {}),
    "reward_model.contract": ("reward_model.models.contract", {}),
    "reward_model.ensemble": ("reward_model.models.ensemble", {}),
    "reward_model.on_policy": ("reward_model.models.on_policy", {}),
    "reward_model.preparation": ("reward_model.data.preparation", {}),
    "reward_model.report_card": ("reward_model.evaluation.report_card", {}),
    "reward_model.resume": ("reward_model.training.resume", {}),
    "reward_model.sources": ("reward_model.data.sources", {}),
    "reward_model.tracking": ("reward_model.training.tracking", {}),
}  # fmt: skip
"""Old module -> (new module, {old name: new name} of what was renamed on the way)."""

RENAMED: dict[str, dict[str, str]] = {
    "rlhf_ppo.checkpoints": {
        "only_run_in": "lock_run_folder", "checkpoints": "list_checkpoints", "latest": "latest_checkpoint",
        "Restored": "RestoredCheckpoint",
    },
    "rlhf_ppo.control": {"Episodes": "EvaluationResult", "frames": "render_frames"},
    "rlhf_ppo.functional": {
        "whitening": "whitening_statistics", "last_action": "last_action_index", "next_states_kl": "next_state_kl",
        "zero_outside": "zero_where_masked",
    },
    "rlhf_ppo.models": {"put_reward_adapter": "attach_reward_adapter"},
    "rlhf_ppo.models.adapters": {"trained_share": "describe_trainable_parameters"},
    "rlhf_ppo.presets": {"Published": "PublishedRun", "published": "published_run"},
    "reward_model": {"TrainedRewardModel": "RewardModelResult", "Normalisation": "Normalization"},
}  # fmt: skip
"""Module -> {old name: new name} where the module stays."""


def forward_names(
    module: str, target: str, renamed: Mapping[str, str], otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """A module-level `__getattr__` (PEP 562) that looks names up in `target`, warning that they have moved.

    Args:
        module: The module that gets the `__getattr__`.
        target: Where the names are now; the module itself when only names have changed.
        renamed: Old name -> new name.
        otherwise: The module's own `__getattr__`, for names that have not moved.
    """

    def __getattr__(name: str) -> Any:
        if name.startswith("__") or (module == target and name not in renamed):
            if otherwise is not None:
                return otherwise(name)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = renamed.get(name, name)
        value = getattr(import_module(target), new)
        warnings.warn(
            f"{module}.{name} is now {target}.{new}; the old name goes with the next release. Change the import.",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    return __getattr__


class _MovedModules(MetaPathFinder, Loader):
    """Import hook: an old module path gives an empty module that forwards its names."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name not in MOVED_MODULES:
            return None
        is_package = any(other.startswith(f"{name}.") for other in MOVED_MODULES)
        return ModuleSpec(name, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = forward_names(module.__name__, *MOVED_MODULES[module.__name__])  # type: ignore[method-assign]


def forward_old_names(package: str) -> None:
    """Make the old module paths, and the old names of the modules of `package` that are imported by now, work."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
    for name, renamed in RENAMED.items():
        if name in sys.modules and f"{name}.".startswith(f"{package}."):
            own = vars(sys.modules[name]).get("__getattr__")
            sys.modules[name].__getattr__ = forward_names(name, name, renamed, own)  # type: ignore[method-assign]
