"""Weights that go to a vLLM server by files: no GPU, and no vLLM where the trainer runs."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from rlhf_ppo.samplers import vllm_weights
from rlhf_ppo.samplers.vllm import VLLMSampler
from tests.engines.fake_vllm import FakeVLLM, serving
from tests.engines.test_vllm_server import DRAW, PROMPTS, largest_gap
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with serving(FakeVLLM(tiny_llama(seed=1))) as running:
        yield running


def sampler(server: FakeVLLM, **settings: object) -> VLLMSampler:
    return VLLMSampler(base_url=server.url, timeout=0, tokenizer=tiny_tokenizer(), **settings)


def test_the_server_draws_from_the_trainer_s_weights(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_weights, "FILE_BYTES", 5000)  # several files
    model, drawing = tiny_llama(seed=0), sampler(server)
    for _ in range(2):
        drawing.sync_weights(model, Accelerator())
        assert largest_gap(model, drawing(model, PROMPTS, DRAW)) < 1e-5
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        assert largest_gap(model, drawing(model, PROMPTS, DRAW)) > 0.01  # stale weights are seen
    assert [path for path, _ in server.requests].count("/collective_rpc") == 2


def test_adapters_arrive_merged(server: FakeVLLM) -> None:
    adapted = get_peft_model(tiny_llama(seed=0), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    sampler(server).sync_weights(adapted, Accelerator())
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    merged = adapted.merge_and_unload()
    for name, parameter in server.model.named_parameters():
        torch.testing.assert_close(parameter, merged.get_parameter(name), rtol=0, atol=0)


@pytest.mark.parametrize("own", ["default", "policy"])
def test_a_head_in_the_policy_s_adapter_arrives_and_no_other_adapter_s_does(server: FakeVLLM, own: str) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(tiny_llama(seed=0), lora, adapter_name=own)
    for name in {"default", "policy", "reference"} - {own}:
        adapted.add_adapter(name, lora)
    adapted.set_adapter(own)
    heads = adapted.base_model.model.lm_head.modules_to_save
    with torch.no_grad():
        heads[own].weight.mul_(2.0)
    sampler(server).sync_weights(adapted, Accelerator())
    assert torch.equal(server.model.lm_head.weight, heads[own].weight)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
        AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=10, init_lora_weights=False),
    ],
    ids=["tokens", "embeddings", "adalora"],
)
def test_adapters_on_tokens_and_of_other_kinds_arrive_merged(server: FakeVLLM, config: Any) -> None:
    adapted, drawing = get_peft_model(tiny_llama(seed=0), config).eval(), sampler(server)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    drawing.sync_weights(adapted, Accelerator())
    assert largest_gap(adapted, drawing(adapted, PROMPTS, DRAW)) < 1e-4
    with adapted.disable_adapter():
        assert largest_gap(adapted, drawing(adapted, PROMPTS, DRAW)) > 0.01


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
)
def test_an_adapter_that_sets_a_tied_head_apart_is_refused(settings: dict[str, Any]) -> None:
    """The engine has one weight for embedding and head: it would sample from another policy, without a word."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})
    adapted = get_peft_model(tiny_llama(tie_word_embeddings=True), config)
    with pytest.raises(ValueError, match="vLLM keeps a single weight for both"):
        VLLMSampler(timeout=0, tokenizer=tiny_tokenizer()).sync_weights(adapted, Accelerator())


def test_after_an_error_on_the_way_the_base_is_whole(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = get_peft_model(tiny_llama(seed=0), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    monkeypatch.setattr(vllm_weights, "save_file", Mock(side_effect=OSError("disk full")))
    monkeypatch.setattr(vllm_weights, "FILE_BYTES", 5000)
    with pytest.raises(OSError, match="disk full"):
        sampler(server).sync_weights(adapted, Accelerator())
    assert not any(layer.merged for layer in adapted.modules() if isinstance(layer, BaseTunerLayer))
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_weights_go_in_the_dtype_that_the_server_computes_in(server: FakeVLLM) -> None:
    server.model.to(torch.bfloat16)
    model = tiny_llama(seed=0)
    sampler(server).sync_weights(model, Accelerator())
    for name, parameter in server.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(torch.bfloat16))


def test_a_tied_head_is_refused_by_a_server_on_a_cpu_that_would_take_half_of_it(server: FakeVLLM) -> None:
    server.device = "cpu"
    sampler(server).sync_weights(tiny_llama(), Accelerator())
    with pytest.raises(ValueError, match="half of an update would be lost"):
        sampler(server).sync_weights(tiny_gpt2(), Accelerator())


def test_a_server_elsewhere_needs_a_folder_that_both_see() -> None:
    far = VLLMSampler(base_url="http://gpu7:8000", timeout=0, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"VLLMSampler\(transfer_dir=\.\.\.\)"):
        far.sync_weights(tiny_llama(), Accelerator())


def test_a_folder_for_files_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_weights, "is_vllm_available", lambda: True)
    gpu = torch.device("cuda")
    assert vllm_weights.choose_transfer("auto", gpu, None) == "nccl"
    assert vllm_weights.choose_transfer("auto", gpu, "/shared") == "disk"
    with pytest.raises(ValueError, match="the folder would be ignored"):
        vllm_weights.choose_transfer("nccl", gpu, "/shared")


def test_a_server_that_cannot_read_the_files_is_named(server: FakeVLLM) -> None:
    server.faults["unreadable"] = True
    with pytest.raises(RuntimeError, match=r"to read the weights in .*collective_rpc method failed"):
        sampler(server).sync_weights(tiny_llama(), Accelerator())


def test_a_server_that_ended_draws_nothing() -> None:
    model = tiny_llama()
    with serving(FakeVLLM(tiny_llama())) as running:
        drawing = sampler(running)
        drawing.sync_weights(model, Accelerator())
    with pytest.raises(OSError, match=running.url):
        drawing(model, PROMPTS, DRAW)
    with pytest.raises(OSError, match=running.url):
        drawing.sync_weights(model, Accelerator())
