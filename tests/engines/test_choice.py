"""Samplers by name."""

from typing import Any, get_args

import pytest
import torch

from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import Sampler, WeightSyncedSampler
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.make_sampler import SamplerName, default_importance_cap, make_sampler
from rlhf_ppo.samplers.vllm import VLLMSampler
from sentiment import engines
from sentiment.engines import EngineSettings, VLLMSettings
from tests.support.tiny_models import tiny_tokenizer

PROMPTS = [PromptDataset.from_texts([text], tiny_tokenizer()) for text in ("I", "The movie")]


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_every_name_has_a_sampler(name: SamplerName) -> None:
    sampler = make_sampler(name, tiny_tokenizer(), vllm_url="http://gpu:8000")
    assert isinstance(sampler, Sampler)
    assert isinstance(sampler, WeightSyncedSampler) == name.startswith("vllm")
    assert (default_importance_cap(name) is None) == (name in ("auto", "loop", "generate", "generate-static"))


def test_a_name_decides() -> None:
    assert isinstance(make_sampler("loop"), DecodeLoop)
    server, colocated = make_sampler("vllm-server", vllm_url="http://gpu:1"), make_sampler("vllm-colocate")
    assert isinstance(server, VLLMSampler) and isinstance(colocated, VLLMSampler)
    assert (server.mode, server.base_url, colocated.mode) == ("server", "http://gpu:1", "colocate")


def test_the_recipes_refuse_vllm_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "is_vllm_available", lambda: False)
    with pytest.raises(ValueError, match="--sampler vllm-colocate needs vLLM, which is not installed here"):
        EngineSettings(sampler="vllm-colocate")
    assert EngineSettings().importance_sampling_cap is None


def test_with_vllm_the_recipes_take_it(stand_in: Any) -> None:
    settings = EngineSettings(sampler="vllm-colocate")
    assert settings.importance_sampling_cap == 2.0
    made = settings.make_sampler(tiny_tokenizer(), PROMPTS, 38)
    assert isinstance(made, VLLMSampler)
    assert made.max_model_length == PROMPTS[1].lengths[0] + 38


def test_settings_of_vllm_given_to_a_recipe_arrive(stand_in: Any) -> None:
    given = VLLMSettings(enable_sleep_mode=True, max_model_length=9, gpu_memory_utilization=0.5, dtype="bfloat16")
    made = EngineSettings(sampler="vllm-colocate", vllm=given).make_sampler(tiny_tokenizer(), PROMPTS, 38)
    assert isinstance(made, VLLMSampler)
    found = (made.enable_sleep_mode, made.max_model_length, made.gpu_memory_utilization, made.dtype)
    assert found == (True, 9, 0.5, "bfloat16")


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"vllm": VLLMSettings(dtype="bfloat16")}, "--sampler loop does not read --vllm.dtype"),
        ({"vllm_url": "http://gpu:1"}, "--sampler loop does not read --vllm-url"),
        ({"sampler": "generate", "kv_budget_gib": 2.0}, "choose --sampler loop or continuous or auto"),
        ({"sampler": "vllm-server", "vllm": VLLMSettings(enable_sleep_mode=True)}, "choose --sampler vllm-colocate"),
    ],
)
def test_a_setting_that_the_chosen_sampler_does_not_read_is_refused(settings: dict[str, Any], unread: str) -> None:
    with pytest.raises(ValueError, match=unread):
        EngineSettings(**settings)


def test_a_setting_of_the_other_mode_of_vllm_is_refused() -> None:
    with pytest.raises(ValueError, match="got dtype: only mode='colocate' reads them"):
        VLLMSampler(dtype="float32")
    with pytest.raises(ValueError, match="got timeout: only mode='server' reads them"):
        VLLMSampler(mode="colocate", timeout=1.0)


@pytest.mark.parametrize("installed", [True, False])
def test_auto_is_vllm_on_a_gpu_that_has_it_and_else_the_own_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed: bool
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr("rlhf_ppo.samplers.make_sampler.is_vllm_available", lambda: installed)
    assert isinstance(make_sampler("auto"), DecodeLoop)  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = make_sampler("auto", vllm={"max_model_length": 24})
    assert isinstance(made, VLLMSampler if installed else DecodeLoop)
    assert default_importance_cap("auto") == (2.0 if installed else None)
    assert caplog.messages[-1] == f"sampler: {'vLLM in this process, asleep in updates' if installed else 'own loop'}"
    if isinstance(made, VLLMSampler):
        assert (made.enable_sleep_mode, made.max_model_length) == (True, 24)
