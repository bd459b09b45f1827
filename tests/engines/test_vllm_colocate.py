"""An engine in the training process, through TRL's own class: it loads the model's folder and takes its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.vllm import VLLMSampler
from tests.engines.test_vllm_server import PROMPTS, largest_gap
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer


def test_the_engine_draws_from_the_weights_of_the_moment(stand_in: Any, tmp_path: Path) -> None:
    tiny_gpt2(seed=0).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.5)  # trained away from the folder
    sampler = VLLMSampler(mode="colocate", tokenizer=tiny_tokenizer(), gpu_memory_utilization=0.4)
    sampler.sync_weights(model, Accelerator())
    config = SamplingConfig(max_new_tokens=5, num_return_sequences=3, temperature=0.8)
    samples = sampler(model, PROMPTS, config)
    assert len({tuple(row.tolist()) for row in samples.responses}) > 3  # copies of one prompt differ
    sampler(model, PROMPTS, SamplingConfig(max_new_tokens=5))
    assert largest_gap(model, sampler(model, PROMPTS, SamplingConfig(max_new_tokens=5))) < 1e-5
    settings = sampler._engine.llm.settings
    assert settings["gpu_memory_utilization"] == 0.4
    assert settings["logprobs_mode"] == "processed_logprobs"


def test_a_model_built_in_memory_cannot_be_loaded_a_second_time(stand_in: Any) -> None:
    with pytest.raises(ValueError, match="its name_or_path is empty"):
        VLLMSampler(mode="colocate", tokenizer=tiny_tokenizer()).sync_weights(tiny_gpt2(), Accelerator())
