"""Without dropout, passes in training mode are equal: with layer dropout, and where a config is read in each pass."""

import copy

import pytest
import torch

from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.trunk import call_model
from tests.models.zoo import KINDS, PROMPTS
from tests.support.tiny_architectures import config_of


@pytest.mark.parametrize("name", ["seq2seq/m2m_100", "seq2seq/prophetnet", "persimmon", "falcon"])
def test_two_passes_in_training_mode_are_equal_and_the_config_stays(name: str) -> None:
    kind, slash, plain = name.rpartition("/")
    config = config_of(plain)
    for each in (config, *(getattr(config, part) for part in config.sub_configs)):
        for setting, value in vars(each).items():
            if "drop" in setting and isinstance(value, float):
                setattr(each, setting, 0.5)
    torch.manual_seed(0)
    model = KINDS[kind + slash][0].from_config(copy.deepcopy(config)).train()
    given = {"input_ids": PROMPTS[0][None]} | ({"decoder_input_ids": PROMPTS[1][None]} if slash else {})
    before = model.config.to_dict()
    disable_dropout(model)
    first, second = (call_model(model, **given).logits for _ in range(2))
    assert torch.equal(first, second)
    assert model.config.to_dict() == before
    assert all(module.training for module in model.modules())


def test_a_module_may_call_a_number_its_config() -> None:
    """Idefics does."""
    model = torch.nn.Sequential(torch.nn.Dropout(0.5))
    model[0].config = 0.5
    disable_dropout(model)
    assert model[0].p == 0.0
