"""Decoding over tensors that stay where they are gives what the plain loop gives, and declines what it does not fit."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.models.loading import cache_argument
from rlhf_ppo.samplers import kv_cache, static_step
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.samplers.test_decode_loop import ARCHITECTURES, DRAW, prompts, same, seeded
from tests.support.pretend_cuda import recorded
from tests.support.tiny_models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
QUERIES = prompts(3, 9, 5, 1, 7)
SLIDING = {"gemma2-sliding", "gemma3-sliding", "mistral-sliding"}


def both(model: Any, config: SamplingConfig, **settings: Any) -> None:
    """The static loop's responses, log-probabilities and values are the plain one's."""
    plain, static = (
        DecodeLoop(static_step=each, **settings)(model, QUERIES, config, generator=seeded()) for each in (False, True)
    )
    same(static, plain)
    if plain.values is not None:
        assert static.values is not None
        torch.testing.assert_close(torch.cat(static.values), torch.cat(plain.values), atol=1e-5, rtol=1e-5)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are 'captured' on the CPU: what is recorded is run again with the same tensors; rows of each."""
    graphs: list[int] = []

    def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        replay, result = recorded(function)
        graphs.append(len(result))
        return replay, result

    init = static_step.StaticStep.__init__

    def capturing(self: Any, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        self.captures = True

    monkeypatch.setattr(static_step, "capture", record)
    monkeypatch.setattr(static_step.StaticStep, "__init__", capturing)
    return graphs


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in SLIDING])
def test_a_static_step_gives_the_plain_loop_s_tokens_and_log_probabilities(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Several stop tokens, prompts of unequal length, several responses to a prompt, rows that leave."""
    model = ARCHITECTURES[name]()
    both(model, replace(DRAW, num_return_sequences=3))
    both(model, replace(DRAW, do_sample=False), max_rows=2, stop_check_interval=5)
    assert not caplog.messages  # nothing was declined


@pytest.mark.parametrize("interval", [1, 5])
def test_rows_leave_when_a_quarter_has_finished_and_the_window_grows_by_buckets(
    captured: list[int], monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    monkeypatch.setattr(static_step, "BUCKET", 16)
    monkeypatch.setattr(static_step, "MIN_STEPS", 2)
    config = replace(DRAW, max_new_tokens=60, num_return_sequences=4, stop_token_ids=tuple(range(0, 320, 24)))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama())
    nn.init.normal_(model.v_head.summary.weight)
    both(model, config, stop_check_interval=interval)
    captured = captured[captured.index(20) :]  # the proof's steps were before
    rows = list(dict.fromkeys(captured))
    assert len(rows) > 2
    assert all(after <= 0.75 * before for before, after in pairwise(rows))
    assert len(captured) > len(rows)  # of longer windows


def test_settings_act_and_limits_end_rows(captured: list[int]) -> None:
    warped = replace(DRAW, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2, min_new_tokens=3)
    both(tiny_gpt2(), warped)
    model = tiny_gpt2()
    limits = [1, 12, 2, 5, 3]
    plain, static = (
        DecodeLoop(static_step=each)(model, QUERIES, DRAW, generator=seeded(), limits=limits) for each in (False, True)
    )
    same(static, plain)
    assert captured


@pytest.mark.parametrize("name", sorted(SLIDING))
def test_a_cache_of_windows_is_declined_in_one_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    both(ARCHITECTURES[name](), DRAW)
    assert caplog.messages == ["decoding without CUDA graphs: its cache keeps a window of positions"]


def test_attention_without_sdpa_s_masks_is_declined(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama().config, attn_implementation="eager").eval()
    both(model, DRAW)
    assert caplog.messages == ["decoding without CUDA graphs: its attention is 'eager', not 'sdpa'"]


def test_a_model_that_reads_its_mask_otherwise_is_declined_by_the_proof(caplog: pytest.LogCaptureFixture) -> None:
    """Positions counted from a mask with as many columns as tokens."""

    name = cache_argument(tiny_llama())

    class Counting(type(tiny_llama())):  # type: ignore[misc]
        def forward(
            self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, cache: Any = None,
            use_cache: Any = None, **rest: Any,
        ) -> Any:  # fmt: skip
            if attention_mask is not None and attention_mask.dim() == 4:
                position_ids = position_ids * 0 + attention_mask.shape[-1] - 1
            rest.setdefault(name, cache)
            return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **rest)

    model = tiny_llama()
    model.__class__ = Counting
    both(model, DRAW)
    assert "log-probabilities that differ" in caplog.messages[0]


def test_a_graph_whose_first_logits_differ_is_given_up_in_one_line(
    captured: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        return (lambda: None), function() * 1.01

    def refuses(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    longer = replace(DRAW, max_new_tokens=20)
    for broken, message in ((wrong, "its logits differ by 1.0e-02"), (refuses, "stream is capturing")):
        monkeypatch.setattr(static_step, "capture", broken)
        caplog.clear()
        both(tiny_llama(), longer)
        assert message in caplog.messages[0] and len(caplog.messages) == 1


def test_under_autocast_weights_are_cast_once_and_a_tied_head_beside_its_embedding() -> None:
    model = tiny_gpt2()
    config = replace(DRAW, do_sample=False)
    with torch.autocast("cpu", torch.bfloat16):
        plain, static = (DecodeLoop(static_step=each)(model, QUERIES, config) for each in (False, True))
        with static_step.weights_in_autocast_dtype(model, model.device):
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert model.transformer.wte.weight.dtype == torch.float32
            assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.transformer.wte.weight
    same(static, plain, tolerance=0.05)


def test_unwritten_keys_that_are_nan_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer is made without content, and what is masked is multiplied by 0."""
    made = kv_cache.InPlaceCacheLayer._new_buffer
    monkeypatch.setattr(kv_cache.InPlaceCacheLayer, "_new_buffer", lambda *args: made(*args).fill_(torch.nan))
    again = kv_cache.InPlaceCacheLayer._reallocated

    def reallocated(self: Any, buffer: Tensor, content: Tensor) -> Tensor:
        larger = again(self, buffer, content)
        larger[:, :, content.shape[2] :] = torch.nan
        return larger

    monkeypatch.setattr(kv_cache.InPlaceCacheLayer, "_reallocated", reallocated)
    both(tiny_llama(), replace(DRAW, num_return_sequences=2))
