"""The sampler over continuous batching: the contract of a sampler, on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.continuous import ContinuousBatching
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_t5

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([11] * 9)]
DRAW = SamplingConfig(max_new_tokens=8, stop_token_ids=tuple(range(0, VOCAB_SIZE, 9)))
SMALL = ContinuousBatching(page_size=16, max_batch_tokens=32, max_rows=4)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_greedy_responses_equal_the_decode_loop_s(build: Callable[[], Any]) -> None:
    model, greedy = build(), replace(DRAW, do_sample=False)
    theirs, ours = SMALL(model, PROMPTS, greedy), DecodeLoop()(model, PROMPTS, greedy)
    assert [row.tolist() for row in theirs.responses] == [row.tolist() for row in ours.responses]
    assert theirs.finished == ours.finished


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.7, "top_k": 20}, {"temperature": 1.3, "top_p": 0.8}], ids=str)
def test_log_probabilities_are_those_of_the_distribution_that_was_drawn_from(rules: dict[str, Any]) -> None:
    """Each drawn token is given to the own loop as its greedy path would be: by scoring the same distribution."""
    model, config = tiny_gpt2(), replace(DRAW, num_return_sequences=2, **rules)
    samples = SMALL(model, PROMPTS, config)
    assert len(samples.responses) == 6 and len({tuple(row.tolist()) for row in samples.responses}) > 3
    assert samples.logprobs is not None
    for prompt, response, logprobs in zip(samples.prompts, samples.responses, samples.logprobs, strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].detach()
        logits = logits / config.temperature
        if config.top_k:
            logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], -torch.inf)
        if config.top_p < 1:
            ordered, order = logits.softmax(-1).sort(descending=True)
            beyond = (ordered.cumsum(-1) - ordered >= config.top_p).gather(-1, order.argsort(-1))
            logits = logits.masked_fill(beyond, -torch.inf)
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_adapters_act() -> None:
    base = tiny_gpt2()
    greedy = replace(DRAW, do_sample=False, stop_token_ids=())
    before = SMALL(base, PROMPTS, greedy)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    theirs, ours = SMALL(adapted, PROMPTS, greedy), DecodeLoop()(adapted, PROMPTS, greedy)
    assert [row.tolist() for row in theirs.responses] == [row.tolist() for row in ours.responses]
    assert [row.tolist() for row in theirs.responses] != [row.tolist() for row in before.responses]


def test_the_global_random_state_and_the_training_mode_stay() -> None:
    model = tiny_gpt2().train()
    before = torch.get_rng_state()
    SMALL(model, PROMPTS, DRAW, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_without_a_generator_every_call_draws_anew() -> None:
    model = tiny_gpt2()
    first, second = (SMALL(model, PROMPTS[:1], DRAW).responses[0].tolist() for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    "rule", [{"repetition_penalty": 1.5}, {"min_new_tokens": 2}, {"stop_strings": ("e",)}], ids=str
)
def test_a_rule_that_would_be_dropped_is_refused(rule: dict[str, Any]) -> None:
    name = next(iter(rule))
    with pytest.raises(ValueError, match=f"ContinuousBatching does not support SamplingConfig.{name}"):
        SMALL(tiny_gpt2(), PROMPTS, replace(DRAW, **rule))


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a causal model"):
        SMALL(tiny_t5(), PROMPTS, DRAW)


def test_lost_requests_are_an_error_and_not_a_shorter_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()
    whole = model.generate_batch

    def lossy(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(list(whole(*args, **kwargs).items())[1:])

    monkeypatch.setattr(model, "generate_batch", lossy, raising=False)
    with pytest.raises(RuntimeError, match="finished 2 of 3 requests"):
        SMALL(model, PROMPTS, DRAW)
