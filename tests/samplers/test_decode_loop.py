"""The decode loop draws what the model says, computes nothing it need not, and knows what it does not fit."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_ppo.models.loading import cache_argument
from rlhf_ppo.samplers import batch_decoder
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft

STOPS = tuple(range(0, VOCAB_SIZE, 9))  # many stop tokens: responses end at different steps
DRAW = SamplingConfig(max_new_tokens=12, stop_token_ids=STOPS)
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def from_config(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def lora_gpt2() -> Any:
    """A PEFT model whose adapters act: B is not at its initial zero."""
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


NEOX = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "qwen2": lambda: from_config(Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
    "qwen3": lambda: from_config(Qwen3Config(**SMALL)),
    "gemma": lambda: from_config(GemmaConfig(**SMALL)),
    "gemma2-sliding": lambda: from_config(Gemma2Config(**SMALL, sliding_window=4, query_pre_attn_scalar=8)),
    "gemma3-sliding": lambda: from_config(
        Gemma3TextConfig(
            **SMALL, sliding_window=4, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "neox": lambda: from_config(GPTNeoXConfig(**NEOX)),
    "mistral": lambda: from_config(MistralConfig(**SMALL, sliding_window=None)),
    "mistral-sliding": lambda: from_config(MistralConfig(**SMALL, sliding_window=4)),
    "gpt2-lora": lora_gpt2,
}


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def greedy_of_generate(model: Any, prompt: Tensor, config: SamplingConfig) -> list[int]:
    """What `model.generate` finds for one unpadded prompt."""
    output = model.generate(
        input_ids=prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        repetition_penalty=config.repetition_penalty,
        do_sample=False,
        eos_token_id=list(config.stops) or None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def logits_after_prompt(model: Any, prompt: Tensor, response: Tensor) -> Tensor:
    """Logits [response, vocab] by one plain forward over the unpadded, uncached row."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].double()


def warped(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature, top-k, top-p by their definitions, row by row."""
    rows = []
    for row in logits / config.temperature:
        kept = row
        if config.top_k:
            kept = row.masked_fill(row < row.sort(descending=True).values[config.top_k - 1], -math.inf)
        if config.top_p < 1:
            order = kept.argsort(descending=True)
            mass = kept.softmax(0)[order].cumsum(0)
            out = order[1:][mass[:-1] >= config.top_p]  # the set that is complete without them
            kept = kept.index_fill(0, out, -math.inf)
        rows.append(kept)
    return torch.stack(rows)


def same(left: Samples, right: Samples, tolerance: float = 1e-5) -> None:
    assert [r.tolist() for r in left.responses] == [r.tolist() for r in right.responses]
    assert left.finished == right.finished
    assert left.logprobs is not None and right.logprobs is not None
    for ours, theirs in zip(left.logprobs, right.logprobs, strict=True):
        assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_decoding_of_a_padded_batch_equals_generate_row_by_row(name: str) -> None:
    """Left padding, position ids, sliding windows, adapters and row removal must all be right for this to hold."""
    model = ARCHITECTURES[name]()
    config = SamplingConfig(max_new_tokens=12, stop_token_ids=STOPS, do_sample=False)
    queries = prompts(3, 9, 5, 1, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        samples = DecodeLoop()(model, queries, config)
    assert [r.tolist() for r in samples.responses] == [greedy_of_generate(model, q, config) for q in queries]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_equal_those_of_a_plain_forward(name: str) -> None:
    model = ARCHITECTURES[name]()
    queries = prompts(3, 9, 5, 1)
    samples = DecodeLoop()(model, queries, replace(DRAW, num_return_sequences=2), generator=seeded())
    assert samples.logprobs is not None
    for prompt, response, logprobs in zip(samples.prompts, samples.responses, samples.logprobs, strict=True):
        truth = logits_after_prompt(model, prompt, response).log_softmax(1).gather(1, response[:, None]).squeeze(1)
        assert_close(logprobs.double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rules",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9}],
    ids=str,
)
def test_log_probabilities_are_under_the_distribution_drawn_from(rules: dict[str, Any]) -> None:
    """Filtered tokens have probability 0 and are not drawn; the rest is normalized over the same support."""
    model, config = tiny_gpt2(), replace(DRAW, num_return_sequences=3, **rules)
    samples = DecodeLoop()(model, prompts(3, 6), config, generator=seeded())
    assert samples.logprobs is not None
    for prompt, response, logprobs in zip(samples.prompts, samples.responses, samples.logprobs, strict=True):
        scores = warped(logits_after_prompt(model, prompt, response), config)
        truth = scores.log_softmax(1).gather(1, response[:, None]).squeeze(1)
        assert bool(truth.isfinite().all())
        assert_close(logprobs.double(), truth, atol=1e-5, rtol=0)


def test_first_tokens_are_distributed_as_the_model_says() -> None:
    """20 000 responses of one token: each frequency within five standard errors of its probability."""
    model, (prompt,) = tiny_gpt2(), prompts(4)
    config = SamplingConfig(max_new_tokens=1, num_return_sequences=20_000)
    samples = DecodeLoop(max_rows=20_000)(model, [prompt], config, generator=seeded())
    counts = torch.cat(samples.responses).bincount(minlength=VOCAB_SIZE).double()
    with torch.no_grad():
        p = model(input_ids=prompt[None]).logits[0, -1].double().softmax(0)
    errors = (p * (1 - p) / 20_000).sqrt()
    assert bool(((counts / 20_000 - p).abs() <= 5 * errors + 1e-4).all())
    assert samples.counts.prefill_tokens == 4  # twenty thousand rows share one prefill


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral-sliding"])
def test_dropping_finished_rows_changes_nothing_but_the_work(name: str) -> None:
    model, queries = ARCHITECTURES[name](), prompts(3, 9, 5, 1, 7, 7)
    config = replace(DRAW, num_return_sequences=3)
    dropped = DecodeLoop()(model, queries, config, generator=seeded())
    kept = DecodeLoop(compact=False)(model, queries, config, generator=seeded())
    same(dropped, kept)
    assert len({len(r) for r in dropped.responses}) > 3
    assert dropped.counts.decode_row_steps < kept.counts.decode_row_steps


@pytest.mark.parametrize(
    "limits", [{"max_rows": 1}, {"max_rows": 4}, {"kv_budget_bytes": 1}, {"kv_budget_bytes": 60_000}]
)
def test_the_cut_into_batches_changes_nothing(limits: dict[str, int]) -> None:
    model, queries, config = tiny_gpt2(), prompts(3, 9, 5, 1), replace(DRAW, num_return_sequences=3)
    same(
        DecodeLoop()(model, queries, config, generator=seeded()),
        DecodeLoop(**limits)(model, queries, config, generator=seeded()),
    )


def test_a_key_value_budget_bounds_the_rows_of_a_batch() -> None:
    """GPT-2 with 2 layers of width 32 in float32: 2 · 2 · 32 · 4 = 512 bytes a position; 4 + 12 positions a row."""
    model, rows = tiny_gpt2(), []
    loop = DecodeLoop(kv_budget_bytes=3 * 512 * 16, on_progress=lambda done, total: rows.append((done, total)))
    loop(model, prompts(4, 4, 4, 4), replace(DRAW, num_return_sequences=2))
    assert rows == [(3, 8), (6, 8), (8, 8)]


def test_left_padding_equals_no_padding() -> None:
    """GPT-2's positions are absolute: a row shifted by its padding would have other log-probabilities (defect D6)."""
    model, queries = tiny_gpt2(), prompts(2, 30)
    together = DecodeLoop()(model, queries, DRAW, generator=seeded())
    uniforms_of_the_first = DecodeLoop()(model, queries[:1], DRAW, generator=seeded())
    same(
        replace(together, **{k: getattr(together, k)[:1] for k in ("responses", "logprobs", "finished")}),
        uniforms_of_the_first,
    )


def test_finished_is_true_exactly_where_the_last_token_stops() -> None:
    samples = DecodeLoop()(tiny_gpt2(), prompts(3, 5, 7), replace(DRAW, num_return_sequences=20), generator=seeded())
    assert 0 < sum(samples.finished) < len(samples.finished)
    for response, finished in zip(samples.responses, samples.finished, strict=True):
        stops = [token in STOPS for token in response.tolist()]
        assert not any(stops[:-1])
        assert stops[-1] == finished
        assert finished or len(response) == DRAW.max_new_tokens


def test_no_response_stops_before_the_minimum() -> None:
    config = replace(DRAW, min_new_tokens=6, num_return_sequences=10)
    samples = DecodeLoop()(tiny_gpt2(), prompts(3, 8), config, generator=seeded())
    assert min(len(response) for response in samples.responses) >= 6
    assert any(len(response) < 12 for response in samples.responses)
    assert all(token not in STOPS for response in samples.responses for token in response[:5].tolist())


def test_a_repetition_penalty_does_not_see_the_padding() -> None:
    """Greedy with a penalty, padded, equals `generate` without padding: padding adds no token to the history."""
    model, queries = tiny_gpt2(), prompts(3, 12, 6)
    config = SamplingConfig(max_new_tokens=12, do_sample=False, repetition_penalty=1.8)
    samples = DecodeLoop()(model, queries, config)
    assert [r.tolist() for r in samples.responses] == [greedy_of_generate(model, q, config) for q in queries]


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it() -> None:
    tokenizer = tiny_tokenizer()
    config = SamplingConfig(max_new_tokens=24, stop_strings=("e", "th"), num_return_sequences=20)
    samples = DecodeLoop(tokenizer)(tiny_gpt2(), prompts(3, 5), config, generator=seeded())
    free = DecodeLoop()(tiny_gpt2(), prompts(3, 5), replace(config, stop_strings=()), generator=seeded())
    assert 5 < sum(samples.finished) < 40
    for response, finished, longer in zip(samples.responses, samples.finished, free.responses, strict=True):
        assert longer[: len(response)].tolist() == response.tolist()
        text, before = tokenizer.decode(response), tokenizer.decode(response[:-1])
        assert finished == ("e" in text or "th" in text)
        assert "e" not in before and "th" not in before


def test_a_stop_string_is_not_looked_for_in_the_prompt() -> None:
    """The prompt ends with "t"; a response beginning with "h" does not make it stop."""
    tokenizer = tiny_tokenizer()
    prompt = torch.tensor(tokenizer("t").input_ids)
    (h,) = tokenizer("h").input_ids

    class AlwaysH(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.one_hot(torch.full(hidden.shape[:-1], h), VOCAB_SIZE).float()

    model = tiny_gpt2()
    model.lm_head = AlwaysH()
    config = SamplingConfig(max_new_tokens=3, stop_strings=("th",), do_sample=False)
    samples = DecodeLoop(tokenizer)(model, [prompt], config)
    assert (samples.responses[0].tolist(), samples.finished) == ([h, h, h], [False])


def test_responses_to_one_prompt_stand_side_by_side_and_differ() -> None:
    queries = prompts(3, 9)
    samples = DecodeLoop()(tiny_gpt2(), queries, replace(DRAW, num_return_sequences=3), generator=seeded())
    assert [p.tolist() for p in samples.prompts] == [q.tolist() for q in queries for _ in range(3)]
    assert len({tuple(r.tolist()) for r in samples.responses}) == 6


def test_work_is_counted_without_waste() -> None:
    """Every token but a row's last goes through the model once; every position computed has its LM head row."""
    config = replace(DRAW, num_return_sequences=4)
    samples = DecodeLoop()(tiny_gpt2(), prompts(5, 5, 8), config, generator=seeded())
    work, tokens = samples.counts, sum(len(r) for r in samples.responses)
    assert (work.prompt_tokens, work.prefill_tokens, work.response_tokens) == (18, 24, tokens)
    assert work.decode_row_steps == tokens - 12
    assert work.lm_head_rows == 3 + work.decode_row_steps


def test_the_lm_head_runs_on_the_last_position_only() -> None:
    model, rows = tiny_gpt2(), []
    assert DecodeLoop().unsupported_reason(model) is None  # proved before
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:2].numel()))
    samples = DecodeLoop()(model, prompts(5, 9), DRAW, generator=seeded())
    assert sum(rows) == samples.counts.lm_head_rows


def test_a_limit_per_prompt_ends_rows_unfinished() -> None:
    config = SamplingConfig(max_new_tokens=9, num_return_sequences=2)
    samples = DecodeLoop()(tiny_gpt2(), prompts(3, 5, 4), config, generator=seeded(), limits=[2, 99, 5])
    assert [len(r) for r in samples.responses] == [2, 2, 9, 9, 5, 5]
    assert not any(samples.finished)
    assert samples.counts.decode_row_steps == 2 * (1 + 8 + 4)


def test_sampling_is_in_eval_mode_and_puts_training_back() -> None:
    """With dropout acting, the same uniforms would meet other probabilities each time."""
    model = tiny_gpt2(dropout=0.5).train()
    model.transformer.gradient_checkpointing = True  # in training mode, GPT-2 would then keep no cache
    first = DecodeLoop()(model, prompts(4, 6), DRAW, generator=seeded())
    same(first, DecodeLoop()(model, prompts(4, 6), DRAW, generator=seeded()))
    assert all(module.training for module in model.modules())
    assert not any(r.requires_grad for r in first.logprobs or [])


def test_equal_generator_states_give_equal_responses_and_others_do_not() -> None:
    model = tiny_gpt2()
    first, again, other = (DecodeLoop()(model, prompts(4, 6), DRAW, generator=seeded(s)) for s in (1, 1, 2))
    same(first, again)
    assert [r.tolist() for r in first.responses] != [r.tolist() for r in other.responses]


def test_without_a_generator_torch_s_global_seed_decides() -> None:
    model, runs = tiny_gpt2(), []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(DecodeLoop()(model, prompts(4, 6), DRAW))
    same(*runs)


def test_bfloat16_models_sample_with_float32_log_probabilities() -> None:
    model = tiny_gpt2(dtype=torch.bfloat16)
    samples = DecodeLoop()(model, prompts(3, 9), DRAW, generator=seeded())
    assert samples.logprobs is not None
    for prompt, response, logprobs in zip(samples.prompts, samples.responses, samples.logprobs, strict=True):
        assert logprobs.dtype == torch.float32
        truth = logits_after_prompt(model, prompt, response).log_softmax(1).gather(1, response[:, None]).squeeze(1)
        assert_close(logprobs.double(), truth, atol=0.15, rtol=0.05)  # bf16 keeps 8 bits: another order of sums shows


def test_a_long_response_outgrows_no_storage() -> None:
    model = tiny_gpt2(n_positions=512)
    config = SamplingConfig(max_new_tokens=400, do_sample=False)
    (query,) = prompts(3)
    assert DecodeLoop()(model, [query], config).responses[0].tolist() == greedy_of_generate(model, query, config)


def test_no_prompts_give_no_responses() -> None:
    samples = DecodeLoop()(tiny_gpt2(), [], DRAW)
    assert (samples.prompts, samples.responses, samples.logprobs, samples.finished) == ([], [], [], [])


def test_logits_that_are_not_numbers_are_an_error_naming_the_rows() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"logits must be numbers.*responses \[0, 1\]"):
        DecodeLoop()(model, prompts(3, 4), DRAW)


def test_positions_beyond_a_learned_table_are_an_error_before_any_work() -> None:
    with pytest.raises(ValueError, match="max_position_embeddings = 16, got 17"):
        DecodeLoop()(tiny_gpt2(n_positions=16), prompts(3, 5), DRAW)


def test_a_model_whose_forward_takes_cache_is_decoded_like_one_that_takes_past_key_values() -> None:
    """As transformers 5.24 renamed it."""
    name = cache_argument(tiny_llama())

    class Renamed(type(tiny_llama())):  # type: ignore[misc]
        def forward(
            self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, cache: Any = None,
            use_cache: Any = None, **rest: Any,
        ) -> Any:  # fmt: skip
            rest[name] = cache
            return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **rest)

    renamed = tiny_llama()
    renamed.__class__ = Renamed
    found, expected = (
        DecodeLoop()(model, prompts(3, 5), DRAW, generator=seeded()) for model in (renamed, tiny_llama())
    )
    same(found, expected)


def test_stop_strings_without_a_tokenizer_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        DecodeLoop()(tiny_gpt2(), prompts(3), SamplingConfig(max_new_tokens=2, stop_strings=("x",)))


@pytest.mark.parametrize("name, value", [("max_rows", 0), ("kv_budget_bytes", 0)])
def test_a_loop_that_could_decode_no_row_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        DecodeLoop(**{name: value})


def prompt_tuned() -> Any:
    return get_peft_model(tiny_gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # by peft
@pytest.mark.parametrize("build, words", [(tiny_t5, "encoder-decoder"), (prompt_tuned, "virtual prompt tokens")])
def test_a_model_the_loop_does_not_fit_goes_to_generate_with_one_warning(build: Callable[[], Any], words: str) -> None:
    model, loop = build(), DecodeLoop()
    config = replace(DRAW, stop_token_ids=(EOS_TOKEN_ID,))
    with pytest.warns(UserWarning, match=words):
        samples = loop(model, prompts(3, 5), config, generator=seeded())
    assert samples.logprobs is None
    assert all(1 <= len(response) <= 12 for response in samples.responses)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DecodeLoop")
        loop(model, prompts(3, 5), config, generator=seeded())


@pytest.mark.parametrize("name", ["llama", "gemma2-sliding", "gemma3-sliding"])
def test_many_prompts_are_prefilled_a_few_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the activations of all prompts of a batch lived at once: 8 GiB for 128 prompts of 512 tokens at 1B."""
    model, config = ARCHITECTURES[name](), replace(DRAW, num_return_sequences=2)
    queries = prompts(3, 9, 5, 1, 7)
    whole = DecodeLoop()(model, queries, config, generator=seeded())
    monkeypatch.setattr(batch_decoder, "PREFILL_POSITIONS", 2 * 9)
    parts = DecodeLoop()(model, queries, config, generator=seeded())
    same(parts, whole)
    assert parts.counts.forwards == whole.counts.forwards + 2  # 5 prompts, 2 at a time
    assert replace(parts.counts, forwards=0) == replace(whole.counts, forwards=0)
