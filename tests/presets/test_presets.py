"""Published settings are settings of ours, and each says where it was read."""

from dataclasses import fields
from typing import get_args

import pytest
import torch

from rlhf_ppo import PPOConfig, PPOTrainer, SeparateCritic, attach_critic
from rlhf_ppo.presets import PRESETS, ClassicPresetName, published_run
from tests.classic.test_classic import policy, weights
from tests.docs.pages import ROOT
from tests.support.tiny_models import tiny_tokenizer


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_has_its_source(name: str) -> None:
    found = published_run(name)
    further = {"new_tokens", "missing_eos", "anneal", "separate_critic", "algorithm", "group_size", "overlong_share"}
    further |= {"dynamic_sampling"}
    given = {field for field in further if getattr(found, field)}
    assert set(found.sources) == set(found.settings) | given
    assert all(len(source) > 5 for source in found.sources.values())
    assert f"`{name}`" in (ROOT / "docs" / "presets.md").read_text()


@pytest.mark.parametrize("name", get_args(ClassicPresetName))
def test_a_preset_makes_a_config_that_may_be_changed(name: str) -> None:
    config = published_run(name).config(batch_size=8, mini_batch_size=4)
    assert config.batch_size == 8
    assert config.learning_rate == published_run(name).settings["learning_rate"]
    assert config.ppo_epochs == 4 and config.gamma == 1.0 and config.lam == 0.95


def test_the_classics_preset_is_the_default_configuration() -> None:
    """Every value, also of fields that it does not name."""
    classic, default = published_run("trl-classic").config(), PPOConfig()
    assert {item.name: getattr(classic, item.name) for item in fields(PPOConfig)} == {
        item.name: getattr(default, item.name) for item in fields(PPOConfig)
    }


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    assert set(get_args(ClassicPresetName)) < set(PRESETS)
    with pytest.raises(ValueError, match="ziegler2019"):
        published_run("openai2030")


RECENT = [name for name, run in PRESETS.items() if run.algorithm is not None]


@pytest.mark.parametrize("name", RECENT)
def test_a_preset_with_an_algorithm_builds_a_trainer_that_learns(name: str) -> None:
    """With sizes that a test can bear, and the critic of its own where the run had one."""
    found = published_run(name)
    model = policy()
    if found.separate_critic:
        attach_critic(model, SeparateCritic.from_policy(model))
    changes = {"batch_size": 4, "mini_batch_size": 4, "diagnose": False, "learning_rate": 1e-3, "ppo_epochs": 1}
    changes |= {"importance_sampling": "off"}  # `step` has no probabilities of a sampler
    config = found.config(**changes)
    own = PPOTrainer(config, model, None, tiny_tokenizer(), algorithm=found.algorithm)
    before = weights(own)
    responses = [torch.tensor(row) for row in ([10, 11], [12], [13, 14], [15])]
    scores = [torch.tensor(score) for score in (1.0, 0.0, 2.0, -1.0)]
    own.step([torch.tensor([5, 6])] * 4, responses, scores, group_size=2)
    assert not torch.equal(before, weights(own)) or "critic" in str(found.algorithm)


def test_recent_presets_say_what_is_no_setting_of_the_algorithm() -> None:
    dapo = published_run("dapo")
    assert dapo.group_size == 16 and dapo.dynamic_sampling and dapo.new_tokens == 20480
    assert dapo.overlong_share is not None and dapo.overlong_share * dapo.new_tokens == 4096
    assert set(RECENT) == {"orz", "vapo", "turn-ppo", "sao", "dapo", "dr-grpo", "gspo"}
