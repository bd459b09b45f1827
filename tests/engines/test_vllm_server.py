"""TRL's own client against a server that speaks vLLM's HTTP: weights, responses, log-probabilities, mistakes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers import vllm
from rlhf_ppo.samplers.base import SamplingConfig, WeightSyncedSampler
from rlhf_ppo.samplers.vllm import VLLMSampler
from tests.engines.fake_vllm import FakeVLLM, serving
from tests.support.patience import PATIENCE
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_tokenizer

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
DRAW = SamplingConfig(max_new_tokens=6, num_return_sequences=2, stop_token_ids=tuple(range(0, VOCAB_SIZE, 9)))


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    """It starts with other weights than the policy's."""
    with serving(FakeVLLM(tiny_gpt2(seed=1))) as running:
        yield running


@pytest.fixture
def sampler(server: FakeVLLM, without_nccl: Any, free_port: int) -> VLLMSampler:
    return VLLMSampler(
        base_url=server.url, group_port=free_port, timeout=PATIENCE, tokenizer=tiny_tokenizer(), weight_transfer="nccl"
    )


def largest_gap(model: Any, samples: Any) -> float:
    """The largest difference between the sampler's log-probability of a token and the model's own."""
    inputs = TokenInputs(prompts=samples.prompts, responses=samples.responses)
    with torch.no_grad():
        own = TokenPolicy(model)(inputs).logprobs
    return max(float((row - own[i, : len(row)]).abs().max()) for i, row in enumerate(samples.logprobs))


def test_after_a_sync_the_server_draws_from_the_trainer_s_weights(sampler: VLLMSampler, server: FakeVLLM) -> None:
    model = tiny_gpt2(seed=0)
    assert isinstance(sampler, WeightSyncedSampler)
    sampler.sync_weights(model, Accelerator())
    samples = sampler(model, PROMPTS, DRAW)
    assert [prompt.tolist() for prompt in samples.prompts] == [p.tolist() for p in PROMPTS for _ in range(2)]
    assert len(samples.responses) == 4 and largest_gap(model, samples) < 1e-5
    for response, finished in zip(samples.responses, samples.finished, strict=True):
        assert finished == (int(response[-1]) in DRAW.stop_token_ids)
    for name, parameter in server.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name

    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.5)
    assert largest_gap(model, sampler(model, PROMPTS, DRAW)) > 0.01  # stale weights are seen
    sampler.sync_weights(model, Accelerator())
    assert largest_gap(model, sampler(model, PROMPTS, DRAW)) < 1e-5


def test_the_wire_carries_the_client_s_protocol(sampler: VLLMSampler, server: FakeVLLM) -> None:
    model = tiny_gpt2(seed=0)
    sampler.sync_weights(model, Accelerator())
    sampler(model, PROMPTS, DRAW)
    assert [path for path, _ in server.requests] == [
        "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update",
        "/reset_prefix_cache", "/v1/completions",
    ]  # fmt: skip
    asked = server.requests[-1][1]
    assert asked["prompt"] == [[5, 6, 7], [8, 9]] and asked["n"] == 2  # each prompt once
    assert asked["ignore_eos"] is True and asked["stop_token_ids"] == list(DRAW.stop_token_ids)
    assert asked["skip_special_tokens"] is False  # vLLM looks for stop strings in the text that it decodes


def test_adapters_arrive_merged_and_the_base_stays_bit_for_bit(sampler: VLLMSampler, server: FakeVLLM) -> None:
    """The base is the reference policy; in bfloat16 merging and unmerging alone would change it."""
    adapted = get_peft_model(
        tiny_gpt2(seed=0).to(torch.bfloat16), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    for _ in range(3):
        sampler.sync_weights(adapted, Accelerator())
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, before[name]), name
    merged = adapted.merge_and_unload()
    for name, parameter in server.model.named_parameters():
        assert_close(parameter, merged.get_parameter(name).float(), rtol=0, atol=0)


def test_training_sends_the_weights_before_every_rollout(sampler: VLLMSampler, server: FakeVLLM) -> None:
    """Every ratio is then 1, over three updates; a stale copy would show in the second."""
    tokenizer = tiny_tokenizer()
    prompts = PromptDataset.from_texts(["The movie", "I liked"], tokenizer)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0))
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4, learning_rate=1e-2, importance_sampling_cap=2.0), model,
        tokenizer=tokenizer, dataset=prompts,
    )  # fmt: skip
    state = trainer.train(
        lambda *, responses, **_: [float(len(text)) for text in responses],
        TrainConfig(iterations=3, sampling=SamplingConfig(max_new_tokens=4), progress=False), sampler=sampler,
    )  # fmt: skip
    for metrics in state.history:
        assert metrics["sampler/ratio_max"] == pytest.approx(1.0, abs=1e-4)
        assert metrics["sampler/logprob_difference"] < 1e-5
        assert metrics["sampler/truncated_share"] == 0.0
    assert [path for path, _ in server.requests].count("/update_weights") == 3


def test_raw_log_probabilities_are_refused_where_draws_are_warped(sampler: VLLMSampler, server: FakeVLLM) -> None:
    model = tiny_gpt2(seed=0)
    sampler.sync_weights(model, Accelerator())
    server.logprobs_mode = "raw_logprobs"
    sampler(model, PROMPTS, DRAW)  # at temperature 1, unfiltered, both are the same
    with pytest.raises(ValueError, match=r"--logprobs-mode raw_logprobs: .* Restart it with"):
        sampler(model, PROMPTS, SamplingConfig(max_new_tokens=4, temperature=0.7))


@pytest.mark.parametrize(
    ("faults", "message"),
    [({"prefix": [1]}, "answered other prompts"), ({"logprob": float("nan")}, "not a finite number")],
)
def test_a_wrong_answer_is_refused(
    sampler: VLLMSampler, server: FakeVLLM, faults: dict[str, Any], message: str
) -> None:
    model = tiny_gpt2(seed=0)
    sampler.sync_weights(model, Accelerator())
    server.faults = faults
    with pytest.raises(RuntimeError, match=message):
        sampler(model, PROMPTS, DRAW)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"dev_mode": False}, "VLLM_SERVER_DEV_MODE=1"), ({"weight_transfer": False}, "--weight-transfer-config")],
)
def test_a_server_started_without_weight_transfer_is_named_by_the_client(
    sampler: VLLMSampler, server: FakeVLLM, setting: dict[str, bool], message: str
) -> None:
    for name, value in setting.items():
        setattr(server, name, value)
    with pytest.raises(RuntimeError, match=message):
        sampler.sync_weights(tiny_gpt2(), Accelerator())


def test_the_client_itself_refuses_to_send_weights_from_a_cpu(stand_in: Any, server: FakeVLLM) -> None:
    sampler = VLLMSampler(base_url=server.url, timeout=PATIENCE, tokenizer=tiny_tokenizer(), weight_transfer="nccl")
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        sampler.sync_weights(tiny_gpt2(), Accelerator())


def test_a_server_that_is_not_there_is_an_error_with_its_address(stand_in: Any, free_port: int) -> None:
    sampler = VLLMSampler(base_url=f"http://127.0.0.1:{free_port}", timeout=0, tokenizer=tiny_tokenizer())
    with pytest.raises(OSError, match=f"127.0.0.1:{free_port}"):
        sampler.sync_weights(tiny_gpt2(), Accelerator())


def test_packed_weights_are_not_sent(stand_in: Any) -> None:
    model = tiny_gpt2()
    model.is_loaded_in_4bit = True  # as transformers marks a model that bitsandbytes has packed
    with pytest.raises(ValueError, match="got a base in 4 or 8 bits"):
        VLLMSampler(tokenizer=tiny_tokenizer()).sync_weights(model, Accelerator())


def test_an_engine_that_received_nothing_draws_nothing() -> None:
    with pytest.raises(RuntimeError, match="has no engine yet"):
        VLLMSampler()(tiny_gpt2(), PROMPTS, DRAW)


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'rlhf_ppo\[vllm\]'"):
        VLLMSampler(mode="colocate").sync_weights(tiny_gpt2(), Accelerator())
