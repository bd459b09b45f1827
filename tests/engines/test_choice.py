"""Samplers by name."""

from typing import Any, get_args

import pytest

from rlhf_ppo.samplers.base import Sampler, WeightSyncedSampler
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.make_sampler import SamplerName, default_importance_cap, make_sampler
from rlhf_ppo.samplers.vllm import VLLMSampler
from sentiment.settings import EngineSettings
from tests.support.tiny_models import tiny_tokenizer


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_every_name_has_a_sampler(name: SamplerName) -> None:
    sampler = make_sampler(name, tiny_tokenizer(), vllm_url="http://gpu:8000")
    assert isinstance(sampler, Sampler)
    assert isinstance(sampler, WeightSyncedSampler) == name.startswith("vllm")
    assert (default_importance_cap(name) is None) == (name in ("loop", "generate", "generate-static"))


def test_a_name_decides() -> None:
    assert isinstance(make_sampler("loop"), DecodeLoop)
    server, colocated = make_sampler("vllm-server", vllm_url="http://gpu:1"), make_sampler("vllm-colocate")
    assert isinstance(server, VLLMSampler) and isinstance(colocated, VLLMSampler)
    assert (server.mode, server.base_url, colocated.mode) == ("server", "http://gpu:1", "colocate")


def test_the_recipes_refuse_vllm_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match="--sampler vllm-server needs vLLM, which is not installed here"):
        EngineSettings(sampler="vllm-server")
    assert EngineSettings().importance_sampling_cap is None


def test_with_vllm_the_recipes_take_it(stand_in: Any) -> None:
    settings = EngineSettings(sampler="vllm-colocate")
    assert settings.importance_sampling_cap == 2.0
    assert isinstance(settings.make_sampler(tiny_tokenizer()), VLLMSampler)
