"""The sampler over `model.generate`: same contract as the decode loop, without log-probabilities."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2LMHeadModel

from rlhf_ppo.models.loading import cache_argument
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.transformers_generate import TransformersGenerate
from tests.support.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

STOPS = tuple(range(0, VOCAB_SIZE, 9))
DRAW = SamplingConfig(max_new_tokens=12, stop_token_ids=STOPS)


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(
    "rules",
    [{}, {"min_new_tokens": 5}, {"repetition_penalty": 1.5}, {"stop_token_ids": ()}, {"stop_strings": ("e",)}],
    ids=str,
)
@pytest.mark.parametrize("static_cache", [False, True], ids=["growing cache", "static cache"])
def test_greedy_responses_equal_the_decode_loop_s(build: type, rules: dict[str, object], static_cache: bool) -> None:
    model, tokenizer, queries = build(), tiny_tokenizer(), prompts(3, 9, 5)
    config = replace(DRAW, do_sample=False, **rules)
    theirs = TransformersGenerate(tokenizer=tokenizer, static_cache=static_cache)(model, queries, config)
    ours = DecodeLoop(tokenizer)(model, queries, config)
    assert [r.tolist() for r in theirs.responses] == [r.tolist() for r in ours.responses]
    assert theirs.finished == ours.finished
    assert theirs.logprobs is None


def test_a_static_cache_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[str] = []
    plain, name = GPT2LMHeadModel.forward, cache_argument(tiny_gpt2())

    def watched(model: GPT2LMHeadModel, *arguments: Any, **settings: Any) -> Any:
        caches.append(type(settings.get(name)).__name__)
        return plain(model, *arguments, **settings)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", watched)
    for static in (False, True):
        TransformersGenerate(static_cache=static)(tiny_gpt2(), prompts(3), replace(DRAW, max_new_tokens=2))
    assert set(caches) == {"NoneType", "DynamicCache", "StaticCache"}  # none in the model's own call


def test_copies_stand_side_by_side_and_end_at_their_own_stop() -> None:
    queries = prompts(3, 9, 5)
    config = replace(DRAW, num_return_sequences=8)
    samples = TransformersGenerate(max_rows=16)(tiny_gpt2(), queries, config, generator=seeded())
    assert [p.tolist() for p in samples.prompts] == [q.tolist() for q in queries for _ in range(8)]
    assert len({len(r) for r in samples.responses}) > 3
    for response, finished in zip(samples.responses, samples.finished, strict=True):
        assert not any(token in STOPS for token in response[:-1].tolist())
        assert finished == (int(response[-1]) in STOPS)


def test_a_generator_decides_and_the_global_random_state_stays() -> None:
    model, runs = tiny_gpt2(), []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        runs.append(TransformersGenerate()(model, prompts(3, 5), DRAW, generator=seeded()))
        assert torch.equal(before, torch.get_rng_state())
    assert [r.tolist() for r in runs[0].responses] == [r.tolist() for r in runs[1].responses]


@pytest.mark.parametrize(
    "build", [tiny_t5, tiny_gpt2, lambda: get_peft_model(tiny_gpt2(), LoraConfig(fan_in_fan_out=True))]
)
def test_settings_of_the_generation_config_do_not_act(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, queries = build(), prompts(3, 5)
    config = SamplingConfig(max_new_tokens=6, stop_token_ids=(EOS_TOKEN_ID,), do_sample=False)
    expected = TransformersGenerate()(model, queries, config)
    settings: dict[str, Any] = {"forced_eos_token_id": EOS_TOKEN_ID, "min_length": 20, "no_repeat_ngram_size": 1}
    first = [int(row[0]) for row in expected.responses]
    settings |= {"forced_bos_token_id": 7, "suppress_tokens": first, "min_p": 0.9, "num_beams": 4}
    own = model.generation_config
    own.update(**settings)
    samples = TransformersGenerate()(model, queries, config)
    assert [row.tolist() for row in samples.responses] == [row.tolist() for row in expected.responses]
    assert samples.finished == expected.finished
    assert model.generation_config is own and own.num_beams == 4
    assert "forces token 7" in caplog.text


def test_an_encoder_decoder_s_responses_do_not_hold_the_start_token() -> None:
    model, queries = tiny_t5(), prompts(3, 5)
    config = SamplingConfig(max_new_tokens=6, stop_token_ids=(EOS_TOKEN_ID,), do_sample=False)
    samples = TransformersGenerate()(model, queries, config)
    for query, response in zip(queries, samples.responses, strict=True):
        whole = model.generate(input_ids=query[None], max_new_tokens=6, do_sample=False)[0]
        assert whole[1:].tolist() == response.tolist()
