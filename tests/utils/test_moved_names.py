"""Import paths that earlier versions documented keep working for one release, with a warning that names the new one."""

import importlib

import pytest

from rlhf_ppo.utils.moved_names import MOVED_MODULES, RENAMED

DOCUMENTED = {
    "reward_model.adoption": ["adopt"],
    "reward_model.card_page": ["text_table", "write_page"],
    "reward_model.client": ["RemoteRewardModel", "RewardServerTimeout"],
    "reward_model.contract": ["CONTRACT_FILE", "Contract"],
    "reward_model.ensemble": ["load_reward_model", "EnsembleRewardModel"],
    "reward_model.on_policy": ["reward_on_policy"],
    "reward_model.preparation": ["describe_split", "load_comparisons", "split_by_prompt"],
    "reward_model.report_card": ["report_card"],
    "reward_model.resume": ["is_resumable"],
    "reward_model.sources": ["read_rows"],
    "reward_model.tracking": ["training_curves"],
    "rlhf_ppo.controllers": ["Controller", "FixedKLController", "AdaptiveKLController"],
    "rlhf_ppo.leaving": ["leave_safely"],
    "rlhf_ppo.models.one_base": ["attach_critic_adapter", "put_reward_adapter"],
    "rlhf_ppo.normalizers": ["RunningMoments"],
    "rlhf_ppo.optimisers": ["adam", "linear_to_zero"],
    "rlhf_ppo.rollout.continuous": ["ContinuousBatching"],
    "rlhf_ppo.rollout.decoding": ["DecodeLoop"],
    "rlhf_ppo.rollout.engines": ["SamplerName", "make_sampler", "usual_cap"],
    "rlhf_ppo.rollout.reward_sources": [
        "RewardFailures", "RewardRequest", "RewardSource", "WeightedSource", "Reward", "Scores", "RewardSourceError",
        "combine", "score_batch",
    ],
    "rlhf_ppo.rollout.sampling": ["SamplingConfig", "Samples", "Sampler", "WeightFollower"],
    "rlhf_ppo.rollout.token_scores": ["token_scores"],
    "rlhf_ppo.rollout.transformers_generate": ["TransformersGenerate"],
    "rlhf_ppo.rollout.vllm": ["VLLMSampler"],
    "rlhf_ppo.signals": ["EXIT_RESUMABLE"],
    "rlhf_ppo.watch.guards": ["Guard", "Guards"],
}  # fmt: skip
"""What the documentation of version 0.1 imported from modules that have moved."""


def test_every_moved_module_is_in_the_list_of_what_was_documented() -> None:
    packages = {"rlhf_ppo.watch"}
    assert MOVED_MODULES.keys() - packages == DOCUMENTED.keys()


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in DOCUMENTED for name in DOCUMENTED[module]])
def test_a_documented_import_gives_the_object_of_the_new_path_and_names_it(module: str, name: str) -> None:
    target, renamed = MOVED_MODULES[module]
    new = getattr(importlib.import_module(target), renamed.get(name, name))
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is now {target}.{renamed.get(name, name)}"):
        old = getattr(importlib.import_module(module), name)
    assert old is new


@pytest.mark.parametrize(("module", "old", "new"), [(m, old, new) for m in RENAMED for old, new in RENAMED[m].items()])
def test_a_renamed_object_answers_to_its_old_name_and_warns(module: str, old: str, new: str) -> None:
    holder = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{old} is now .*{new}"):
        assert getattr(holder, old) is getattr(holder, new)


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(importlib.import_module("rlhf_ppo.models"), "nonsense")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from rlhf_ppo.models import nonsense  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rlhf_ppo.rollout.nonsense")


def test_the_import_statement_of_an_old_script_works() -> None:
    with pytest.warns(DeprecationWarning, match="SamplingConfig is now rlhf_ppo.samplers.base.SamplingConfig"):
        from rlhf_ppo.rollout.sampling import SamplingConfig
    assert SamplingConfig(max_new_tokens=3).max_new_tokens == 3
