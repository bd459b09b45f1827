"""Published settings are settings of ours, and each says where it was read."""

from dataclasses import fields
from typing import get_args

import pytest

from rlhf_ppo import PPOConfig
from rlhf_ppo.presets import PRESETS, PresetName, published_run
from tests.docs.pages import ROOT


@pytest.mark.parametrize("name", get_args(PresetName))
def test_every_value_of_a_preset_has_its_source(name: PresetName) -> None:
    found = published_run(name)
    further = {"new_tokens", "missing_eos", "anneal", "separate_critic"}
    given = {field for field in further if getattr(found, field)}
    assert set(found.sources) == set(found.settings) | given
    assert all(len(source) > 5 for source in found.sources.values())
    assert f"`{name}`" in (ROOT / "docs" / "presets.md").read_text()


@pytest.mark.parametrize("name", get_args(PresetName))
def test_a_preset_makes_a_config_that_may_be_changed(name: PresetName) -> None:
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
    assert set(PRESETS) == set(get_args(PresetName))
    with pytest.raises(ValueError, match="ziegler2019"):
        published_run("openai2030")
